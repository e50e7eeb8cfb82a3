"""Ring entries for the last queries of a prompt, so that the first decode steps can reuse them.

The state of an entry is ordinary attention of its query over the keys `[0, E(c))`, where
E(c) = max(0, c + 1 - band): causal attention, bottom-right aligned, over the KV cut at n - band. It
is computed here in plain PyTorch, in float32, chunk by chunk of the keys with a running softmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import check_number, check_tensor, check_type
from .cache import NO_POSITION, NO_REQUEST, ReuseCache
from .paging import KVCache, kv_views
from .rope import pre_rope_query

# Keys per step of the running softmax: 512 queries of 32 heads then take 64 MiB of logits.
_CHUNK = 1024
# As many of the last queries vote for the anchors; those before them are farther from decoding.
_VOTERS = 32


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
) -> None:
    """Write the ring entries of the last T prompt tokens of every request, after prefill.

    The prompt's keys and values are in the cache already. With anchors, every KV head has one set
    of them, the heaviest tokens for its last 32 queries, of which an entry keeps those it is old
    enough for. If a slot ended where the T tokens begin, in the same request, its older entries
    stay; else it starts anew. Reads lengths, pages and slots back to the host.

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
        sm_scale, logits_soft_cap, kv_layout: as for `mac_attn.decode`.

    Raises:
        ValueError: a shape, layout, device or value (length, page id, slot) does not fit. Nothing
            has been written then.
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
    kv_shape = ("num_pages", "page_size", reuse.num_kv_heads, reuse.head_dim)
    check_tensor("k_cache", k, kv_shape, q.dtype, device)
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

    lens, rows = seq_lens.tolist(), slots.tolist()
    ids = [NO_REQUEST] * batch if request_ids is None else request_ids.tolist()
    _check_values(reuse, length, lens, rows, None if request_ids is None else ids)
    _check_pages(k, block_table, lens)
    with torch.autocast(device.type, enabled=False):  # all of it is float32
        for b, n in enumerate(lens):
            if n > 0:
                context = _Context(k, v, block_table[b].long(), sm_scale, logits_soft_cap)
                _seed_request(reuse, rows[b], ids[b], n, q[b], q_match[b], context)


