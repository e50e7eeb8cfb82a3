"""The rings that a layer is to get, and how many slots a share of the KV cache's memory holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mac_attn import _C, ReuseCache, ReuseConfig, RotaryEmbedding


@dataclass(frozen=True)
class Plan:
    """The rings that a layer is to get.

    Attributes:
        config: its options of reuse.
        num_qo_heads, num_kv_heads, head_dim: of the layer, on this rank.
        dtype: of its queries.
        number: of the layer in the model.
        rotary: how its queries come rotated, or None.
    """

    config: ReuseConfig
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    number: int = 0
    rotary: RotaryEmbedding | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of one slot of the layer."""
        layout = _C.ring_layout(
            self.num_kv_heads,
            self.num_qo_heads // self.num_kv_heads,
            self.head_dim,
            self.config.entries,
            self.config.anchors,
            self.dtype.itemsize,
            self.head_dim,
        )
        return layout[1]

    def rings(self, num_slots: int, most_rows: int, device: torch.device | str) -> ReuseCache:
        """The rings, for batches of up to so many rows."""
        return ReuseCache(
            self.config,
            num_slots=num_slots,
            num_qo_heads=self.num_qo_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=device,
            rotary=self.rotary,
            max_batch_size=max(num_slots, most_rows),
            layer=self.number,
        )


def slots_within(share: float, kv_cache_bytes: int, most: int, layers: Iterable[Plan]) -> int:
    """How many slots a share of the KV cache's memory holds; one if it holds none.

    Args:
        share: of the memory, above 0.
        kv_cache_bytes: the memory.
        most: requests that run at a time.
        layers: those with rings, at least one.
    """
    slot = sum(layer.nbytes for layer in layers)
    return max(1, min(most, int(share * kv_cache_bytes) // slot))
