"""Ring entries for queries of a prompt, so that the first decode steps can reuse them.

Each is what a decode step of that position would have left had it missed, made by the same kernels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import ops
from ._checks import check_number, check_tensor, check_type
from .cache import ReuseCache
from .ops import Matched
from .paging import KVCache, Scale, kv_scales, kv_views
from .rope import pre_rope_query


@torch.no_grad()
def seed(
    reuse: ReuseCache,
    q: Tensor,
    kv_cache: KVCache,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    slots: Tensor,
    q_match: Tensor | None = None,
    request_ids: Tensor | None = None,
    sm_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    kv_layout: str = "NHD",
    k_scale: Scale = None,
    v_scale: Scale = None,
) -> None:
    """Write ring entries of the last T prompt tokens of every request, after prefill.

    The prompt's keys and values are in the cache already. If T exceeds the entries of a ring, every
    k-th token has one, k = ceil(T / entries), the last one among them. If a slot ended where the T
    tokens begin, in the same request, its older entries stay; else it starts anew. Each entry costs
    one exact decode step. Statistics do not count them.

    Args:
        reuse: the layer's cache.
        q: [B, T, num_qo_heads, head_dim] post-RoPE queries of positions seq_len - T .. seq_len - 1,
            in the cache's dtype; 1 <= T <= window.
        kv_cache, block_table, seq_lens: as for `mac_attn.decode`; every seq_len is 0 (a padding
            row, whose slot is left alone) or at least T.
        slots: [B] int32, the ring slot of each request, all different.
        q_match: [B, T, num_qo_heads, head_dim] pre-RoPE queries, or None to compute them from `q`
            with the cache's `rotary`.
        request_ids: [B] int64, not negative, or None.
        sm_scale, logits_soft_cap, kv_layout, k_scale, v_scale: as for `mac_attn.decode`.

    Raises:
        ValueError: a shape, layout, device or value (length, page id, slot) does not fit. Nothing
            has been written then. Values on a GPU are not read back, see `ReuseCache.check`.
        TypeError: an argument is no tensor or has another dtype than it must.
    """
    check_type("reuse", reuse, ReuseCache)
    shape = ("batch", "length", reuse.num_qo_heads, reuse.head_dim)
    check_tensor("q", q, shape, reuse.dtype, reuse.device)
    batch, length = q.shape[:2]
    device = q.device
    if not 1 <= length <= reuse.cfg.window:
        raise ValueError(f"q has length {length}, must be from 1 to the window, {reuse.cfg.window}")
    k, v = kv_views(kv_cache, kv_layout)
    ops.check_caches(k, v, reuse)
    check_tensor("k_cache", k, None, (q.dtype, torch.float8_e4m3fn), device)
    scales = kv_scales(k_scale, v_scale, q)
    check_tensor("block_table", block_table, (batch, "max_pages"), torch.int32, device)
    check_tensor("seq_lens", seq_lens, (batch,), torch.int32, device)
    check_tensor("slots", slots, (batch,), torch.int32, device)
    if request_ids is not None:
        check_tensor("request_ids", request_ids, (batch,), torch.int64, device)
    if sm_scale is None:
        sm_scale = 1.0 / math.sqrt(reuse.head_dim)
    check_number("sm_scale", sm_scale)
    check_number("logits_soft_cap", logits_soft_cap, low=0.0)
    positions = seq_lens[:, None] - length + torch.arange(length, device=device)
    q_match = pre_rope_query(q, q_match, positions, reuse.rotary)
    if device.type == "cpu":
        lens, ids = seq_lens.tolist(), None if request_ids is None else request_ids.tolist()
        _check_values(reuse, length, lens, slots.tolist(), ids)
        _check_pages(k, block_table, lens)

    active = seq_lens != 0
    none = seq_lens.new_full((batch, reuse.num_qo_heads), -1)

    def length_at(t: int) -> Tensor:
        return torch.where(active, seq_lens - (length - 1 - t), 0)

    def miss(t: int, stored: Tensor) -> None:
        """What a decode step of the t-th of the T tokens does when all of its heads miss."""
        query, matching, lens = q[:, t], q_match[:, t], length_at(t)
        matched = Matched(none, none, stored)
        amended = ops.amend(
            query,
            (k, v),
            block_table,
            lens,
            matched=matched,
            reuse=reuse,
            slots=slots,
            sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap,
            k_scale=scales[0],
            v_scale=scales[1],
        )
        ops.complete(
            amended,
            lens,
            reuse=reuse,
            matched=matched,
            q=query,
            q_match=matching,
            slots=slots,
            request_ids=request_ids,
            k_cache=k,
            k_scale=scales[0],
            block_table=block_table,
            sm_scale=sm_scale,
        )

    every = -(-length // reuse.cfg.entries)
    chosen = range((length - 1) % every, length, every)
    rows = slots.long().clamp(0, reuse.num_slots - 1)
    counted = reuse.counters.clone()
    # Whether the slot ended where these tokens begin; -1: it did not.
    stored = ops.match(reuse, q_match[:, 0], length_at(0), slots, request_ids).stored
    # On a GPU nobody has looked at the slots but match, which has marked those that are none.
    valid = active & (slots >= 0) & (slots < reuse.num_slots)
    slots = slots.where(valid, -1)
    # A sample is drawn by the log-sum-exp of the step before. That of the first is found first, in
    # a pass that stores nothing: one without history.
    if reuse.cfg.anchors:
        miss(chosen[0], torch.full_like(stored, -1))
        stored = stored.clamp(min=0)
    seeded = reuse._mask(slots.long(), valid)
    for t in chosen:
        miss(t, stored)
        stored = reuse.ring_stored.index_select(0, rows)
        reuse.ring_missed.masked_fill_(seeded[:, None], 0)  # all are to draw
    reuse.counters.copy_(counted)


def _check_values(
    reuse: ReuseCache, length: int, lens: list[int], slots: list[int], ids: list[int] | None
) -> None:
    row_of: dict[int, int] = {}
    for b, (n, slot) in enumerate(zip(lens, slots, strict=True)):
        if n == 0:
            continue
        if n < length:
            raise ValueError(
                f"seq_lens[{b}] is {n}, must be 0 or at least {length}, the length of q"
            )
        if not 0 <= slot < reuse.num_slots:
            raise ValueError(f"slots[{b}] is {slot}, must be from 0 to {reuse.num_slots - 1}")
        if slot in row_of:
            raise ValueError(
                f"slots[{b}] is {slot}, which slots[{row_of[slot]}] has too; "
                "every request needs its own"
            )
        row_of[slot] = b
        if ids is not None and ids[b] < 0:
            raise ValueError(f"request_ids[{b}] is {ids[b]}, must not be negative")


def _check_pages(k: Tensor, block_table: Tensor, lens: list[int]) -> None:
    """Every page in use lies inside the cache."""
    num_pages, page_size = k.shape[:2]
    max_pages = block_table.shape[1]
    for b, n in enumerate(lens):
        if n > max_pages * page_size:
            raise ValueError(
                f"seq_lens[{b}] is {n}, must be at most {max_pages * page_size} "
                "(max_pages * page_size)"
            )
    table = block_table.cpu()
    used = torch.tensor([-(-n // page_size) for n in lens])
    wrong = ((table < 0) | (table >= num_pages)) & (torch.arange(max_pages) < used[:, None])
    for b, i in wrong.nonzero().tolist():
        raise ValueError(
            f"block_table[{b}, {i}] is {int(table[b, i])}, must be from 0 to {num_pages - 1}"
        )
