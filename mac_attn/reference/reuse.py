"""The steps of reuse, for one KV head of one request at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .rings import Entry, Ring, Slot, hit_state, key_spread
from .sample import (
    CANDIDATE_ROOM,
    MOST_TAU,
    Choose,
    Draw,
    Sample,
    counted,
    first_tau,
    next_tau,
    sample_size,
    uniforms,
)
from .states import attention_logits, attention_state, merge_states

if TYPE_CHECKING:
    from mac_attn.config import ReuseConfig


UNKNOWN_VARIANCE = 16.0  # of a query's logits, before the spread of the keys is known


@dataclass
class HeadStep:
    """What a step of T query tokens answers for one KV head, and what its match saw (so that a
    near tie shows)."""

    out: Tensor  # [T, G, Dv] float64
    lse: Tensor  # [T, G] float64, natural log
    source: Tensor  # [T, G] int64, the matched position; -1 is a miss
    gain: Tensor  # [T, G] float64, by how much the sums of a hit raise errors of their terms
    candidates: list[list[int]]  # [T] of positions, the youngest first
    scores: list[Tensor]  # [T] of [G, C]; what hits has the smallest, below 1
    tokens: int = 0  # whose key and value were read, anchors included
    anchors: int = 0  # read by a hit
    stored: bool = False  # whether an entry was
    rest: list[Tensor] = field(default_factory=list)  # [G] shares of a hit's sum its anchors left


class ReferenceReuse:
    """Reuse rings of `num_slots` requests; the counterpart of `mac_attn.ReuseCache`.

    Of `cfg`, a `ReuseConfig`, only the attributes are read. Raises ValueError for head counts that
    do not divide, and for anchors with decisions per head or chains of reuse.
    """

    def __init__(
        self,
        cfg: ReuseConfig,
        *,
        num_slots: int,
        num_qo_heads: int,
        num_kv_heads: int,
        layer: int = 0,
    ) -> None:
        if num_qo_heads % num_kv_heads:
            raise ValueError(
                f"num_qo_heads must be a multiple of {num_kv_heads} KV heads, got {num_qo_heads}"
            )
        if cfg.anchors > 0 and (cfg.granularity == "head" or cfg.max_reuse_depth != 1):
            raise ValueError(f"anchors must be 0 with heads or chains, got {cfg.anchors}")
        self.cfg, self.layer = cfg, layer
        self.num_qo_heads, self.num_kv_heads = num_qo_heads, num_kv_heads
        self.group_size = num_qo_heads // num_kv_heads
        # How many neighbouring query heads decide together: those of a KV head, or each alone.
        self.unit = self.group_size if cfg.granularity == "group" else 1
        self.slots = [self.empty_slot() for _ in range(num_slots)]

    def empty_slot(self) -> Slot:
        """A slot without a history."""
        return Slot([Ring([None] * self.cfg.entries) for _ in range(self.num_kv_heads)])

    def old_end(self, position: int) -> int:
        """E(c): the entry of position c stands for the tokens `[0, E(c))`."""
        return max(0, position + 1 - self.cfg.band)

    def sample_size(self, position: int) -> int:
        """How many old tokens an entry of this position keeps at most."""
        return sample_size(self.cfg.anchors, self.old_end(position))

    def entries(self, slot: int, kv_head: int = 0) -> dict[int, Entry]:
        """What a ring holds by position, the youngest first."""
        return {e.position: e for e in self.slots[slot].rings[kv_head].youngest()}

    def reset(self, slots: Sequence[int] | None = None) -> None:
        """Empty the given slots; None is all of them."""
        for i in range(len(self.slots)) if slots is None else slots:
            self.slots[i] = self.empty_slot()

    def fork(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Copy slot `src[i]` to `dst[i]`, as beam search does."""
        copies = [self.slots[i].copy() for i in src]
        for i, slot in zip(dst, copies, strict=True):
            self.slots[i] = slot

    def truncate(self, slots: Sequence[int], seq_lens: Sequence[int]) -> None:
        """Forget the positions from `seq_lens[i]` on (rejected draft tokens)."""
        for i, n in zip(slots, seq_lens, strict=True):
            slot = self.slots[i]
            slot.end, slot.reach = min(slot.end, int(n)), min(slot.reach, int(n))
            for ring in slot.rings:
                ring.places = [e if e and e.position < int(n) else None for e in ring.places]

    def resume(self, slot: Slot, position: int, request: int) -> bool:
        """History rule: what a slot holds counts only if the new tokens start where it ended.

        Returns whether it does."""
        goes_on = slot.end <= position <= slot.reach and slot.request == request
        if not goes_on:
            slot.rings = self.empty_slot().rings
        slot.request = request
        return goes_on

    def thresholds(self, query: Tensor, kv_head: int, spread: float) -> Tensor:
        """Threshold θ `[G]` on the squared distance, for a pre-RoPE query `[G, D]`.

        It is no more than the distance at which logits are expected to move by `max_drift`; without
        a spread, that of a query whose logits have the variance UNKNOWN_VARIANCE.
        """
        number = torch.as_tensor(self.cfg.threshold, dtype=torch.float64).cpu().flatten()
        number = number.expand(self.num_qo_heads).unflatten(0, (self.num_kv_heads, -1))[kv_head]
        if self.cfg.threshold_mode == "absolute":
            theta = 2.0 * query.shape[1] * (1.0 - number) ** 2
        else:
            theta = number * query.square().sum(-1)
        if self.cfg.max_drift is not None:
            known = torch.full_like(theta, spread)
            unknown = UNKNOWN_VARIANCE / query.square().sum(-1)
            theta = theta.minimum(self.cfg.max_drift / (known if spread > 0 else unknown))
        return torch.where(theta.isfinite(), theta, torch.nan)  # NaN never hits

    def scores(
        self, ring: Ring, query: Tensor, kv_head: int, n: int, tokens: int
    ) -> tuple[list[Entry], Tensor]:
        """Candidates of the query `[G, D]` of position n - 1, the youngest first, and their scores
        `[G, C]`. It is one of so many `tokens` of a step.

        Heads that decide together share a score. An entry too deep for a head scores inf there.
        """
        p = n - 1
        reach = self.cfg.window
        if self.cfg.anchors:  # all that hit must not read more than half of what a miss reads once
            reach = min(reach, n // 2 // tokens - self.cfg.band - self.sample_size(p))
        entries = [e for e in ring.youngest() if p - reach <= e.position < p]
        if not entries or n < self.cfg.min_context:
            return [], query.new_empty(query.shape[0], 0)
        distance = (query - torch.stack([e.query for e in entries])).square().sum(-1)  # [C, G]
        ratio = distance / self.thresholds(
            query, kv_head, ring.spread
        )  # a threshold of 0: inf or NaN, no hit
        shared = ratio.unflatten(1, (-1, self.unit)).mean(-1, keepdim=True)
        scores = shared.expand(-1, -1, self.unit).flatten(1).clone()
        if self.cfg.max_reuse_depth is not None:
            scores[torch.stack([e.depth for e in entries]) >= self.cfg.max_reuse_depth] = torch.inf
        return entries, scores.T

    def match(self, entries: list[Entry], scores: Tensor) -> Entry | None:
        """The entry that a head reuses, by its scores `[C]`: the least, a tie to the youngest."""
        best, best_score = None, 1.0
        for entry, score in zip(entries, scores.tolist(), strict=True):
            if score < best_score:  # NaN fails every comparison, so it never wins
                best, best_score = entry, score
        return best

    def sample(
        self, ring: Ring, logits: Tensor, position: int, where: tuple[int, int], choose: Choose
    ) -> Sample | None:
        """What the miss of a position draws from its old tokens, by their logits `[G, E]`.

        None if there are none, or no log-sum-exp or tau to go by. Steers the ring's tau.
        """
        tau, lse = ring.tau, ring.last_lse
        if not 0 < tau <= MOST_TAU or logits.shape[1] == 0:
            return None
        if lse is None or not lse.isfinite().all():
            return None
        sample = choose(self.draw(logits, lse, tau, position, where))
        ring.tau = next_tau(tau, sample.count, self.sample_size(position))
        return sample

    def draw(
        self, logits: Tensor, lse: Tensor, tau: float, position: int, where: tuple[int, int]
    ) -> Draw:
        """A draw from tokens with logits `[G, E]`, weighed against log-sum-exps `[G]`."""
        weights = torch.exp(logits - lse[:, None]).amax(0)
        keys = weights / uniforms(position, where[1], self.layer, logits.shape[1])
        return Draw(*where, position, weights, keys, tau, self.sample_size(position))

    def step(
        self,
        ring: Ring,
        q: Tensor,
        query: Tensor,
        k: Tensor,
        v: Tensor,
        softmax: tuple[float, float],
        where: tuple[int, int],
        choose: Choose,
        miss: bool = False,
        learn: bool = True,
        starts: bool = False,
    ) -> HeadStep:
        """Match, amend and complete the newest T tokens of one request, for one KV head.

        q and the pre-RoPE query `[T, G, D]`, k `[n, D]`, v `[n, Dv]`, softmax `(sm_scale,
        logits_soft_cap)`, `where` the row of the batch and the KV head; with `miss` nothing is
        matched, without `learn` nothing stored. Of the first token an entry is. How far the keys
        spread is measured after a slot `starts` and at each power of two of n.
        """
        tokens, group = q.shape[:2]
        p = len(k) - tokens  # the first token's position
        old, ends = self.old_end(p), range(p + 1, len(k) + 1)
        seen = [
            self.scores(ring, query[t], where[1], 0 if miss else n, tokens)
            for t, n in enumerate(ends)
        ]
        matched = self.match_all(seen)
        result = HeadStep(
            out=q.new_empty(tokens, group, v.shape[1]),
            lse=q.new_empty(tokens, group),
            source=torch.full((tokens, group), -1),
            gain=q.new_ones(tokens, group),
            candidates=[[e.position for e in entries] for entries, _ in seen],
            scores=[scores for _, scores in seen],
        )
        carried = [
            self.answer(result, t, matched[t], q[t], k[:n], v[:n], old, softmax)
            for t, n in enumerate(ends)
        ]
        if not (result.source >= 0).all():
            result.tokens = len(k)  # all that miss read the same

        entry = Entry(p, query[0], q[0], *carried[0])
        limit = self.cfg.max_reuse_depth
        result.stored = old > 0 and (limit is None or bool((entry.depth < limit).any()))
        if self.cfg.anchors:
            if (result.source < 0).all():
                logits = attention_logits(q[0], k[:old], *softmax)
                sample = self.sample(ring, logits, p, where, choose) if ring.draws() else None
                if sample is None or sample.count > CANDIDATE_ROOM * self.sample_size(p):
                    result.stored = False
                else:
                    entry = replace(
                        entry,
                        anchors=sample.anchors,
                        weights=sample.weights,
                        counts=counted(sample.weights, self.sample_size(p), old),
                    )
            if not 0 < ring.tau <= MOST_TAU:
                ring.tau = first_tau(self.sample_size(p))
        result.stored = result.stored and learn
        if result.stored:
            ring.store(entry)
        ring.last_lse = result.lse[0]
        ring.missed = 0 if (result.source >= 0).any() else ring.missed + 1
        if starts or p.bit_length() < len(k).bit_length():
            ring.spread = softmax[0] ** 2 * key_spread(k)
        return result

    def match_all(self, seen: list[tuple[list[Entry], Tensor]]) -> list[list[Entry | None]]:
        """What the heads that decide together reuse, of every token `[T][G / unit]`, by what each
        token has `seen`: its candidates and their scores. They hit with all tokens or with none."""
        found = [
            [self.match(entries, row) for row in scores[:: self.unit]] for entries, scores in seen
        ]
        hits = [all(tokens) for tokens in zip(*found, strict=True)]
        return [[e if hit else None for e, hit in zip(row, hits, strict=True)] for row in found]

    def answer(
        self,
        result: HeadStep,
        t: int,
        matched: list[Entry | None],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        old: int,
        softmax: tuple[float, float],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Amend and complete the t-th token, whose heads reuse these entries or none.

        q `[G, D]`, k `[n, D]` and v `[n, Dv]` of what it sees, `old` tokens the first token's entry
        stands for. Returns the state over those, o `[G, Dv]` and lse `[G]`, and its depth `[G]`.
        """
        n = len(k)
        carried, carried_lse = q.new_empty(len(q), v.shape[1]), q.new_empty(len(q))
        depth = torch.zeros(len(q), dtype=torch.int64)
        read = 0
        for i, entry in enumerate(matched):
            heads = slice(i * self.unit, (i + 1) * self.unit)
            fresh, counts, start = torch.arange(old, n), None, 0
            if entry is None:
                state = attention_state(q[heads], k[:old], v[:old], *softmax)
            else:
                start = self.old_end(entry.position)
                result.source[t, heads] = entry.position
                depth[heads] = entry.depth[heads] + 1
                if self.cfg.anchors:
                    fresh = torch.cat([entry.anchors, torch.arange(start, n)])
                    counts = torch.cat([entry.counts, torch.ones(n - start).double()])
                    result.anchors += len(entry.anchors)
                else:
                    middle = attention_state(q[heads], k[start:old], v[start:old], *softmax)
                    state = merge_states(entry.out[heads], entry.lse[heads], *middle)
            recent = attention_state(q[heads], k[fresh], v[fresh], *softmax, counts=counts)
            if entry is not None and self.cfg.anchors:
                out, lse, rest, gain = hit_state(entry, recent, q, k, v, softmax)
                result.gain[t, heads] = gain
                result.rest.append(rest)
            else:
                carried[heads], carried_lse[heads] = state
                out, lse = merge_states(*state, *recent)
            result.out[t, heads], result.lse[t, heads] = out, lse
            read = max(read, n - start + (len(entry.anchors) if entry is not None else 0))
        result.tokens += read
        return carried, carried_lse, depth
