"""How many ring slots fit into a share of the memory that an engine gives its KV cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mac_attn import _C, ReuseConfig


@dataclass(frozen=True)
class Shape:
    """What the size of a layer's slot hangs on.

    Attributes:
        config: its options of reuse.
        num_qo_heads, num_kv_heads, head_dim: of the layer, on this rank.
        dtype: of its queries.
    """

    config: ReuseConfig
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

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
        )
        return layout[1]


def slots_within(share: float, kv_cache_bytes: int, layers: Iterable[Shape], most: int) -> int:
    """How many slots a share of the KV cache's memory holds; one if it holds none.

    Args:
        share: of the memory, above 0.
        kv_cache_bytes: the memory.
        layers: those with rings, at least one.
        most: requests that run at a time.
    """
    slot = sum(layer.nbytes for layer in layers)
    return max(1, min(most, int(share * kv_cache_bytes) // slot))
