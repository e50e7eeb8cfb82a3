"""The three stages as thin functions over the compiled ops; their fake kernels are in _fakes.py.

`mac_attn.decode` does these three in a row, in one op. Alone they compose with other kernels:
`match` and `complete` with another attention kernel in place of `amend`, or `amend` as a split-KV
decode kernel.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import _C, _fakes  # noqa: F401  (register torch.ops.mac_attn)
from ._checks import check_number, check_tensor
from .paging import KVCache, Scale, kv_scales, kv_views

if TYPE_CHECKING:
    from .cache import ReuseCache

# What torch.compile can see, and what costs a third less to call.
_COMPILED = (
    torch.ops.mac_attn.decode_exact.default,
    torch.ops.mac_attn.decode_exact.into,
    torch.ops.mac_attn.decode_reuse.default,
    torch.ops.mac_attn.decode_reuse.into,
)
_EAGER = (_C.decode_exact, _C.decode_exact_into, _C.decode_reuse, _C.decode_reuse_into)
_NO_ROTARY = (None, False, 1.0)


class Matched(NamedTuple):
    """What `match` answers, and the other stages go by.

    Attributes:
        source: [B, num_qo_heads] int32, the position of the entry to reuse, or -1 for a miss. With
            group decisions it is the same for all query heads of a KV head. Of T query tokens it
            has num_kv_heads * T * group numbers a request, group = num_qo_heads / num_kv_heads,
            as `place` has: a head hits with all of its tokens, each on an entry of its own, or
            misses with all. -1 for a token that is not there.
        place: [B, num_qo_heads] int32, where in the ring that entry lies, -1 for a miss.
        stored: [B, num_kv_heads] int32, `ReuseCache.ring_stored` of the request's slot, or -1 if
            the request does not go on where the slot ended.
    """

    source: Tensor
    place: Tensor
    stored: Tensor


class Amended(NamedTuple):
    """What `amend` yields: two attention states per query head and a new entry's anchors.

    Attributes:
        states: [2, B, num_qo_heads, head_dim_v] float32, softmax-weighted means. On a miss row 0 is
            over the old tokens [0, E(p)) and row 1 over the band [E(p), n). On a hit on the entry
            of position c without anchors they are over [E(c), E(p)) and the band; with anchors
            row 1 is over those and [E(c), n), and row 0 over the anchors by the entry's query.
            Of T query tokens it has num_kv_heads * T * group rows a request, as the next two have,
            group = num_qo_heads / num_kv_heads; the first token's E(p) parts those of all.
        state_lse: [2, B, num_qo_heads] float32, natural log of the sum of exp(logit); -inf: empty.
        log_ratio: [B, num_qo_heads] float32, by how much the log-sum-exp of the reused rest moves.
        anchors: [B, num_kv_heads, S] int32 positions, ascending, -1 where unused.
        anchor_weights: [B, num_kv_heads, S] float32, how many tokens besides itself each stands
            for.
        sampled: [B, num_kv_heads * T] int32, on a hit how many anchors were read; on a miss, for
            the first token, how many candidates there were for them, -1 if no sample was drawn, and
            -1 for the others.
    """

    states: Tensor
    state_lse: Tensor
    log_ratio: Tensor
    anchors: Tensor
    anchor_weights: Tensor
    sampled: Tensor


def match(
    reuse: ReuseCache,
    q_match: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    request_ids: Tensor | None = None,
    *,
    query_lens: Tensor | None = None,
) -> Matched:
    """Find, for every query head, the recent query to reuse (paper §3.1, "match").

    Args:
        reuse: the layer's cache; it is only read.
        q_match: [B, num_qo_heads, head_dim] pre-RoPE queries, in the cache's dtype, or of several
            query tokens [B, T, num_qo_heads, head_dim].
        seq_lens: [B] int32, tokens in the KV cache, the current ones included; 0 is a padding row.
        slots: [B] int32, the ring slot of each request, or -1: it has none, and misses.
        request_ids: [B] int64 or None; a slot whose last call had another id counts as empty.
        query_lens: [B] int32 or None, as for `mac_attn.decode`.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    check_query("q_match", q_match, reuse)
    return Matched(
        *torch.ops.mac_attn.match(
            q_match,
            seq_lens,
            query_lens,
            slots,
            request_ids,
            *reuse.ring_arguments,
            reuse.threshold,
            *reuse.match_options,
            reuse.workspace,
            reuse.error_flag,
        )
    )


