"""SGLang's attention backend `mac`, for decode beside any other for prefill.

It is the backend that does the prefill, of another class: that class with a few methods changed.
So whatever is not served, or asks a backend something that is not about decode, finds SGLang's.

A step of decode may be the replay of a CUDA graph. Its kernels read slots, request ids, lengths and
page numbers from buffers that stay where they are and that are written before the replay.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor

import mac_attn

from ..serving.options import Options
from ..serving.rows import Buffers, Rows
from .engine import Engine
from .plugin import NAME


def create(runner: Any, options: Options) -> Any:
    """The decode backend of a model runner; SGLang's own where no layer is served.

    Raises:
        ValueError: the backend is chosen for prefill too, or for a model with multi-head latent
            attention, whose parts ask for the name of the backend and do not know this one.
    """
    prefill, decode = runner.prefill_attention_backend_str, runner.decode_attention_backend_str
    if prefill == NAME:
        raise ValueError(
            f"the attention backend for prefill is {NAME!r}, must be another: "
            f"--decode-attention-backend {NAME}, and SGLang's default or any other for prefill"
        )
    if runner.use_mla_backend:
        raise ValueError(
            f"the attention backend for decode is {NAME!r}, must be another for a model with "
            f"multi-head latent attention: leave --decode-attention-backend {NAME} away"
        )
    try:
        runner.decode_attention_backend_str = prefill  # which a backend may ask while it is made
        backend = ATTENTION_BACKENDS[prefill](runner)
    finally:
        runner.decode_attention_backend_str = decode
    engine = Engine(runner, options)
    if engine.rings:
        backend.__class__ = decoding_with_mac(type(backend))
        backend.mac = Decode(engine)
    return backend


class Decode:
    """What a step of decode consists of, prepared once for all layers.

    Args:
        engine: the runner's.

    Attributes:
        batch: the batch that `rows` were made for.
        rows: of a step of decode, else None.
    """

    def __init__(self, engine: Engine) -> None:
        runner = engine.runner
        self.engine = engine
        self.device = torch.device(runner.device)
        self.page_size: int = runner.page_size
        self.req_to_token: Tensor = runner.req_to_token_pool.req_to_token
        self.batch: Any = None
        self.rows: Rows | None = None
        self.most_rows = engine.most_rows()
        self._buffers = Buffers(self.most_rows, self.device)
        self._block_table: Tensor | None = None

    def allocate(self, max_rows: int) -> None:
        """Make the block table of the graphs, of batches of up to so many rows."""
        pages = -(-self.req_to_token.shape[1] // self.page_size)
        rows = min(max_rows, self.most_rows)
        self._block_table = torch.zeros((rows, pages), dtype=torch.int32, device=self.device)

    def prepare(self, batch: Any, in_capture: bool) -> None:
        """Write what the layers read of a batch. Nothing waits for the device.

        Args:
            batch: a ForwardBatch, or SGLang's view of one that is padded for a graph.
            in_capture: a graph is recorded next.
        """
        self.batch, self.rows = batch, None
        rows = len(batch.seq_lens)
        if not batch.forward_mode.is_decode() or not 0 < rows <= self.most_rows:
            return
        places = [None] * rows if in_capture else self.engine.places(rows)
        self._buffers.fill(places, batch.seq_lens)
        self.rows = self._buffers.rows(self._pages(batch, rows))
        if not in_capture:
            self.engine.report()

    def served(self, layer: Any, rows: int, more: dict[str, Any]) -> mac_attn.ReuseCache | None:
        """The rings of a layer that is served in this step; None where it is not.

        Args:
            layer: which.
            rows: how many queries there are.
            more: what the layer's model gives besides queries, keys and values.
        """
        served = self.engine.rings.get(layer.layer_id)
        if served is not None and (given := [name for name in more if more[name] is not None]):
            self.engine.leave(layer.layer_id, f"it is called with {', '.join(given)}")
            return None
        return served if self.rows is not None and len(self.rows.seq_lens) == rows else None

    def attend(self, ring: mac_attn.ReuseCache, q: Tensor, layer: Any, pool: Any) -> Tensor:
        """Attention of the rows, whose keys and values are in the pool already.

        Args:
            ring: what `served` answered.
            q: [rows, num_heads * head_dim] or [rows, num_heads, head_dim].
            layer: the `RadixAttention`.
            pool: SGLang's KV pool.

        Returns:
            [rows, num_heads * head_dim].
        """
        assert self.rows is not None  # by `served`
        key, value = (
            buffer.view(-1, self.page_size, *buffer.shape[1:])
            for buffer in (
                pool.get_key_buffer(layer.layer_id),
                pool.get_value_buffer(layer.layer_id),
            )
        )
        query = q.reshape(len(q), layer.tp_q_head_num, layer.qk_head_dim)
        out = mac_attn.decode(
            query,
            (key, value),
            self.rows.block_table,
            self.rows.seq_lens,
            reuse=ring,
            slots=self.rows.slots,
            request_ids=self.rows.request_ids,
            q_match=query if ring.rotary is None else None,
            sm_scale=layer.scaling,
            logits_soft_cap=float(layer.logit_cap),
        )
        assert isinstance(out, Tensor)  # without `return_lse`
        return out.view(len(q), -1)

    def _pages(self, batch: Any, rows: int) -> Tensor:
        """The page numbers of every row: those of its tokens, each P-th over P."""
        longest = self.req_to_token.shape[1]
        if batch.seq_lens_cpu is not None:
            longest = max(1, int(batch.seq_lens_cpu.max()))
        tokens = self.req_to_token[:, : longest : self.page_size]
        pages = tokens.index_select(0, batch.req_pool_indices)
        if self.page_size > 1:
            pages = pages.div_(self.page_size, rounding_mode="floor")
        if self._block_table is None or rows > len(self._block_table):
            return pages
        self._block_table[:rows, : pages.shape[1]].copy_(pages)
        return self._block_table[:rows]


def decoding_with_mac(base: Any) -> Any:
    """The class of a backend of SGLang's, with other methods for decode."""

    class MacDecode(base):
        """That backend; `mac` is what it decodes with."""

        mac: Decode

        def init_forward_metadata(self, forward_batch: Any) -> None:
            """Prepare a step that runs eagerly."""
            self.mac.batch = None
            super().init_forward_metadata(forward_batch)
            if self.mac.batch is not forward_batch:  # else it was made of the method below
                self.mac.prepare(forward_batch, False)

        def init_forward_metadata_out_graph(
            self, forward_batch: Any, in_capture: bool = False
        ) -> None:
            """Prepare a step before a graph is recorded or replayed."""
            super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
            self.mac.prepare(forward_batch, in_capture)

        def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
            """Make the buffers that graphs read."""
            super().init_cuda_graph_state(max_bs, max_num_tokens)
            self.mac.allocate(max_bs)

        def forward_decode(
            self,
            q: Tensor,
            k: Tensor | None,
            v: Tensor | None,
            layer: Any,
            forward_batch: Any,
            save_kv_cache: bool = True,
            **kwargs: Any,
        ) -> Tensor:
            """Attention of one token a row, `[rows, num_heads * head_dim]`."""
            served = self.mac.served(layer, len(q), kwargs)
            if served is None:
                answer: Tensor = super().forward_decode(
                    q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **kwargs
                )
                return answer
            if save_kv_cache and k is not None and v is not None:
                where = KVWriteLoc(forward_batch.out_cache_loc)
                self.token_to_kv_pool.set_kv_buffer(layer, where, k, v)
            return self.mac.attend(served, q, layer, self.token_to_kv_pool)

    MacDecode.__name__ = MacDecode.__qualname__ = f"Mac{base.__name__}"
    return MacDecode
