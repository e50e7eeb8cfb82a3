"""Slots of a `ReuseCache` in host memory: a request that is swapped out."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .cache import ReuseCache


@dataclass(frozen=True)
class Form:
    """What two caches must have in common for one to go on with the other's entries."""

    entries: int
    band: int
    anchors: int
    granularity: str
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype

    @classmethod
    def of(cls, cache: ReuseCache) -> Form:
        """The form of a cache."""
        return cls(
            entries=cache.cfg.entries,
            band=cache.cfg.band,
            anchors=cache.cfg.anchors,
            granularity=cache.cfg.granularity,
            num_qo_heads=cache.num_qo_heads,
            num_kv_heads=cache.num_kv_heads,
            head_dim=cache.head_dim,
            head_dim_v=cache.head_dim_v,
            dtype=cache.dtype,
        )


@dataclass(frozen=True, eq=False)
class SlotState:
    """What `ReuseCache.export_slots` answers: `len(state)` slots, each with history and counters.

    It can be pickled and kept for as long as the request's KV cache is kept too: the entries stand
    for the tokens of that KV cache.

    Attributes:
        form: the shapes and options of the cache it comes from.
        ring: [k, slot bytes] uint8 on the CPU, rows of `ReuseCache.ring`.
    """

    form: Form
    ring: Tensor

    def __len__(self) -> int:
        return len(self.ring)

    @property
    def nbytes(self) -> int:
        """Bytes of the slots."""
        return self.ring.nbytes

    def check_form(self, cache: ReuseCache) -> None:
        """Raise ValueError, naming the first difference, if the cache has another form."""
        form = Form.of(cache)
        for field in fields(Form):
            have, want = getattr(self.form, field.name), getattr(form, field.name)
            if have != want:
                raise ValueError(f"state has {field.name} {have}, must have {want} as the cache")