def amend(
    q: Tensor,
    kv_cache: KVCache,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    query_lens: Tensor | None = None,
    matched: Matched | None = None,
    reuse: ReuseCache | None = None,
    slots: Tensor | None = None,
    sm_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    batch_invariant: bool = False,
    kv_layout: str = "NHD",
    k_scale: Scale = None,
    v_scale: Scale = None,
) -> Amended:
    """Attend afresh to what the reused state does not cover (paper §3.2, "amend").

    With `matched` and `reuse` see `Amended`; without them to all of [0, n), in row 1 of the result:
    plain split-KV decode attention.

    Args: as for `mac_attn.decode`; `matched` is what `match` returned.
    """
    k_cache, v_cache = kv_views(kv_cache, kv_layout)
    scales = kv_scales(k_scale, v_scale, q)
    if (matched is None) != (reuse is None):
        raise ValueError("matched and reuse: one is None, must be given both or neither")
    if sm_scale is None:
        sm_scale = 1.0 / math.sqrt(q.size(-1))
    rings: tuple[object, ...] = (None, None, None, None, None, 1, 0, 1, 0)
    if matched is not None and reuse is not None:
        check_query("q", q, reuse)
        check_caches(k_cache, v_cache, reuse)
        ring, *_, entries, anchors = reuse.ring_arguments
        rings = (*matched, slots, ring, entries, anchors, reuse.cfg.band, reuse.layer)
    return Amended(
        *torch.ops.mac_attn.amend(
            q,
            k_cache,
            v_cache,
            *scales,
            block_table,
            seq_lens,
            query_lens,
            *rings,
            sm_scale,
            logits_soft_cap,
            batch_invariant,
            reuse.workspace if reuse is not None else None,
            reuse.error_flag if reuse is not None else None,
        )
    )


