"""The mathematics of MAC-Attention in plain float64 PyTorch: the judge of every backend.

Slow and readable on purpose. It shares no code with the kernels or with the rest of the package, so
that an error in them cannot hide here. Paper: MAC-Attention, arXiv:2604.00235 (match, amend,
complete); the anchors and the decisions per group are this project's own.

An attention state over a set of tokens is `(o, lse)`: the softmax-weighted mean of their values and
the natural log of the sum of `exp(logit)`; the empty set is `(0, -inf)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mac_attn.config import ReuseConfig

State = tuple[Tensor, Tensor]
KVCache = Tensor | tuple[Tensor, Tensor]


def attention_logits(q: Tensor, k: Tensor, sm_scale: float, logits_soft_cap: float) -> Tensor:
    """Logits `[G, n]` of queries `[G, D]` over the keys `[n, D]` of their KV head."""
    logits = sm_scale * (q @ k.T)
    return logits_soft_cap * torch.tanh(logits / logits_soft_cap) if logits_soft_cap else logits


def attention_state(
    q: Tensor, k: Tensor, v: Tensor, sm_scale: float, logits_soft_cap: float = 0.0
) -> State:
    """Attention state of queries that share a KV head, over a set of n >= 0 tokens.

    q `[G, D]`, k and v `[n, D]`, float64. `logits_soft_cap` 0 is off; else a logit becomes
    `cap * tanh(logit / cap)` (Gemma 2). Returns o `[G, D]` and lse `[G]` (natural log).
    """
    logits = attention_logits(q, k, sm_scale, logits_soft_cap)
    lse = torch.logsumexp(logits, dim=-1)
    return torch.exp(logits - lse[:, None]) @ v, lse


def merge_states(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> State:
    """State of the union of two disjoint sets of tokens; o `[..., D]`, lse `[...]`.

    Commutative and associative, with the empty state `(0, -inf)` as neutral element.
    """
    lse = torch.logaddexp(lse1, lse2)
    # An empty operand weighs nothing; exp(lse1 - lse) would be NaN where both are empty.
    w1 = torch.where(lse1 == -torch.inf, 0.0, torch.exp(lse1 - lse))
    w2 = torch.where(lse2 == -torch.inf, 0.0, torch.exp(lse2 - lse))
    return o1 * w1[..., None] + o2 * w2[..., None], lse


def gather_kv(
    kv_cache: KVCache, block_table_row: Tensor, n: int, kv_layout: str = "NHD"
) -> tuple[Tensor, Tensor]:
    """The first n tokens of one request: k and v `[n, num_kv_heads, D]`, float64.

    `kv_cache` is a pair of `[num_pages, page_size, num_kv_heads, D]` (NHD) or `[num_pages,
    num_kv_heads, page_size, D]` (HND), or one tensor with the pair in dimension 1. Only the first
    `ceil(n / page_size)` ids of `block_table_row` are looked at.
    """
    pair = kv_cache.unbind(1) if isinstance(kv_cache, Tensor) else kv_cache
    tokens = []
    for pages in pair:
        pages = pages.transpose(1, 2) if kv_layout == "HND" else pages
        ids = block_table_row[: -(-n // pages.shape[1])].long()
        tokens.append(pages[ids].flatten(0, 1)[:n].cpu().double())
    return tokens[0], tokens[1]


def anchor_weights(q: Tensor, k: Tensor, sm_scale: float, logits_soft_cap: float = 0.0) -> Tensor:
    """Weight `[n]` by which anchors are chosen: the largest softmax weight over the queries.

    q `[G, D]` (of one KV head), k `[n, D]` (the whole context), float64.
    """
    return torch.softmax(attention_logits(q, k, sm_scale, logits_soft_cap), dim=-1).amax(dim=0)


@dataclass
class Entry:
    """Ring entry of one position c. The carried state is that over `[0, E(c))` without anchors."""

    position: int
    query: Tensor  # [Hq, D] float64, pre-RoPE
    out: Tensor  # [Hq, D] float64, carried o
    lse: Tensor  # [Hq] float64, carried lse
    depth: Tensor  # [Hq] int64, 0 for a miss, else the source's depth + 1
    anchors: list[Tensor]  # per KV head int64 [<= S] positions, all < E(c)


@dataclass
class Slot:
    """History of one ring: its entries are those of the positions `[begin, end)`."""

    begin: int = 0
    end: int = 0
    request: int = -1
    ring: dict[int, Entry] = field(default_factory=dict)  # by position % window


@dataclass
class Step:
    """What one decode step answers, and what its match saw (so that a near tie can be told)."""

    out: Tensor  # [B, Hq, D] float64
    lse: Tensor  # [B, Hq] float64, natural log
    source: Tensor  # [B, Hq] int64, the matched position; -1 is a miss
    candidates: list[list[int]]  # per request: positions, ascending
    scores: list[Tensor]  # per request: [Hq, len(candidates)]; a hit has the smallest, below 1


class ReferenceReuse:
    """Reuse rings of `num_slots` requests; the counterpart of `mac_attn.ReuseCache`.

    Of `cfg`, a `ReuseConfig`, only the attributes are read. Raises ValueError for head counts that
    do not divide, and for anchors with decisions per head.
    """

    def __init__(
        self, cfg: ReuseConfig, *, num_slots: int, num_qo_heads: int, num_kv_heads: int
    ) -> None:
        if num_qo_heads % num_kv_heads:
            raise ValueError(
                f"num_qo_heads must be a multiple of {num_kv_heads} KV heads, got {num_qo_heads}"
            )
        if cfg.granularity == "head" and cfg.anchors > 0:
            raise ValueError(f"anchors must be 0 with granularity='head', got {cfg.anchors}")
        self.cfg = cfg
        self.num_qo_heads = num_qo_heads
        self.num_kv_heads = num_kv_heads
        self.group_size = num_qo_heads // num_kv_heads
        # How many neighbouring query heads decide together: those of a KV head, or each alone.
        self.unit = self.group_size if cfg.granularity == "group" else 1
        self.slots = [Slot() for _ in range(num_slots)]

    def old_end(self, position: int) -> int:
        """E(c): the entry of position c stands for the tokens `[0, E(c))`."""
        return max(0, position + 1 - self.cfg.band)

    def entries(self, slot: int) -> dict[int, Entry]:
        """Contents of a slot's ring by position, ascending."""
        return {e.position: e for e in sorted(self.slots[slot].ring.values(), key=_position)}

    def reset(self, slots: Sequence[int] | None = None) -> None:
        """Empty the given slots; None is all of them."""
        for i in range(len(self.slots)) if slots is None else slots:
            self.slots[i] = Slot()

    def fork(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Copy slot `src[i]` to `dst[i]`, as beam search does."""
        copies = [replace(self.slots[i], ring=dict(self.slots[i].ring)) for i in src]
        for i, slot in zip(dst, copies, strict=True):
            self.slots[i] = slot

    def truncate(self, slots: Sequence[int], seq_lens: Sequence[int]) -> None:
        """Forget the positions from `seq_lens[i]` on (rejected draft tokens)."""
        for i, n in zip(slots, seq_lens, strict=True):
            slot = self.slots[i]
            slot.end = min(slot.end, int(n))
            slot.begin = min(slot.begin, slot.end)
            slot.ring = {key: e for key, e in slot.ring.items() if e.position < slot.end}

    def resume(self, slot: Slot, position: int, request: int) -> None:
        """History rule: what a slot holds counts only if the new tokens start where it ended."""
        if slot.end != position or slot.request != request:
            slot.begin, slot.ring = position, {}
        slot.request = request

    def store(self, slot: Slot, entry: Entry) -> None:
        """Write an entry, over the one of `window` positions before."""
        slot.ring[entry.position % self.cfg.window] = entry
        slot.end = entry.position + 1

    def thresholds(self, query: Tensor) -> Tensor:
        """Threshold θ `[Hq]` on the squared distance, for a pre-RoPE query `[Hq, D]`."""
        number = torch.as_tensor(self.cfg.threshold, dtype=torch.float64).cpu().flatten()
        number = number.expand(self.num_qo_heads)
        if self.cfg.threshold_mode == "absolute":
            theta = 2.0 * query.shape[1] * (1.0 - number) ** 2
        else:
            theta = number * query.square().sum(-1)
        return torch.where(theta.isfinite(), theta, torch.nan)  # NaN never hits

    def scores(self, slot: Slot, query: Tensor, position: int) -> tuple[list[Entry], Tensor]:
        """Candidates of a query `[Hq, D]`, oldest first, and their scores `[Hq, C]`.

        Heads that decide together share a score. An entry too deep for a head scores inf there.
        """
        entries = [
            e
            for e in sorted(slot.ring.values(), key=_position)
            if max(0, position - self.cfg.window) <= e.position < position
            and self.old_end(e.position) > 0
        ]
        if not entries:
            return [], query.new_empty(query.shape[0], 0)
        distance = (query - torch.stack([e.query for e in entries])).square().sum(-1)  # [C, Hq]
        ratio = distance / self.thresholds(query)  # a threshold of 0 gives inf or NaN: no hit
        shared = ratio.unflatten(1, (-1, self.unit)).mean(-1, keepdim=True)
        scores = shared.expand(-1, -1, self.unit).flatten(1).clone()
        if self.cfg.max_reuse_depth is not None:
            scores[torch.stack([e.depth for e in entries]) >= self.cfg.max_reuse_depth] = torch.inf
        return entries, scores.T

    def match(self, entries: list[Entry], scores: Tensor, n: int) -> Entry | None:
        """The entry that a head reuses, by its scores `[C]`: the smallest, a tie to the newest."""
        best, best_score = None, 1.0
        for entry, score in zip(entries, scores.tolist(), strict=True):
            # NaN fails every comparison, so it never wins.
            if score < 1.0 and score <= best_score and n >= self.cfg.min_context:
                best, best_score = entry, score
        return best

    def step(
        self,
        index: int,
        request: int,
        q: Tensor,
        query: Tensor,
        k: Tensor,
        v: Tensor,
        softmax: tuple[float, float],
        forced_anchors: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, list[int], Tensor]:
        """Match, amend and complete the newest token of one request in slot `index`.

        q and the pre-RoPE query `[Hq, D]`, k and v `[n, Hkv, D]`, softmax `(sm_scale,
        logits_soft_cap)`. Returns one row of each field of `Step`.
        """
        n = k.shape[0]
        p, old = n - 1, self.old_end(n - 1)
        slot = self.slots[index]
        self.resume(slot, p, request)
        entries, scores = self.scores(slot, query, p)
        new = Entry(
            position=p,
            query=query,
            out=torch.zeros_like(q),
            lse=q.new_full((self.num_qo_heads,), -torch.inf),
            depth=torch.zeros(self.num_qo_heads, dtype=torch.int64),
            anchors=[torch.empty(0, dtype=torch.int64)] * self.num_kv_heads,
        )
        out, lse = torch.empty_like(q), q.new_empty(self.num_qo_heads)
        source = torch.full((self.num_qo_heads,), -1)
        for first in range(0, self.num_qo_heads, self.unit):
            heads, kv_head = slice(first, first + self.unit), first // self.group_size
            q_u, k_u, v_u = q[heads], k[:, kv_head], v[:, kv_head]
            matched = self.match(entries, scores[first], n)
            if matched is None:
                reused = new.out[heads], new.lse[heads]  # the empty state
                start = 0
                if forced_anchors is None:
                    anchors = _top(anchor_weights(q_u, k_u, *softmax)[:old], self.cfg.anchors)
                else:
                    anchors = _checked_anchors(forced_anchors[kv_head], old)
            else:
                reused = matched.out[heads], matched.lse[heads]
                start, anchors = self.old_end(matched.position), matched.anchors[kv_head]
                source[heads] = matched.position
                new.depth[heads] = matched.depth[heads] + 1
            middle = _tokens(start, old, without=anchors)
            carried = merge_states(
                *reused, *attention_state(q_u, k_u[middle], v_u[middle], *softmax)
            )
            at_anchors = attention_state(q_u, k_u[anchors], v_u[anchors], *softmax)
            recent = attention_state(q_u, k_u[old:], v_u[old:], *softmax)
            out[heads], lse[heads] = merge_states(*merge_states(*carried, *at_anchors), *recent)
            new.out[heads], new.lse[heads] = carried
            new.anchors[kv_head] = anchors
        self.store(slot, new)
        return out, lse, source, [e.position for e in entries], scores


def decode(
    q: Tensor,
    kv_cache: KVCache,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    reuse: ReferenceReuse | None = None,
    slots: Tensor | None = None,
    q_match: Tensor | None = None,
    request_ids: Tensor | None = None,
    sm_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    kv_layout: str = "NHD",
    anchors: Tensor | None = None,
) -> Step:
    """One decode step, as `mac_attn.decode`; without `reuse` exact attention.

    q and q_match `[B, Hq, D]` of any float dtype, block_table `[B, max_pages]`, seq_lens, slots and
    request_ids `[B]`. `anchors` `[B, Hkv, S]` (-1 is unused) are the tokens that a miss sets aside,
    given because backends may choose differently; None is the exact top S. Raises ValueError if
    `reuse` comes without `slots` or `q_match`, or if given anchors break their invariant.
    """
    softmax = (q.shape[-1] ** -0.5 if sm_scale is None else sm_scale, logits_soft_cap)
    batch, num_qo_heads, _ = q.shape
    q = q.cpu().double()
    result = Step(
        out=torch.zeros_like(q),
        lse=q.new_full((batch, num_qo_heads), -torch.inf),
        source=torch.full((batch, num_qo_heads), -1),
        candidates=[[] for _ in range(batch)],
        scores=[q.new_empty(num_qo_heads, 0) for _ in range(batch)],
    )
    for b, n in enumerate(seq_lens.tolist()):
        if n == 0:
            continue  # a padding row: the empty state, and its slot stays as it was
        k, v = gather_kv(kv_cache, block_table[b], n, kv_layout)
        if reuse is None or (slots is not None and slots[b] == -1):
            everything = [torch.arange(n)] * k.shape[1]
            result.out[b], result.lse[b] = _states(q[b], k, v, everything, softmax)
            continue
        if slots is None or q_match is None:
            raise ValueError("slots and q_match are needed with reuse")
        request = -1 if request_ids is None else int(request_ids[b])
        forced = None if anchors is None else anchors[b].cpu().long()
        query = q_match[b].cpu().double()
        row = reuse.step(int(slots[b]), request, q[b], query, k, v, softmax, forced)
        result.out[b], result.lse[b], result.source[b] = row[:3]
        result.candidates[b], result.scores[b] = row[3:]
    return result


def seed(
    reuse: ReferenceReuse,
    q: Tensor,
    kv_cache: KVCache,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    slots: Tensor,
    q_match: Tensor,
    request_ids: Tensor | None = None,
    sm_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    kv_layout: str = "NHD",
    anchors: Tensor | None = None,
) -> None:
    """Write the entries of the last T <= window prompt queries, as `mac_attn.seed`.

    q and q_match `[B, T, Hq, D]` of positions `n - T .. n - 1`; `anchors` `[B, Hkv, S]` as in
    `decode`. Each KV head has one set of anchors, the heaviest of `[0, E(n - 1))` for its last 32
    queries, of which an entry keeps those below its own E(c).
    """
    softmax = (q.shape[-1] ** -0.5 if sm_scale is None else sm_scale, logits_soft_cap)
    length = q.shape[1]
    q, q_match = q.cpu().double(), q_match.cpu().double()
    for b, n in enumerate(seq_lens.tolist()):
        if n == 0:
            continue
        k, v = gather_kv(kv_cache, block_table[b], n, kv_layout)
        slot = reuse.slots[int(slots[b])]
        reuse.resume(slot, n - length, -1 if request_ids is None else int(request_ids[b]))
        groups = q[b].unflatten(1, (reuse.num_kv_heads, reuse.group_size))  # [T, Hkv, G, D]
        chosen = []
        for head in range(reuse.num_kv_heads):
            if anchors is not None:
                chosen.append(_checked_anchors(anchors[b, head].cpu().long(), reuse.old_end(n - 1)))
                continue
            weights = q.new_zeros(n)
            for i in range(max(0, length - 32), length):
                seen = n - length + i + 1  # causal: the query of position c sees [0, c + 1)
                new_weights = anchor_weights(groups[i, head], k[:seen, head], *softmax)
                weights[:seen] = torch.maximum(weights[:seen], new_weights)
            chosen.append(_top(weights[: reuse.old_end(n - 1)], reuse.cfg.anchors))
        for i in range(length):
            c = n - length + i
            end = reuse.old_end(c)
            kept = [positions[positions < end] for positions in chosen]
            tokens = [_tokens(0, end, without=positions) for positions in kept]
            out, lse = _states(q[b, i], k, v, tokens, softmax)
            depth = torch.zeros(reuse.num_qo_heads, dtype=torch.int64)
            reuse.store(slot, Entry(c, q_match[b, i], out, lse, depth, kept))


def _position(entry: Entry) -> int:
    return entry.position


def _states(
    q: Tensor, k: Tensor, v: Tensor, tokens: list[Tensor], softmax: tuple[float, float]
) -> State:
    """States of all heads, q `[Hq, D]`, over a set of token positions for each KV head."""
    states = [
        attention_state(q_group, k[positions, head], v[positions, head], *softmax)
        for head, (q_group, positions) in enumerate(zip(q.chunk(k.shape[1]), tokens, strict=True))
    ]
    return torch.cat([o for o, _ in states]), torch.cat([lse for _, lse in states])


def _tokens(start: int, end: int, *, without: Tensor) -> Tensor:
    """Positions of `[start, end)` that are not in `without`, ascending."""
    keep = torch.zeros(end, dtype=torch.bool)
    keep[start:] = True
    keep[without] = False
    return keep.nonzero().flatten()


def _top(weights: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest weights, or of all if there are fewer."""
    return weights.topk(min(count, weights.numel())).indices


def _checked_anchors(row: Tensor, end: int) -> Tensor:
    """Given anchors `[S]` without their -1 padding; they must be distinct and below `end`."""
    positions = row[row >= 0]
    if positions.unique().numel() != positions.numel() or bool((positions >= end).any()):
        raise ValueError(f"anchors must be distinct positions below {end}, got {row.tolist()}")
    return positions
