"""The calls of `mac_attn.decode` that a step's rows of decode become, prepared for all layers.

A row computes one token or, where drafts are verified, a few. Where a batch has both they are two
calls, so that a row of one token is not filled up to as many. How sums are cut may hang on the most
tokens that a row of the call has: where a row must get the same bits in any company, each number of
tokens has a call of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..serving.rows import Rows


@dataclass(frozen=True)
class Decode:
    """The rows of one call.

    Attributes:
        rows: which.
        width: tokens of a row, the most that one has.
        tokens: which of the batch are theirs: all from the first one on as a slice, else an index
            [rows * width] int64, in which a row's last one stands for those that it lacks.
        query_lens: [rows] int32, how many each row has, or None: all have `width`.
        there: [tokens] int64, where `tokens` is not such a stand-in; with `query_lens` alone.
    """

    rows: Rows
    width: int
    tokens: slice | Tensor
    query_lens: Tensor | None = None
    there: Tensor | None = None

    def take(self, states: Tensor) -> Tensor:
        """Of `[tokens of the batch, ...]` these rows': `[rows, ...]` or `[rows, width, ...]`.

        It is a view if `tokens` is a slice.
        """
        mine = states[self.tokens]
        return mine if self.width == 1 else mine.unflatten(0, (-1, self.width))

    def put(self, answer: Tensor, states: Tensor) -> None:
        """Write what `take` would return to `[tokens of the batch, ...]`."""
        tokens = self.tokens
        assert isinstance(tokens, Tensor)  # a slice's are written in place
        if self.width > 1:
            answer = answer.flatten(0, 1)
        if self.there is not None:
            tokens, answer = tokens[self.there], answer[self.there]
        states[tokens] = answer


def count_decodes(starts: Sequence[int], most: int) -> int:
    """How many rows, from the first on, compute at least one and at most so many tokens."""
    lengths = [last - first for first, last in pairwise(starts)]
    return next((row for row, n in enumerate(lengths) if not 1 <= n <= most), len(lengths))


def plan_decodes(rows: Rows, starts: Sequence[int], batch_invariant: bool) -> list[Decode]:
    """The calls for some rows whose tokens are the first of the batch.

    Args:
        rows: which.
        starts: the first token of each, and the end of the last.
        batch_invariant: see `Served`.
    """
    lengths = [last - first for first, last in pairwise(starts)]
    if not lengths:
        return []
    if min(lengths) == max(lengths):
        return [Decode(rows, lengths[0], slice(starts[-1]))]
    calls: dict[int, list[int]] = {}
    for row, n in enumerate(lengths):
        calls.setdefault(n if batch_invariant else min(n, 2), []).append(row)
    return [
        _gathered(rows, some, starts, [lengths[row] for row in some])
        for _, some in sorted(calls.items())
    ]


def _gathered(
    rows: Rows, some: Sequence[int], starts: Sequence[int], lengths: Sequence[int]
) -> Decode:
    """The call for some of the rows, of which each has another number of tokens."""
    width, device = max(lengths), rows.seq_lens.device
    tokens = [
        starts[row] + min(t, n - 1)
        for row, n in zip(some, lengths, strict=True)
        for t in range(width)
    ]
    mine, index = rows.some(_integers(some, device)), _integers(tokens, device)
    if min(lengths) == width:
        return Decode(mine, width, index)
    there = [i * width + t for i, n in enumerate(lengths) for t in range(n)]
    query_lens = _integers(lengths, device).int()
    return Decode(mine, width, index, query_lens, _integers(there, device))


def _integers(values: Sequence[int], device: torch.device) -> Tensor:
    """[n] int64; nothing waits for a GPU that it goes to."""
    pinned = device.type != "cpu"
    host = torch.tensor(values, dtype=torch.int64, pin_memory=pinned)
    return host.to(device, non_blocking=True)