def complete(
    amended: Amended,
    seq_lens: Tensor,
    *,
    query_lens: Tensor | None = None,
    dtype: torch.dtype | None = None,
    reuse: ReuseCache | None = None,
    matched: Matched | None = None,
    q: Tensor | None = None,
    q_match: Tensor | None = None,
    slots: Tensor | None = None,
    request_ids: Tensor | None = None,
    k_cache: Tensor | None = None,
    k_scale: Tensor | None = None,
    block_table: Tensor | None = None,
    sm_scale: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge the parts by log-sum-exp and store the new ring entries (paper §3.3, "complete").

    Without `reuse` it only merges the two states of `amended`. When a slot starts, and whenever its
    request has grown to a power of two of at least 512 tokens, it measures how far 512 keys spread,
    evenly over the request (`ReuseConfig.max_drift`).

    Args:
        amended: from `amend`, or from another kernel in the same form.
        seq_lens: [B] int32, as given to `amend`.
        query_lens: as given to `amend`.
        dtype: of the output, when neither `reuse` nor `out` says it.
        reuse, q_match, slots, request_ids: as for `match`, whose answer `matched` is.
        q: post-RoPE queries, as given to `amend`.
        k_cache: [num_pages, page_size, num_kv_heads, head_dim], the keys, or None: how far they
            spread is then not known, and the threshold is a cautious one.
        k_scale, block_table, sm_scale: with `k_cache`, as for `mac_attn.decode`; k_scale a tensor.
        sinks: [num_qo_heads] float32, as for `mac_attn.decode`.
        out: as `q` with rows of head_dim_v, written in place, or None for a new tensor. With
            several query tokens either `q` or `out` has to say how many.

    Returns:
        (out, lse): as `q` with rows of head_dim_v, and float32 without them (natural log).
    """
    states, state_lse = amended[:2]
    if out is None:
        dtype = reuse.dtype if reuse is not None else dtype
        shape = states[0].shape if q is None else (*q.shape[:-1], states.size(-1))
        out = states.new_empty(shape, dtype=dtype)
    lse = state_lse.new_empty(out.shape[:-1])
    if reuse is None:
        # What order the queries of several tokens are in depends on their KV heads.
        num_kv_heads = 1 if out.dim() == 3 else amended.anchors.size(1)
        torch.ops.mac_attn.complete_exact(
            states, state_lse, seq_lens, query_lens, num_kv_heads, sinks, out, lse
        )
        return out, lse
    if matched is None:
        raise ValueError("matched is None, must be what match answered, as reuse is given")
    check_query("q", q, reuse)
    check_query("q_match", q_match, reuse)
    check_tensor("slots", slots, dtype=torch.int32)
    ring, num_kv_heads, _, entries, _ = reuse.ring_arguments
    if sm_scale is None:
        sm_scale = 1.0 / math.sqrt(reuse.head_dim)
    check_number("sm_scale", sm_scale)
    torch.ops.mac_attn.complete(
        *amended,
        *matched,
        q,
        q_match,
        seq_lens,
        query_lens,
        slots,
        request_ids,
        ring,
        num_kv_heads,
        entries,
        reuse.cfg.band,
        reuse.match_options[-1],
        k_cache,
        k_scale,
        block_table,
        sm_scale,
        sinks,
        reuse.workspace,
        out,
        lse,
    )
    return out, lse


def match_amend_complete(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    hnd: bool,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    query_lens: Tensor | None,
    slots: Tensor | None,
    q_match: Tensor | None,
    request_ids: Tensor | None,
    reuse: ReuseCache,
    sm_scale: float,
    logits_soft_cap: float,
    batch_invariant: bool,
    sinks: Tensor | None,
    learn: bool,
    exact: bool,
    out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three stages in one op: what a call costs besides is then paid once.

    Args: as for `mac_attn.decode`, the cache as `kv_arguments` and `kv_scales` answer it. Without
        `q_match` the op turns `q` back itself, if the cache has `rotary`.

    Returns:
        (source, out, lse): what `match` answered, `out` or a new tensor, and float32 of its shape
        without the last dimension.
    """
    arguments = (
        q,
        k_cache,
        v_cache,
        hnd,
        k_scale,
        v_scale,
        block_table,
        seq_lens,
        query_lens,
        slots,
        q_match,
        request_ids,
        *reuse.ring_arguments,
        reuse.threshold,
        *reuse.match_options,
        exact,
        learn,
        reuse.layer,
        sm_scale,
        logits_soft_cap,
        batch_invariant,
        sinks,
        reuse.workspace,
        reuse.error_flag,
        *(_NO_ROTARY if q_match is not None or reuse.rotary is None else reuse.rotary.arguments),
    )
    _, _, decode, decode_into = _COMPILED if torch.compiler.is_compiling() else _EAGER
    if out is None:
        out, source, lse = decode(*arguments)
    else:
        source, lse = decode_into(out, *arguments)
    return source, out, lse


def decode_exact(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    hnd: bool,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    query_lens: Tensor | None,
    sm_scale: float,
    logits_soft_cap: float,
    batch_invariant: bool,
    sinks: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`amend` and `complete` without reuse in one op; returns (`out` or a new tensor, lse)."""
    cache = (k_cache, v_cache, hnd, k_scale, v_scale)
    options = (sm_scale, logits_soft_cap, batch_invariant, sinks)
    arguments = (q, *cache, block_table, seq_lens, query_lens, *options)
    decode, decode_into, _, _ = _COMPILED if torch.compiler.is_compiling() else _EAGER
    if out is None:
        out, lse = decode(*arguments)
    else:
        lse = decode_into(out, *arguments)
    return out, lse


def check_query(name: str, query: Tensor | None, reuse: ReuseCache) -> None:
    """Queries of the model that the cache was made for."""
    several = isinstance(query, Tensor) and query.dim() == 4
    rows = ("batch", "tokens") if several else ("batch",)
    shape = (*rows, reuse.num_qo_heads, reuse.head_dim)
    check_tensor(name, query, shape=shape, dtype=reuse.dtype, device=reuse.device)


def check_caches(k_cache: Tensor, v_cache: Tensor, reuse: ReuseCache) -> None:
    """Keys and values, as `kv_views` has them, of the model that the cache was made for."""
    shape = ("pages", "page", reuse.num_kv_heads)
    check_tensor("k_cache", k_cache, shape=(*shape, reuse.head_dim))
    check_tensor("v_cache", v_cache, shape=(*shape, reuse.head_dim_v))


def merge_states(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two attention states over disjoint sets of tokens, exactly.

    `lse = log(exp(lse1) + exp(lse2))`, `out = out1 exp(lse1 - lse) + out2 exp(lse2 - lse)`; either
    operand or both may be empty. A state is empty where its lse is -inf, or +inf as
    FlashAttention 2 has it; its mean is not looked at, and may be NaN. Two empty states are
    (0, -inf). Plain torch: any device.

    Args:
        out1, out2: [..., head_dim], softmax-weighted means of the values.
        lse1, lse2: [...], natural log of the sum of exp(logit). (FlashInfer's are base 2: multiply
            those by ln 2 first.)

    Returns:
        (out, lse) in the operands' promoted dtypes.
    """
    check_tensor("out2", out2, shape=tuple(out1.shape))
    check_tensor("lse1", lse1, shape=tuple(out1.shape[:-1]))
    check_tensor("lse2", lse2, shape=tuple(out1.shape[:-1]))
    lse1, lse2 = (lse.masked_fill(lse == math.inf, -math.inf) for lse in (lse1, lse2))
    lse = torch.logaddexp(lse1, lse2)
    # Two empty states: -inf - -inf would be NaN; their weights are 0.
    base = lse.masked_fill(lse == -math.inf, 0.0)
    weighted = []
    for mean, its_lse in ((out1, lse1), (out2, lse2)):
        is_empty = (its_lse == -math.inf).unsqueeze(-1)  # and 0 * NaN would be NaN
        weighted.append((mean * torch.exp(its_lse - base).unsqueeze(-1)).masked_fill(is_empty, 0))
    out = weighted[0] + weighted[1]
    return out.to(torch.promote_types(out1.dtype, out2.dtype)), lse
