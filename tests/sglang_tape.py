"""What a CUDA graph does, on the CPU: operations are recorded and repeated, and Python is not.

Like a graph, a replay repeats every operation on the tensors that it had when it was recorded, and
Python's part of it, with all that it has decided, is not run again. Whatever has to wait for a
number of a tensor cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput
from sglang.srt.model_executor.runner import decode_cuda_graph_runner
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from sglang.srt.model_executor.runner_backend.base_cuda_graph_backend import BaseCudaGraphBackend
from sglang.srt.runtime_context import get_exec
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Records the operations that are run in it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a graph cannot wait for a number of a tensor")
        kwargs = kwargs or {}
        answer = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, tree_leaves(answer)))
        return answer

    @torch.no_grad()
    def replay(self) -> None:
        """Repeat them, each into the tensors that it had answered with."""
        for func, args, kwargs, before in self.operations:
            for old, new in zip(before, tree_leaves(func(*args, **kwargs)), strict=True):
                # The same memory: an argument that was written to, or a view of one.
                if isinstance(old, Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


class TapeBackend(BaseCudaGraphBackend):
    """Beside SGLang's FullCudaGraphBackend."""

    def __init__(self, runner: Any, **options: Any) -> None:
        self.tapes: dict[Any, tuple[Recorder, Any]] = {}
        self.replays = 0

    @contextmanager
    def capture_session(self, stream: Any) -> Iterator[None]:
        yield

    def capture_one(
        self,
        shape_key: Any,
        forward_fn: Callable[[], Any],
        capture_inputs: Any = None,
        post_warmup_hook: Callable[[], None] | None = None,
    ) -> None:
        with torch.no_grad():
            for _ in range(2):
                forward_fn()
                if post_warmup_hook is not None:
                    post_warmup_hook()
            with Recorder() as tape:
                answer = forward_fn()
        self.tapes[shape_key] = (tape, answer)

    def can_run(self, forward_batch: Any, shape_key: Any) -> bool:
        return shape_key in self.tapes

    @contextmanager
    def replay_session(self) -> Iterator[None]:
        yield

    def replay(self, shape_key: Any, static_forward_batch: Any, **kwargs: Any) -> Any:
        tape, answer = self.tapes[shape_key]
        self.replays += 1
        tape.replay()
        return answer

    def cleanup(self) -> None:
        self.tapes.clear()


def record(model_runner: Any) -> TapeBackend:
    """Give a model runner SGLang's runner of decode graphs, with tapes in place of graphs."""
    runners: Any = decode_cuda_graph_runner
    runners.resolve_decode_backend = TapeBackend
    runners.get_or_create_global_graph_capture_stream = lambda: None

    @contextmanager
    def graph_capture(stream: Any) -> Iterator[Any]:
        yield SimpleNamespace(stream=stream)

    runners.graph_capture = graph_capture
    # Nobody waits beside a tape for its first operations to be over.
    runners.DecodeCudaGraphRunner._record_in_graph_metadata_prep_done = lambda self: None
    runners.DecodeCudaGraphRunner._publish_read_done = lambda self, in_graph: None
    # SGLang has no graphs with this backend. What every layer that is served needs of it is this.
    native: Any = TorchNativeAttnBackend
    native.init_cuda_graph_state = lambda self, max_bs, max_num_tokens: None
    native.get_cuda_graph_seq_len_fill_value = lambda self: 1
    # What `capture_cuda_graphs` makes beforehand where graphs are on.
    rows = max(get_exec().graph.cuda_graph_config.decode.bs)
    model_runner.graph_shared_output = GraphSharedOutput(device=torch.device("cpu"), max_rows=rows)
    model_runner.decode_cuda_graph_runner = DecodeCudaGraphRunner(model_runner)
    backend: TapeBackend = model_runner.decode_cuda_graph_runner.backend
    return backend
