"""Slots of a `ReuseCache` in host memory: a request that is swapped out."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .cache import ReuseCache

# Everything that makes up a slot, as attributes of ReuseCache: [N, ...] there, [k, ...] here.
SLOT_TENSORS = (
    "ring_query",
    "ring_out",
    "ring_lse",
    "ring_depth",
    "ring_anchors",
    "ring_position",
    "slot_begin",
    "slot_end",
    "slot_request",
    "counters",
)
_EMPTY = {"ring_position": -1, "slot_begin": 0, "slot_end": 0, "slot_request": -1, "counters": 0}


@dataclass(frozen=True)
class Form:
    """What two caches must have in common for one to go on with the other's entries."""

    window: int
    band: int
    anchors: int
    granularity: str
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, cache: ReuseCache) -> Form:
        """The form of a cache."""
        return cls(
            window=cache.cfg.window,
            band=cache.cfg.band,
            anchors=cache.cfg.anchors,
            granularity=cache.cfg.granularity,
            num_qo_heads=cache.num_qo_heads,
            num_kv_heads=cache.num_kv_heads,
            head_dim=cache.head_dim,
            dtype=cache.dtype,
        )


@dataclass(frozen=True, eq=False)
class SlotState:
    """What `ReuseCache.export_slots` answers: `len(state)` slots, each with history and counters.

    It can be pickled and kept for as long as the request's KV cache is kept too: the entries stand
    for the tokens of that KV cache.

    Attributes:
        form: the shapes and options of the cache it comes from.
        tensors: by name of the `ReuseCache` attribute, `[k, ...]` on the CPU.
    """

    form: Form
    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.tensors["slot_end"])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    @classmethod
    def gather(
        cls, cache: ReuseCache, index: Tensor, valid: Tensor, *, pin_memory: bool
    ) -> SlotState:
        """Copies of the slots `index` `[k]`; those that are not `valid` `[k]` become empty ones."""
        pin_memory = pin_memory and cache.device.type != "cpu"
        tensors = {}
        for name in SLOT_TENSORS:
            rows = getattr(cache, name).index_select(0, index)
            if name in _EMPTY:
                rows.masked_fill_(~valid.view(-1, *[1] * (rows.ndim - 1)), _EMPTY[name])
            host = torch.empty_like(rows, device="cpu", pin_memory=pin_memory)
            tensors[name] = host.copy_(rows, non_blocking=pin_memory)
        return cls(Form.of(cache), tensors)

    def check_form(self, cache: ReuseCache) -> None:
        """Raise ValueError, naming the first difference, if the cache has another form."""
        form = Form.of(cache)
        for field in fields(Form):
            have, want = getattr(self.form, field.name), getattr(form, field.name)
            if have != want:
                raise ValueError(f"state has {field.name} {have}, must have {want} as the cache")

    def scatter(self, cache: ReuseCache, rows: Tensor, slots: Tensor, some: Tensor) -> None:
        """Write the state's `rows` `[k]` to `slots` `[k]`, or nothing unless `some` holds."""
        for name in SLOT_TENSORS:
            tensor = getattr(cache, name)
            given = self.tensors[name].to(cache.device, non_blocking=True).index_select(0, rows)
            tensor.index_copy_(0, slots, given.where(some, tensor.index_select(0, slots)))
