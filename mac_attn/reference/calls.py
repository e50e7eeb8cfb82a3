"""Calls for a batch of requests, as users make them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .reuse import HeadStep, ReferenceReuse
from .sample import Choose, draw_sample, first_tau
from .states import KVCache, Scale, attention_state, gather_kv


@dataclass
class Step:
    """What one decode step answers."""

    out: Tensor  # [B, Hq, Dv] or [B, T, Hq, Dv] float64
    lse: Tensor  # without Dv, float64, natural log
    source: Tensor  # as lse, int64, the matched position; -1: a miss, or a token not there
    gain: Tensor  # as lse, by how much the sums of a hit raise errors of their terms
    heads: list[list[HeadStep]]  # [B][Hkv]; of a padding row none


def decode(
    q: Tensor,
    kv_cache: KVCache,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    query_lens: Tensor | None = None,
    reuse: ReferenceReuse | None = None,
    slots: Tensor | None = None,
    q_match: Tensor | None = None,
    request_ids: Tensor | None = None,
    sm_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    kv_layout: str = "NHD",
    k_scale: Scale = None,
    v_scale: Scale = None,
    sinks: Tensor | None = None,
    learn: bool = True,
    exact: bool = False,
    choose: Choose = draw_sample,
) -> Step:
    """One decode step, as `mac_attn.decode`; without `reuse` exact attention.

    q and q_match `[B, Hq, D]` of any float dtype, or of T query tokens `[B, T, Hq, D]`, of which a
    request has `query_lens[b]`: a head hits with all of them or with none, and only the first is
    stored. block_table `[B, max_pages]`, seq_lens, slots and request_ids `[B]`. `choose` draws the
    samples: a backend's may differ where keys are nearly equal, so that who compares one passes a
    function that judges and then answers the backend's.
    Raises ValueError if `reuse` comes without `slots` or `q_match`.
    """
    softmax = (q.shape[-1] ** -0.5 if sm_scale is None else sm_scale, logits_soft_cap)
    single = q.dim() == 3
    q = (q.unsqueeze(1) if single else q).cpu().double()
    values = kv_cache if isinstance(kv_cache, Tensor) else kv_cache[1]
    result = Step(
        out=q.new_zeros(*q.shape[:-1], values.shape[-1]),
        lse=q.new_full(q.shape[:-1], -torch.inf),
        source=torch.full(q.shape[:-1], -1),
        gain=q.new_ones(q.shape[:-1]),
        heads=[[] for _ in range(len(q))],
    )
    active = torch.zeros(q.shape[:2], dtype=torch.bool)
    for b, n in enumerate(seq_lens.tolist()):
        if n == 0:
            continue  # a padding row: the empty state, and its slot stays as it was
        k, v = gather_kv(kv_cache, block_table[b], n, kv_layout, (k_scale, v_scale))
        kv = list(zip(k.unbind(1), v.unbind(1), strict=True))
        tokens = q.shape[1] if query_lens is None else int(query_lens[b])
        first = n - tokens  # the position of the first of them
        row = (b, slice(tokens))
        active[row] = True
        groups = q[row].unflatten(1, (len(kv), -1)).unbind(1)  # [Hkv] of [T, G, D]
        if reuse is None or (slots is not None and slots[b] == -1):
            for t in range(tokens):
                end = first + t + 1
                states = [
                    attention_state(group[t], keys[:end], values[:end], *softmax)
                    for group, (keys, values) in zip(groups, kv, strict=True)
                ]
                result.out[b, t], result.lse[b, t] = map(torch.cat, zip(*states, strict=True))
            continue
        if slots is None or q_match is None:
            raise ValueError("slots and q_match are needed with reuse")
        queries = q_match.cpu().double().reshape(q.shape)[row].unflatten(1, (len(kv), -1)).unbind(1)
        slot = reuse.slots[int(slots[b])]
        starts = not reuse.resume(slot, first, -1 if request_ids is None else int(request_ids[b]))
        result.heads[b] = [
            reuse.step(
                slot.rings[h],
                groups[h],
                queries[h],
                *kv[h],
                softmax,
                (b, h),
                choose,
                miss=exact,
                learn=learn,
                starts=starts,
            )
            for h in range(len(kv))
        ]
        slot.end, slot.reach = first + 1, n
        for name in ("out", "lse", "source", "gain"):
            part = torch.cat([getattr(head, name) for head in result.heads[b]], dim=1)
            getattr(result, name)[row] = part
    if sinks is not None:
        add_sinks(result, sinks.cpu().double(), active)
    if single:
        for name in ("out", "lse", "source", "gain"):
            setattr(result, name, getattr(result, name).squeeze(1))
    return result


def add_sinks(step: Step, sinks: Tensor, active: Tensor) -> None:
    """Add a logit `[Hq]` whose value is 0 to the softmax of the active query tokens."""
    lse = torch.logaddexp(step.lse, sinks)
    share = torch.where(lse == -torch.inf, 0.0, torch.exp(step.lse - lse))
    step.out = torch.where(active[..., None, None], step.out * share[..., None], step.out)
    step.lse = torch.where(active[..., None], lse, step.lse)


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
    k_scale: Scale = None,
    v_scale: Scale = None,
    choose: Choose = draw_sample,
) -> None:
    """Write entries of the last T prompt queries, as `mac_attn.seed`.

    q and q_match `[B, T, Hq, D]` of positions `n - T .. n - 1`; `choose` as in `decode`. Every k-th
    query, k = ceil(T / entries), is a miss in turn, the last one among them. The first is weighed
    against its own log-sum-exp, and tau begins anew.
    """
    softmax = (q.shape[-1] ** -0.5 if sm_scale is None else sm_scale, logits_soft_cap)
    length = q.shape[1]
    every = -(-length // reuse.cfg.entries)
    for b, n in enumerate(seq_lens.tolist()):
        if n == 0:
            continue
        slot = reuse.slots[int(slots[b])]
        ids = -1 if request_ids is None else int(request_ids[b])
        starts = not reuse.resume(slot, n - length, ids)
        slot.end = slot.reach = n
        k, v = gather_kv(kv_cache, block_table[b], n, kv_layout, (k_scale, v_scale))
        rotated, queries = (
            x[b].cpu().double().unflatten(1, (reuse.num_kv_heads, -1)) for x in (q, q_match)
        )
        for h, ring in enumerate(slot.rings):
            chosen = range((length - 1) % every, length, every)
            first = n - length + chosen[0]
            ring.tau, ring.last_lse = first_tau(max(1, reuse.sample_size(first))), None
            ring.missed = 0
            for i in chosen:
                pair = k[: n - length + i + 1, h], v[: n - length + i + 1, h]
                if ring.last_lse is None:
                    _, ring.last_lse = attention_state(rotated[i, h], *pair, *softmax)
                query = rotated[i : i + 1, h], queries[i : i + 1, h]
                begins = i == chosen[0] and (starts or reuse.cfg.anchors > 0)
                reuse.step(ring, *query, *pair, softmax, (b, h), choose, miss=True, starts=begins)
                ring.missed = 0  # all are to draw
