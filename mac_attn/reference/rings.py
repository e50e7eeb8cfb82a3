"""What a slot holds: a ring of entries for each KV head."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .states import attention_logits, attention_state

LEAST_REST = 1 / 1024  # share of an entry's sum below which nothing counts as left of it


@dataclass(frozen=True)
class Entry:
    """Ring entry of one position c of a KV head: the state of q_c over `[0, E(c))`."""

    position: int
    query: Tensor  # [G, D] float64, pre-RoPE
    rotated: Tensor  # [G, D] float64, post-RoPE
    out: Tensor  # [G, D] float64
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
    """History of one request: the tokens before `end`, under the id `request`."""

    rings: list[Ring]
    end: int = 0
    request: int = -1

    def copy(self) -> Slot:
        """A slot that goes on independently."""
        rings = [replace(ring, places=list(ring.places)) for ring in self.rings]
        return replace(self, rings=rings)


def rest_state(
    entry: Entry, q: Tensor, k: Tensor, v: Tensor, softmax: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """What an entry's state is without its anchors A, moved from its query to q `[G, D]`.

    Every anchor leaves it `counts` times, for itself and for the others that it answers for. The mean
    of what is left stays, and its sum grows by rho, the quotient of `sum_A a exp(s)` for q and for
    the entry's query. k and v `[n, D]`. Returns o `[G, D]`, lse `[G]` and the share of the entry's
    sum that is left `[G]`.
    """
    k, v = k[entry.anchors], v[entry.anchors]
    lifted = [attention_logits(x, k, *softmax) + entry.weights.log() for x in (q, entry.rotated)]
    now, then = (x.logsumexp(-1) for x in lifted)
    log_ratio = torch.where(then == -torch.inf, 0.0, now - then)
    replaced, replaced_lse = attention_state(entry.rotated, k, v, *softmax, counts=entry.counts)
    taken = torch.exp(replaced_lse - entry.lse)
    share = 1 - taken
    empty = (entry.lse == -torch.inf) | (share < LEAST_REST)
    out = torch.where(empty[:, None], 0.0, (entry.out - taken[:, None] * replaced) / share[:, None])
    lse = torch.where(empty, -torch.inf, entry.lse + share.log() + log_ratio)
    return out, lse, share
