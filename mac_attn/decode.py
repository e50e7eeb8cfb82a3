"""One decode step of attention: match, amend, complete."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from ._checks import FLOAT_DTYPES, INT32_MAX, check_tensor, check_type
from .cache import ReuseCache
from .paging import KVCache, Scale, kv_arguments, kv_scales, kv_views
from .rope import pre_rope_query


def decode(
    q: Tensor,
    kv_cache: KVCache,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    query_lens: Tensor | None = None,
    reuse: ReuseCache | None = None,
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
    batch_invariant: bool = False,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the new tokens of each request over its paged KV cache, reusing what it can.

    The new tokens' keys and values are in the cache already. With `reuse=None` this is exact decode
    attention. With a `ReuseCache` a query that resembles a recent one takes over that one's
    attention to the old context (arXiv:2604.00235); a miss is exact; the cache learns the new query
    either way.

    In a step of several tokens, as speculative decoding has them to verify, each resembles a recent
    query of its own, or none. A head reuses only if it can with all of the request's tokens, and is
    exact with all of them else: one that has to read everything reads it for the others, too. The
    cache learns the first token, which cannot be rejected; the next step may begin after any.

    Args:
        q: [B, num_qo_heads, head_dim] float32, bfloat16 or float16, post-RoPE, or of T new tokens,
            from 1 to 16, [B, T, num_qo_heads, head_dim]. head_dim is a multiple of 8 up to 256,
            or 512. Only the last dimension has to be contiguous; on CUDA rows begin at multiples
            of 16 bytes.
        kv_cache: a pair (k_cache, v_cache), each [num_pages, page_size, num_kv_heads, head_dim] for
            kv_layout "NHD" or [num_pages, num_kv_heads, page_size, head_dim] for "HND", or one
            tensor with the pair in dimension 1. In q's dtype or float8_e4m3fn; read in place.
            num_kv_heads divides num_qo_heads: query head h reads KV head
            h // (num_qo_heads / num_kv_heads). Of a pair v_cache may have rows of fewer elements,
            head_dim_v, of the same sizes; on CUDA not with a head_dim of 512.
        block_table: [B, max_pages] int32, the pages of each request in order. Entries past the
            pages in use are never read.
        seq_lens: [B] int32, tokens per request, the new ones included. 0 marks a padding row, whose
            output is 0 (lse -inf) and whose slot is left alone.
        query_lens: [B] int32, of the T tokens how many a request has, from 1; those behind are
            padding, whose output is 0 (lse -inf). None: T each. A request's t-th token stands at
            position seq_lens - query_lens + t and attends to all up to itself.
        reuse: the layer's cache, or None.
        slots: [B] int32, the ring slot of each request, all different, or -1: that request is
            attended exactly, and nothing is stored for it. Needed with `reuse`.
        q_match: as q, pre-RoPE queries in q's dtype. None computes them from `q` with the cache's
            `rotary`.
        request_ids: [B] int64, not negative, or None. A slot last used under another id counts as
            empty, so that no request can meet another's state.
        sm_scale: factor of the logits, default 1 / sqrt(head_dim).
        logits_soft_cap: cap * tanh(logit / cap) when above 0.
        kv_layout: "NHD" or "HND", see `kv_cache`.
        k_scale, v_scale: with a float8 cache what its numbers stand for: key = k_scale * number,
            value = v_scale * number. float32, [] or [1], or [num_kv_heads] for one of each KV head;
            a Python float is made a tensor in every call. Finite and above 0, which is checked on
            the CPU; on CUDA a NaN is a NaN in all keys, or values, of its heads.
        sinks: [num_qo_heads] float32, a logit of each query head that is attended to besides the
            tokens and has a value of 0, as learned by gpt-oss: one more term of the softmax's sum,
            after `sm_scale` and `logits_soft_cap`. -inf is none; NaN and inf are refused, on the
            CPU. A padding row has none. Ring entries do not hold it.
        learn: False stores no entry, as for drafts whose keys are yet to be computed exactly.
        exact: True reuses nothing, while the cache goes on learning: for a step whose output must
            be exact, as where drafts are verified. Without `reuse` every step is.
        batch_invariant: cut a request's tokens up in the same way whatever else is in the batch, so
            that its output, decisions and entries are bit for bit what they are alone (on the same
            device, with the same strides and T). Costs time on short contexts (docs/speed.md).
        out: as q with rows of head_dim_v, written in place. With `reuse` it may not share memory
            with `q` or `q_match`, of which an entry is made afterwards.
        return_lse: also return the log-sum-exp of the logits, a sink among them: natural log,
            float32, q's shape without the last dimension.

    Returns:
        As q with rows of head_dim_v, or (out, lse). There are no gradients: a backward pass raises.

    Raises:
        ValueError: a shape, layout, device or value (length, page id, slot) does not fit. On the
            CPU values are checked too; on CUDA see `ReuseCache.check`. Nothing has been written.
        TypeError: an argument is no tensor or has another dtype than it must.
    """
    arguments = (q, kv_cache, block_table, seq_lens, query_lens, reuse, slots, q_match, request_ids)
    options = (sm_scale, logits_soft_cap, kv_layout, k_scale, v_scale, sinks, learn, exact)
    try:
        out, lse = _decode(*arguments, *options, batch_invariant, out)
    except Exception:
        # The op has checked everything before it wrote anything, but knows no Python objects.
        _check(*arguments, kv_layout, sinks, out)
        raise
    return (out, lse) if return_lse else out


