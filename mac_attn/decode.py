"""One decode step of attention: match, amend, complete."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops
from ._checks import FLOAT_DTYPES, check_tensor, check_type
from .cache import ReuseCache
from .paging import KVCache
from .rope import pre_rope_query


def decode(
    q: Tensor,
    kv_cache: KVCache,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    reuse: ReuseCache | None = None,
    slots: Tensor | None = None,
    q_match: Tensor | None = None,
    request_ids: Tensor | None = None,
    sm_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    kv_layout: str = "NHD",
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one new token per request over its paged KV cache, reusing what it can.

    The new tokens' keys and values are in the cache already. With `reuse=None` this is exact decode
    attention. With a `ReuseCache` a query that resembles a recent one takes over that one's
    attention to the old context (arXiv:2604.00235); a miss is exact; the cache learns the new query
    either way.

    Args:
        q: [B, num_qo_heads, head_dim] float32, bfloat16 or float16, post-RoPE. head_dim is a
            multiple of 16, at most 256. Only the last dimension has to be contiguous.
        kv_cache: a pair (k_cache, v_cache), each [num_pages, page_size, num_kv_heads, head_dim] for
            kv_layout "NHD" or [num_pages, num_kv_heads, page_size, head_dim] for "HND", or one
            tensor with the pair in dimension 1. In q's dtype; read in place. num_kv_heads divides
            num_qo_heads: query head h reads KV head h // (num_qo_heads / num_kv_heads).
        block_table: [B, max_pages] int32, the pages of each request in order. Entries past the
            pages in use are never read.
        seq_lens: [B] int32, tokens per request, the new one included. 0 marks a padding row, whose
            output is 0 (lse -inf) and whose slot is left alone.
        reuse: the layer's cache, or None.
        slots: [B] int32, the ring slot of each request, all different. Needed with `reuse`.
        q_match: [B, num_qo_heads, head_dim], pre-RoPE queries in q's dtype. None computes them from
            `q` with the cache's `rotary`.
        request_ids: [B] int64, not negative, or None. A slot last used under another id counts as
            empty, so that no request can meet another's state.
        sm_scale: factor of the logits, default 1 / sqrt(head_dim).
        logits_soft_cap: cap * tanh(logit / cap) when above 0.
        kv_layout: "NHD" or "HND", see `kv_cache`.
        out: [B, num_qo_heads, head_dim] in q's dtype, written in place.
        return_lse: also return the log-sum-exp of the logits: natural log, float32,
            [B, num_qo_heads].

    Returns:
        [B, num_qo_heads, head_dim] in q's dtype, or (out, lse).

    Raises:
        ValueError: a shape, layout, device or value (length, page id, slot) does not fit. On the
            CPU values are checked too; on CUDA see `ReuseCache.check`. Nothing has been written.
        TypeError: an argument is no tensor or has another dtype than it must.
    """
    check_tensor("q", q, ("batch", "num_qo_heads", "head_dim"), FLOAT_DTYPES)
    if reuse is not None:
        check_type("reuse", reuse, ReuseCache)
        ops.check_query("q", q, reuse)
    check_tensor("block_table", block_table, shape=(q.size(0), "max_pages"), dtype=torch.int32)
    check_tensor("seq_lens", seq_lens, shape=(q.size(0),), dtype=torch.int32)
    if out is not None:
        check_tensor("out", out, shape=tuple(q.shape), dtype=q.dtype, device=q.device)
    attention: dict[str, Any] = {
        "sm_scale": sm_scale,
        "logits_soft_cap": logits_soft_cap,
        "kv_layout": kv_layout,
    }

    if reuse is None:
        amended = ops.amend(q, kv_cache, block_table, seq_lens, **attention)
        out, lse = ops.complete(amended, seq_lens, dtype=q.dtype, out=out)
        return (out, lse) if return_lse else out

    q_match = pre_rope_query(q, q_match, seq_lens - 1, reuse.rotary)
    check_tensor("slots", slots, shape=(q.size(0),), dtype=torch.int32)
    rows: dict[str, Any] = {"slots": slots, "request_ids": request_ids}

    source = ops.match(reuse, q_match, seq_lens, **rows)
    amended = ops.amend(
        q, kv_cache, block_table, seq_lens, source=source, reuse=reuse, slots=slots, **attention
    )
    out, lse = ops.complete(
        amended, seq_lens, reuse=reuse, source=source, q_match=q_match, out=out, **rows
    )
    if reuse.auditor is not None:
        reuse.auditor.record(
            out, source, q, kv_cache, block_table, seq_lens, rows["slots"], **attention
        )
    return (out, lse) if return_lse else out
