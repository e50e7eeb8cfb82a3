"""FlashInfer's ways to decode, on a workload's pages in place; each a variant of the peer.

    python bench/flashinfer_decode.py        # compiles what they need, so that no benchmark waits

| variant | of FlashInfer 0.7.4 | runs on |
|---|---|---|
| CUDA cores, fa2, fa3, cuDNN | its decode wrapper, by `backend` | any; fa3: Hopper |
| BatchAttention | its persistent kernel for mixed batches | any |
| XQA, trtllm-gen | trtllm_batch_decode_with_kv_cache | Hopper on; Blackwell |

Not here: `cute-dsl` and `cake`, for Blackwell alone, and the wrapper's `cutile`, which its
documentation does not name. Each plans once, at its first call and outside what is timed: an engine
plans once for all layers of a step. So a failure is this variant's alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flashinfer
import torch
from torch import Tensor
from workload import Case, Workload

WORKSPACE_BYTES = 256 * 2**20
CUDA_CORES = "CUDA cores"
# use_tensor_cores, backend
_WRAPPERS = {
    CUDA_CORES: (False, "auto"),
    "fa2": (True, "fa2"),
    "fa3": (True, "fa3"),
    "cuDNN": (False, "cudnn"),
}


def variants(work: Workload) -> dict[str, Callable[[], Tensor]]:
    """All that may run on this card."""
    found: dict[str, Callable[[], Tensor]] = {
        name: _Wrapper(work, *options) for name, options in _WRAPPERS.items()
    }
    found["BatchAttention"] = _BatchAttention(work)
    major, _ = torch.cuda.get_device_capability(work.device)
    if major >= 9:
        found["XQA"] = _trtllm(work, "xqa")
    if major == 10:
        found["trtllm-gen"] = _trtllm(work, "trtllm-gen")
    return found


def cuda_cores(work: Workload) -> dict[str, Callable[[], Tensor]]:
    """The variant that the method's authors compare with, alone."""
    return {CUDA_CORES: _Wrapper(work, *_WRAPPERS[CUDA_CORES])}


def _workspace(work: Workload) -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=work.device)


class _Pages:
    """A workload's block table in FlashInfer's form."""

    def __init__(self, work: Workload) -> None:
        case = work.case
        self.indptr = case.pages_per_request * torch.arange(
            case.batch + 1, dtype=torch.int32, device=work.device
        )
        self.indices = work.block_table.flatten()
        last = (case.seq_len - 1) % case.page_size + 1
        self.last_page_len = torch.full((case.batch,), last, dtype=torch.int32, device=work.device)


class _Wrapper:
    def __init__(self, work: Workload, use_tensor_cores: bool, backend: str) -> None:
        self.work = work
        self.use_tensor_cores, self.backend = use_tensor_cores, backend
        self.out = torch.empty_like(work.q)
        self.wrapper: Any = None

    def __call__(self) -> Tensor:
        if self.wrapper is None:
            self.wrapper = self.plan()
        return self.wrapper.run(self.work.q, self.work.kv, out=self.out)

    def plan(self) -> Any:
        case, pages = self.work.case, _Pages(self.work)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            _workspace(self.work),
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=self.use_tensor_cores,
            paged_kv_indptr_buffer=torch.empty_like(pages.indptr),
            paged_kv_indices_buffer=torch.empty_like(pages.indices),
            paged_kv_last_page_len_buffer=torch.empty_like(pages.last_page_len),
            backend=self.backend,
        )
        # cuDNN reads a block table; without one the wrapper makes a copy of its own.
        table = {"block_tables": self.work.block_table} if self.backend == "cudnn" else {}
        wrapper.plan(
            pages.indptr,
            pages.indices,
            pages.last_page_len,
            case.num_qo_heads,
            case.num_kv_heads,
            case.head_dim,
            case.page_size,
            q_data_type=case.dtype,
            kv_data_type=case.dtype,
            **table,
        )
        return wrapper


class _BatchAttention:
    def __init__(self, work: Workload) -> None:
        case = work.case
        self.work = work
        self.out = torch.empty_like(work.q)
        self.lse = torch.empty(case.batch, case.num_qo_heads, device=work.device)
        self.wrapper: Any = None

    def __call__(self) -> Tensor:
        if self.wrapper is None:
            self.wrapper = self.plan()
        self.wrapper.run(self.work.q, self.work.kv, out=self.out, lse=self.lse)
        return self.out

    def plan(self) -> Any:
        case, pages = self.work.case, _Pages(self.work)
        wrapper = flashinfer.BatchAttention("NHD", str(self.work.device))
        wrapper.plan(
            torch.arange(case.batch + 1, dtype=torch.int32, device=self.work.device),
            pages.indptr,
            pages.indices,
            self.work.seq_lens,
            case.num_qo_heads,
            case.num_kv_heads,
            case.head_dim,
            case.head_dim,
            case.page_size,
            q_data_type=case.dtype,
            kv_data_type=case.dtype,
        )
        return wrapper


def _trtllm(work: Workload, backend: str) -> Callable[[], Tensor]:
    workspace, out = _workspace(work), torch.empty_like(work.q)
    return lambda: flashinfer.decode.trtllm_batch_decode_with_kv_cache(
        work.q,
        work.kv,
        workspace,
        work.block_table,
        work.seq_lens,
        work.case.seq_len,
        bmm1_scale=1 / math.sqrt(work.case.head_dim),
        out=out,
        kv_layout="NHD",
        backend=backend,
    )


def main() -> None:
    """Call every variant once for each group size, at once: FlashInfer compiles what it lacks."""
    start = time.time()
    device = torch.device("cuda", torch.cuda.current_device())

    def attempt(call: Callable[[], Tensor]) -> str:
        try:
            call()
        except Exception as error:  # the benchmark names it again; the others are still compiled
            return f"{type(error).__name__}: {str(error).strip()[-1000:]}"
        return "ready"

    for layout in ("32/8", "32/4"):
        calls = variants(Workload(Case.of(layout, 4096, 1), device))
        with ThreadPoolExecutor(len(calls)) as pool:
            for name, outcome in zip(calls, pool.map(attempt, calls.values()), strict=True):
                print(f"{layout}, {name}: {outcome}")
        torch.cuda.synchronize()
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
