"""The backend on the CPU, in the place of vLLM's CPU_ATTN.

vLLM's CPU kernels keep K transposed or packed inside a page, for their matrix instructions;
`mac_attn.decode` reads plain rows. So a served layer writes its own pages: vLLM's memory, blocks
and block tables, each block [num_kv_heads, block_size, 2 * head_dim] with a token's key and value
in one row. Decode reads them in place. Prefill is vLLM's own kernel; the pages of the requests in
prefill are packed for it into a scratch cache, layer by layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

import mac_attn

from . import attend
from .cpu_plan import CpuPlan, Prefill, plan_step
from .engine import engine_of


class MacCpuBackend(CPUAttentionBackend):
    """vLLM's CPU backend with the impl and the metadata builder of this package."""

    @staticmethod
    def get_impl_cls() -> type[MacCpuImpl]:
        """The attention of a layer."""
        return MacCpuImpl

    @staticmethod
    def get_builder_cls() -> type[MacCpuMetadataBuilder]:
        """What is prepared once a step for all layers."""
        return MacCpuMetadataBuilder


class MacCpuMetadataBuilder(CPUAttentionMetadataBuilder):
    """vLLM's metadata, with a `CpuPlan` for the layers that are served as its attribute `mac`."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.engine = engine_of(vllm_config, layer_names)
        if self.engine is not None:
            self.leads = self.engine.leads(layer_names)
            self.reorder_batch_threshold = self.engine.query_tokens  # those rows come first

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        """The metadata of a step, see `AttentionMetadataBuilder.build`."""
        build = super().build
        metadata = build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.mac = None
        if self.engine is not None:
            common = common_attn_metadata
            metadata.mac = plan_step(
                self.engine, self.leads, common, self.block_size, lambda part: build(0, part)
            )
            self.engine.report()
        return metadata


class MacCpuImpl(CPUAttentionBackendImpl):
    """One layer: vLLM's attention, unless the engine has given it rings in `mac`."""

    mac: attend.Served | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mac = None

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write keys and values `[tokens, num_kv_heads, head_dim]` to the pages."""
        if self.mac is None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        block_size = kv_cache.shape[2]
        page, place = slot_mapping // block_size, slot_mapping % block_size
        count = len(slot_mapping)
        rows = [key[:count], value[:count]]
        if self.mac.float8:
            scales = (layer._k_scale, layer._v_scale)
            rows = [
                mac_attn.to_float8(states, scale).view(torch.uint8)
                for states, scale in zip(rows, scales, strict=True)
            ]
        kv_cache[page, :, place] = torch.cat(rows, dim=-1)

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
        """Attention of a step's tokens, see `CPUAttentionBackendImpl.forward`."""
        plan: CpuPlan | None = None if attn_metadata is None else attn_metadata.mac
        if self.mac is None or plan is None:
            scales = (output_scale, output_block_scale)
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
            return output
        for call in plan.decodes:
            attend.decode(layer, call, query, kv_cache, output)
        if plan.prefill is not None:
            tokens = plan.prefill.tokens
            scratch = self._packed(plan.prefill, layer, kv_cache, query.dtype)
            new = attend.parts(tokens, query, key, value)
            super().forward(layer, *new, scratch, plan.prefill.metadata, output[tokens])
            attend.seed(layer, plan.seeds, query, kv_cache)
        return output

    def _packed(self, prefill: Prefill, layer: Any, kv_cache: Tensor, dtype: torch.dtype) -> Tensor:
        """The context of the rows in prefill, as vLLM's kernels want it."""
        scratch = kv_cache.new_zeros((prefill.num_blocks, *kv_cache.shape[1:]))
        rows = kv_cache[prefill.pages, :, prefill.places]
        key, value = attend.pages(layer, rows)
        if self.mac is not None and self.mac.float8:
            # vLLM makes numbers of them once more, and cuts off what does not fit (0.32.0): a
            # sixty-fourth more, an eighth of a step or two, is cut or rounded to what they were.
            key, value = (
                (numbers.float() * (scale.reshape(-1, 1) * (1 + 2**-6))).to(dtype)
                for numbers, scale in ((key, layer._k_scale), (value, layer._v_scale))
            )
        super().do_kv_cache_update(layer, key, value, scratch, prefill.slot_mapping)
        return scratch