@dataclass
class _Context:
    """The keys and values of one request and how logits come from them."""

    k: Tensor  # [num_pages, page_size, H, D]
    v: Tensor
    pages: Tensor  # [max_pages] int64
    sm_scale: float
    logits_soft_cap: float

    def chunks(self, end: int) -> Iterator[Tensor]:
        """Token positions `[0, end)`, int64, chunk by chunk."""
        for first in range(0, end, _CHUNK):
            yield torch.arange(first, min(end, first + _CHUNK), device=self.pages.device)

    def gather(self, cache: Tensor, tokens: Tensor) -> Tensor:
        """Rows of the cache at these positions, float32 `[H, tokens, D]`."""
        page_size = cache.shape[1]
        rows = cache[self.pages[tokens // page_size], tokens % page_size]
        return rows.float().transpose(0, 1)

    def logits(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Logits `[H, rows, tokens]` of float32 queries `[H, rows, D]`.

        In float32, since 16-bit logits would lose more digits than reuse may.
        """
        logits = (queries * self.sm_scale) @ self.gather(self.k, tokens).transpose(1, 2)
        cap = self.logits_soft_cap
        return logits if cap == 0 else logits.div_(cap).tanh_().mul_(cap)


def _seed_request(
    reuse: ReuseCache,
    slot: int,
    request: int,
    n: int,
    q: Tensor,
    q_match: Tensor,
    context: _Context,
) -> None:
    """Compute and store the entries of the last T tokens of one request; q `[T, Hq, D]`."""
    length, band = len(q), reuse.cfg.band
    heads = (reuse.num_kv_heads, reuse.group_size)
    positions = torch.arange(n - length, n, device=q.device)  # c
    ends = (positions + 1 - band).clamp(min=0)  # E(c)
    last_end = max(0, n - band)

    grouped = q.unflatten(1, heads).permute(1, 0, 2, 3)  # [H, T, G, D]
    queries = grouped.flatten(1, 2).float()  # [H, T * G, D]: a KV head's queries share its keys
    row_ends = ends.repeat_interleave(reuse.group_size)  # [T * G]
    anchors = _choose_anchors(reuse, grouped, n, last_end, context)  # [H, <= S], ascending
    out, lse = _states(queries, row_ends, last_end, anchors, context)

    at = positions % reuse.cfg.window
    # Ascending, so that those an entry keeps come first.
    kept = torch.where(anchors[:, None] < ends[:, None], anchors[:, None], NO_POSITION)
    unused = reuse.cfg.anchors - anchors.shape[1]
    kept = torch.nn.functional.pad(kept, (0, unused), value=NO_POSITION)
    reuse.ring_query[slot].index_copy_(1, at, q_match.unflatten(1, heads).transpose(0, 1))
    reuse.ring_out[slot].index_copy_(1, at, out.unflatten(1, (length, -1)))
    reuse.ring_lse[slot].index_copy_(1, at, lse.unflatten(1, (length, -1)))
    reuse.ring_depth[slot].index_fill_(1, at, 0)
    reuse.ring_anchors[slot].index_copy_(1, at, kept.to(torch.int32))
    reuse.ring_position[slot].index_copy_(0, at, positions.to(torch.int32))
    unbroken = (reuse.slot_end[slot] == n - length) & (reuse.slot_request[slot] == request)
    reuse.slot_begin[slot] = torch.where(unbroken, reuse.slot_begin[slot], n - length)
    reuse.slot_end[slot] = n
    reuse.slot_request[slot] = request


def _states(
    queries: Tensor, ends: Tensor, last_end: int, anchors: Tensor, context: _Context
) -> tuple[Tensor, Tensor]:
    """Attention states of queries `[H, rows, D]`, each over its `[0, end)` without the anchors.

    ends `[rows]`, at most last_end; anchors `[H, count]`. Returns out `[H, rows, D]` and lse
    `[H, rows]`, float32.
    """
    hidden = torch.zeros(len(queries), last_end, dtype=torch.bool, device=queries.device)
    hidden.scatter_(1, anchors, True)
    highest = queries.new_full(queries.shape[:2], -torch.inf)
    total = queries.new_zeros(queries.shape[:2])  # sum of exp(logit - highest)
    out = torch.zeros_like(queries)
    for tokens in context.chunks(last_end):
        logits = context.logits(queries, tokens)
        masked = hidden[:, None, tokens] | (tokens >= ends[:, None])
        logits.masked_fill_(masked, -torch.inf)
        new_highest = torch.maximum(highest, logits.amax(dim=-1))
        # Nothing seen yet: any finite base gives weights of 0, where -inf - -inf would be NaN.
        base = new_highest.masked_fill(new_highest == -torch.inf, 0.0)
        weights = logits.sub_(base[..., None]).exp_()
        decay = (highest - base).exp()
        total = total * decay + weights.sum(dim=-1)
        out = torch.baddbmm(out * decay[..., None], weights, context.gather(context.v, tokens))
        highest = new_highest
    empty = total == 0
    out /= total.masked_fill(empty, 1.0)[..., None]
    return out, highest + total.log()


def _choose_anchors(
    reuse: ReuseCache, grouped: Tensor, n: int, last_end: int, context: _Context
) -> Tensor:
    """The S heaviest tokens of `[0, E(n - 1))` per KV head, or all; int64 `[H, <= S]`, ascending.

    A token's weight is the largest over the voters' heads of exp(logit - lse), with each voter's
    lse over all the tokens it sees. It is compared as a logarithm, which cannot underflow.
    """
    count = min(reuse.cfg.anchors, last_end)
    heads = reuse.num_kv_heads
    if count == last_end:
        return torch.arange(last_end, device=grouped.device).expand(heads, -1)
    if count == 0:
        return torch.empty(heads, 0, dtype=torch.int64, device=grouped.device)
    voters = grouped[:, -_VOTERS:]
    queries = voters.flatten(1, 2).float()
    first = n - voters.shape[1] + 1
    seen = torch.arange(first, n + 1, device=grouped.device).repeat_interleave(reuse.group_size)
    lse = queries.new_full(queries.shape[:2], -torch.inf)
    for tokens in context.chunks(n):
        logits = context.logits(queries, tokens)
        logits.masked_fill_(tokens >= seen[:, None], -torch.inf)
        lse = torch.logaddexp(lse, logits.logsumexp(dim=-1))
    weights = [
        (context.logits(queries, tokens) - lse[..., None])
        .masked_fill_(tokens >= seen[:, None], -torch.inf)
        .amax(dim=1)
        for tokens in context.chunks(last_end)
    ]
    return torch.cat(weights, dim=1).topk(count, dim=1).indices.sort(dim=1).values


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
