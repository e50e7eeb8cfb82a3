"""What a slot holds: a ring of entries for each KV head."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .states import State, attention_logits, attention_state

# Nothing counts as left of an entry if both what its anchors leave of its sum and what they stand
# for is less than this share of it,
LEAST_REST = 1 / 1024
# or if it would leave less than this of the sum of what is attended anew.
LEAST_OF_FRESH = 1 / 4

SPREAD_KEYS = 512  # by which their spread is measured, evenly over the tokens


@dataclass(frozen=True)
class Entry:
    """Ring entry of one position c of a KV head: the state of q_c over `[0, E(c))`."""

    position: int
    query: Tensor  # [G, D] float64, pre-RoPE
    rotated: Tensor  # [G, D] float64, post-RoPE
    out: Tensor  # [G, Dv] float64
    lse: Tensor  # [G] float64
    depth: Tensor  # [G] int64, 0 for a miss, else the source's depth + 1
    anchors: Tensor = torch.empty(0, dtype=torch.int64)  # [<= S] positions, all < E(c)
    weights: Tensor = torch.empty(0, dtype=torch.float64)  # [<= S]: a
    counts: Tensor = torch.empty(0, dtype=torch.float64)  # [<= S]: 1 + b, see `sample.counted`


@dataclass
class Ring:
    """What a slot holds for one KV head."""

    places: list[Entry | None]  # M of them
    stored: int = 0  # entries since the history began, kept below 2 M
    tau: float = 0.0  # 0: none yet
    last_lse: Tensor | None = None  # [G] float64, of the last step
    spread: float = 0.0  # variance of a logit for a query of unit length; 0: not known
    missed: int = 0  # steps in a row without a hit, see `draws`

    def draws(self) -> bool:
        """Whether a miss draws a sample: up to 32 steps without a hit, then in every eighth."""
        return self.missed <= 32 or self.missed % 8 == 0

    def youngest(self) -> list[Entry]:
        """Entries of this history that are still there, the youngest first."""
        size = len(self.places)
        ages = range(min(self.stored, size))
        found = [self.places[(self.stored - 1 - age) % size] for age in ages]
        return [entry for entry in found if entry is not None]

    def store(self, entry: Entry) -> None:
        """Write an entry to the next place, over the oldest."""
        size = len(self.places)
        self.places[self.stored % size] = entry
        self.stored += 1
        self.stored -= size if self.stored >= 2 * size else 0


@dataclass
class Slot:
    """History of one request, under the id `request`; it may go on from `end` to `reach`."""

    rings: list[Ring]
    end: int = 0
    reach: int = 0
    request: int = -1

    def copy(self) -> Slot:
        """A slot that goes on independently."""
        rings = [replace(ring, places=list(ring.places)) for ring in self.rings]
        return replace(self, rings=rings)


def key_spread(k: Tensor) -> float:
    """Variance of the keys `[n, D]` of a KV head, mean over their dimensions; 0, which is not
    known, if there are too few."""
    n = len(k)
    if n < SPREAD_KEYS:
        return 0.0
    return float(k[torch.arange(SPREAD_KEYS) * n // SPREAD_KEYS].var(0, correction=0).mean())


def hit_state(
    entry: Entry, recent: State, q: Tensor, k: Tensor, v: Tensor, softmax: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output of q `[G, D]` on a hit with anchors A, from the state of all that it attends to.

    Every anchor leaves the entry's state `counts` times, for itself and for the others that it
    answers for, as it has joined `recent`. The mean of what is left stays, and its sum grows by
    rho, the quotient of `sum_A a exp(s)` for q and for the entry's query. Sums are signed: now and
    then anchors leave with more than there was. k `[n, D]`, v `[n, Dv]`. Returns o `[G, Dv]`, lse
    `[G]`, what is left of the entry's sum, as a share of it `[G]`, and by how much the signed sums
    raise errors of their terms `[G]`.
    """
    k, v = k[entry.anchors], v[entry.anchors]
    lifted = [attention_logits(x, k, *softmax) + entry.weights.log() for x in (q, entry.rotated)]
    now, then = (x.logsumexp(-1) for x in lifted)
    log_ratio = torch.where(then == -torch.inf, 0.0, now - then)
    replaced, replaced_lse = attention_state(entry.rotated, k, v, *softmax, counts=entry.counts)
    out, lse = recent
    taken = torch.exp(replaced_lse - entry.lse)
    high = torch.maximum(entry.lse + log_ratio, lse)
    old, fresh = torch.exp(entry.lse + log_ratio - high), torch.exp(lse - high)
    total = old * (1 - taken) + fresh
    little = ((1 - taken).abs() < LEAST_REST) & (torch.exp(then - entry.lse) < LEAST_REST)
    nothing = (entry.lse == -torch.inf) | little | (total < LEAST_OF_FRESH * fresh)
    sums = old[:, None] * (entry.out - taken[:, None] * replaced) + fresh[:, None] * out
    out = torch.where(nothing[:, None], out, sums / total[:, None])
    gain = torch.where(nothing, 1.0, (old * (1 + taken) + fresh) / total)
    return out, torch.where(nothing, lse, high + total.log()), 1 - taken, gain