def _decode(
    q: Tensor,
    kv_cache: KVCache,
    block_table: Tensor,
    seq_lens: Tensor,
    query_lens: Tensor | None,
    reuse: ReuseCache | None,
    slots: Tensor | None,
    q_match: Tensor | None,
    request_ids: Tensor | None,
    sm_scale: float | None,
    logits_soft_cap: float,
    kv_layout: str,
    k_scale: Scale,
    v_scale: Scale,
    sinks: Tensor | None,
    learn: bool,
    exact: bool,
    batch_invariant: bool,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    scales = kv_scales(k_scale, v_scale, q)
    cache = (*kv_arguments(kv_cache, kv_layout), *scales)
    attention = (q, *cache, block_table, seq_lens, query_lens)
    if sm_scale is None:
        sm_scale = q.size(-1) ** -0.5
    if reuse is None:
        return ops.decode_exact(*attention, sm_scale, logits_soft_cap, batch_invariant, sinks, out)

    # match:    source = the recent query to reuse, or none, by `q_match`; without it the op turns
    #           `q` back
    # amend:    attention of `q` to the tokens from E(source) on, or to all; the new entry's anchors
    # complete: out, lse = that and the reused state merged; the new entry goes into the ring
    source, out, lse = ops.match_amend_complete(
        *(*attention, slots, q_match, request_ids, reuse, sm_scale, logits_soft_cap),
        *(batch_invariant, sinks, learn, exact, out),
    )
    if reuse.auditor is not None and slots is not None:
        if q.dim() == 4:
            by_head = source.view(q.size(0), reuse.num_kv_heads, q.size(1), reuse.group_size)
            source = by_head.transpose(1, 2).reshape(q.shape[:-1])
        reuse.auditor.record(
            out,
            source,
            q,
            kv_cache,
            block_table,
            seq_lens,
            query_lens,
            slots,
            sinks,
            sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap,
            kv_layout=kv_layout,
            k_scale=scales[0],
            v_scale=scales[1],
        )
    return out, lse


def _check(
    q: Tensor,
    kv_cache: KVCache,
    block_table: Tensor,
    seq_lens: Tensor,
    query_lens: Tensor | None,
    reuse: ReuseCache | None,
    slots: Tensor | None,
    q_match: Tensor | None,
    request_ids: Tensor | None,
    kv_layout: str,
    sinks: Tensor | None,
    out: Tensor | None,
) -> None:
    """Raise ValueError or TypeError naming the first argument that is wrong, if one is."""
    tokens = ("tokens",) if isinstance(q, Tensor) and q.dim() == 4 else ()
    shape = ("batch", *tokens, "num_qo_heads", "head_dim")
    check_tensor("q", q, shape, FLOAT_DTYPES, rows=True)
    batch, device = q.size(0), q.device
    rows = q.shape[:-1].numel()
    if rows > INT32_MAX:
        raise ValueError(f"{' * '.join(shape[:-1])} is {rows}, must be below 2^31")
    k_cache, v_cache = kv_views(kv_cache, kv_layout)
    heads: int | str = "num_kv_heads"
    if reuse is not None:
        check_type("reuse", reuse, ReuseCache)
        ops.check_query("q", q, reuse)
        heads = reuse.num_kv_heads
    dtypes = (q.dtype, torch.float8_e4m3fn)
    check_tensor("k_cache", k_cache, ("pages", "page", heads, q.size(-1)), dtypes, device)
    if reuse is not None:
        ops.check_caches(k_cache, v_cache, reuse)
    check_tensor("block_table", block_table, (batch, "max_pages"), torch.int32, device)
    check_tensor("seq_lens", seq_lens, (batch,), torch.int32, device)
    if query_lens is not None:
        check_tensor("query_lens", query_lens, (batch,), torch.int32, device)
    if sinks is not None:
        check_tensor("sinks", sinks, (q.size(-2),), torch.float32, device)
    if out is not None:
        check_tensor("out", out, (*q.shape[:-1], v_cache.size(-1)), q.dtype, device, rows=True)
    if reuse is None:
        return
    positions = (seq_lens - 1).reshape(-1, *(1 for _ in tokens)).expand(q.shape[:-2])
    pre_rope_query(q, q_match, positions, reuse.rotary)
    check_tensor("slots", slots, (batch,), torch.int32, device)
    if request_ids is not None:
        check_tensor("request_ids", request_ids, (batch,), torch.int64, device)
