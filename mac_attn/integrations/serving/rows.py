"""Rows of a decode step as `mac_attn.decode` takes them, in buffers that a CUDA graph may read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .slots import Place


@dataclass(frozen=True)
class Rows:
    """Rows of a batch for one call of `mac_attn.decode`.

    Attributes:
        block_table, seq_lens: theirs.
        slots, request_ids: theirs, a slot of -1 for a row that is attended exactly; None if all
            are.
    """

    block_table: Tensor
    seq_lens: Tensor
    slots: Tensor | None = None
    request_ids: Tensor | None = None

    def some(self, which: Tensor | slice) -> Rows:
        """Those of the rows that `which`, a slice or [n] int64 on their device, names."""
        parts = (self.block_table, self.seq_lens, self.slots, self.request_ids)
        return Rows(*(None if part is None else part[which] for part in parts))  # type: ignore[arg-type]


class Buffers:
    """What the kernels of a graph read about each row of a batch.

    Args:
        max_rows: of any batch.
        device: the GPU.

    Attributes:
        slots: [max_rows] int32, -1 without a ring.
        request_ids: [max_rows] int64.
        seq_lens: [max_rows] int32.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self.slots = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.request_ids = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.seq_lens = torch.zeros(max_rows, dtype=torch.int32, device=device)

    def fill(self, places: Sequence[Place | None], seq_lens: Tensor) -> None:
        """Write the rows of a step; lengths stay on the device, and nothing waits for it."""
        rows = len(places)
        pinned = self.slots.device.type != "cpu"
        host = torch.tensor(
            [(place.slot, place.number) if place else (-1, 0) for place in places],
            dtype=torch.int64,
            pin_memory=pinned,
        ).view(rows, 2)
        placed = host.to(self.slots.device, non_blocking=True)
        slots, numbers = placed.unbind(1)
        self.slots[:rows].copy_(slots)
        self.request_ids[:rows].copy_(numbers)
        self.seq_lens[:rows].copy_(seq_lens)

    def rows(self, block_table: Tensor) -> Rows:
        """The rows of a block table."""
        rows = len(block_table)
        return Rows(block_table, self.seq_lens[:rows], self.slots[:rows], self.request_ids[:rows])
