"""The backend on NVIDIA GPUs, in the place of vLLM's FLASH_ATTN.

FlashAttention's pages are plain: [num_blocks, num_kv_heads, block_size, 2 * head_dim], whatever
their strides, so decode and vLLM's prefill read and write the same ones. Steps of decode alone can
be CUDA graphs; steps with prefill run their attention outside of graphs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

import mac_attn

from ..serving.rows import Buffers
from . import attend
from .cuda_plan import CudaPlan, plan_capture, plan_step
from .engine import engine_of, most_rows
from .support import engine_reason, num_drafts


class MacFlashBackend(FlashAttentionBackend):
    """vLLM's FlashAttention backend with the impl and the metadata builder of this package."""

    @staticmethod
    def get_impl_cls() -> type[MacFlashImpl]:
        """The attention of a layer."""
        return MacFlashImpl

    @staticmethod
    def get_builder_cls() -> type[MacFlashMetadataBuilder]:
        """What is prepared once a step for all layers."""
        return MacFlashMetadataBuilder


class MacFlashMetadataBuilder(FlashAttentionMetadataBuilder):
    """vLLM's metadata, with a `CudaPlan` for the layers that are served as its attribute `mac`."""

    supports_update_block_table = False  # the plan holds the block table too

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.engine = engine_of(vllm_config, layer_names)
        if self.engine is not None:
            self.leads = self.engine.leads(layer_names)
            self.reorder_batch_threshold = self.engine.query_tokens  # those rows come first
            self.buffers = Buffers(most_rows(vllm_config), device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Graphs of rows with one token, or where drafts are verified with one more than those.

        A graph must not mix decode and prefill, nor rows of different lengths, which are two calls.
        """
        if engine_reason(vllm_config) is not None:
            return super().get_cudagraph_support(vllm_config, kv_cache_spec)
        if 1 < 1 + num_drafts(vllm_config) <= mac_attn.MAX_QUERY_TOKENS:
            return AttentionCGSupport.UNIFORM_BATCH
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        """The metadata of a step, see `AttentionMetadataBuilder.build`."""
        build = super().build
        metadata = build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.mac = None
        if self.engine is not None:
            # fast_build: a schedule of its own would be written over the one of `metadata`.
            common = common_attn_metadata
            metadata.mac = plan_step(
                self.engine, self.leads, common, self.buffers, lambda part: build(0, part, True)
            )
            self.engine.report()
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """The metadata that a graph is recorded with."""
        metadata = super().build(0, common_attn_metadata)
        metadata.mac = None
        common = common_attn_metadata
        uniform = common.num_actual_tokens == common.num_reqs * common.max_query_len
        if self.engine is not None and uniform and common.max_query_len <= self.engine.query_tokens:
            metadata.mac = plan_capture(common, self.buffers)
        return metadata


class MacFlashImpl(FlashAttentionImpl):
    """One layer: vLLM's attention, unless the engine has given it rings in `mac`."""

    mac: attend.Served | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mac = None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of a step's tokens, see `FlashAttentionImpl.forward`."""
        plan: CudaPlan | None = None if attn_metadata is None else attn_metadata.mac
        if self.mac is None or plan is None:
            scales = (output_scale, output_block_scale)
            query = self._query(layer, query)
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
            return output
        for call in plan.decodes:
            attend.decode(layer, call, query, kv_cache, output)
        if plan.prefill is not None:
            tokens = plan.prefill.tokens
            new = [self._query(layer, query[tokens]), *attend.parts(tokens, key, value)]
            super().forward(layer, *new, kv_cache, plan.prefill.metadata, output[tokens])
            attend.seed(layer, plan.seeds, query, kv_cache)
        return output

    def _query(self, layer: Any, query: Tensor) -> Tensor:
        """Queries as vLLM's kernel wants them: float8 where the cache is and it can do no other."""
        quant = self.mac.query_quant if self.mac is not None else None
        if quant is None:
            return query
        rounded: Tensor = quant(query.flatten(1), layer._q_scale)[0]
        return rounded.view(query.shape)
