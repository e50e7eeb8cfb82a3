"""The three stages as thin functions over the compiled ops, with their fake kernels beside them.

`mac_attn.decode` does these three in a row, in one op. Alone they compose with other kernels:
`match` and `complete` with another attention kernel in place of `amend`, or `amend` as a split-KV
decode kernel.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import _C  # registers torch.ops.mac_attn
from ._checks import check_tensor
from .paging import KVCache, kv_views

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


class Amended(NamedTuple):
    """What `amend` yields: two attention states per query head and the new entry's anchors.

    Attributes:
        states: [2, B, num_qo_heads, head_dim] float32, softmax-weighted means. Row 0 is over the
            old tokens that no reused state covers, row 1 over the anchors and the band.
        state_lse: [2, B, num_qo_heads] float32, natural log of the sum of exp(logit); -inf: empty.
        anchors: [B, num_kv_heads, S] int32 positions, -1 where unused (those last).
    """

    states: Tensor
    state_lse: Tensor
    anchors: Tensor


def match(
    reuse: ReuseCache,
    q_match: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    request_ids: Tensor | None = None,
) -> Tensor:
    """Find, for every query head, the recent query to reuse (paper §3.1, "match").

    Args:
        reuse: the layer's cache; it is only read.
        q_match: [B, num_qo_heads, head_dim] pre-RoPE queries, in the cache's dtype.
        seq_lens: [B] int32, tokens in the KV cache, the current one included; 0 is a padding row.
        slots: [B] int32, the ring slot of each request, or -1: it has none, and misses.
        request_ids: [B] int64 or None; a slot whose last call had another id counts as empty.

    Returns:
        [B, num_qo_heads] int32: the position of the matched entry, or -1 for a miss. With group
        decisions it is the same for all query heads of a KV head.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
    """
    check_query("q_match", q_match, reuse)
    source: Tensor = torch.ops.mac_attn.match(
        q_match,
        seq_lens,
        slots,
        request_ids,
        reuse.ring_query,
        reuse.ring_depth,
        reuse.ring_position,
        reuse.slot_begin,
        reuse.slot_end,
        reuse.slot_request,
        reuse.threshold,
        *reuse.match_options,
        reuse.workspace,
        reuse.error_flag,
    )
    return source


def amend(
    q: Tensor,
    kv_cache: KVCache,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    source: Tensor | None = None,
    reuse: ReuseCache | None = None,
    slots: Tensor | None = None,
    sm_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    kv_layout: str = "NHD",
) -> Amended:
    """Attend afresh to what the reused state does not cover (paper §3.2, "amend").

    With `source` and `reuse` the tokens are [E(c), n) on a hit and [0, n) on a miss, split at E(p);
    without them all of [0, n), in row 1 of the result: plain split-KV decode attention.

    Args: as for `mac_attn.decode`; `source` is what `match` returned.
    """
    k_cache, v_cache = kv_views(kv_cache, kv_layout)
    if (source is None) != (reuse is None):
        raise ValueError("source and reuse: one is None, must be given both or neither")
    if sm_scale is None:
        sm_scale = 1.0 / math.sqrt(q.size(-1))
    if reuse is not None:
        check_query("q", q, reuse)
        check_tensor(
            "k_cache", k_cache, shape=("pages", "page", reuse.num_kv_heads, reuse.head_dim)
        )
    states, state_lse, anchors = torch.ops.mac_attn.amend(
        q,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        source,
        slots if reuse is not None else None,
        reuse.ring_anchors if reuse is not None else None,
        reuse.cfg.window if reuse is not None else 1,
        reuse.cfg.band if reuse is not None else 1,
        sm_scale,
        logits_soft_cap,
        reuse.workspace if reuse is not None else None,
        reuse.error_flag if reuse is not None else None,
    )
    return Amended(states, state_lse, anchors)


def complete(
    amended: Amended,
    seq_lens: Tensor,
    *,
    dtype: torch.dtype | None = None,
    reuse: ReuseCache | None = None,
    source: Tensor | None = None,
    q_match: Tensor | None = None,
    slots: Tensor | None = None,
    request_ids: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge the parts by log-sum-exp and store the new ring entries (paper §3.3, "complete").

    Without `reuse` it only merges the two states of `amended`.

    Args:
        amended: from `amend`, or from another kernel in the same form.
        seq_lens: [B] int32, as given to `amend`.
        dtype: of the output, when neither `reuse` nor `out` says it.
        reuse, source, q_match, slots, request_ids: as for `match`, whose answer `source` is.
        out: [B, num_qo_heads, head_dim], written in place, or None for a new tensor.

    Returns:
        (out, lse): [B, num_qo_heads, head_dim] and [B, num_qo_heads] float32 (natural log).
    """
    states, state_lse, anchors = amended
    lse = torch.empty_like(state_lse[0])
    if out is None:
        dtype = reuse.dtype if reuse is not None else dtype
        out = torch.empty_like(states[0], dtype=dtype)
    if reuse is None:
        torch.ops.mac_attn.complete_exact(states, state_lse, seq_lens, out, lse)
        return out, lse
    check_tensor("source", source, dtype=torch.int32)
    check_query("q_match", q_match, reuse)
    check_tensor("slots", slots, dtype=torch.int32)
    torch.ops.mac_attn.complete(
        states,
        state_lse,
        anchors,
        source,
        q_match,
        seq_lens,
        slots,
        request_ids,
        reuse.ring_query,
        reuse.ring_out,
        reuse.ring_lse,
        reuse.ring_depth,
        reuse.ring_anchors,
        reuse.ring_position,
        reuse.slot_begin,
        reuse.slot_end,
        reuse.slot_request,
        reuse.counters,
        reuse.cfg.band,
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
    block_table: Tensor,
    seq_lens: Tensor,
    slots: Tensor | None,
    q_match: Tensor | None,
    request_ids: Tensor | None,
    reuse: ReuseCache,
    sm_scale: float,
    logits_soft_cap: float,
    out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three stages in one op: what a call costs besides is then paid once.

    Args: as for `mac_attn.decode`, the cache as `kv_arguments` answers it. Without `q_match`
        the op turns `q` back itself, if the cache has `rotary`.

    Returns:
        (source, out, lse): what `match` answered, `out` or a new tensor, and [B, num_qo_heads]
        float32.
    """
    arguments = (
        q,
        k_cache,
        v_cache,
        hnd,
        block_table,
        seq_lens,
        slots,
        q_match,
        request_ids,
        reuse.ring_query,
        reuse.ring_out,
        reuse.ring_lse,
        reuse.ring_depth,
        reuse.ring_anchors,
        reuse.ring_position,
        reuse.slot_begin,
        reuse.slot_end,
        reuse.slot_request,
        reuse.counters,
        reuse.threshold,
        *reuse.match_options,
        sm_scale,
        logits_soft_cap,
        reuse.workspace,
        reuse.error_flag,
        *(_NO_ROTARY if q_match is not None or reuse.rotary is None else reuse.rotary.arguments),
    )
    _, _, decode, decode_into = _COMPILED if torch.compiler.is_compiling() else _EAGER
    if out is None:
        source, out, lse = decode(*arguments)
    else:
        source, lse = decode_into(*arguments, out)
    return source, out, lse


def decode_exact(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    hnd: bool,
    block_table: Tensor,
    seq_lens: Tensor,
    sm_scale: float,
    logits_soft_cap: float,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`amend` and `complete` without reuse in one op; returns (`out` or a new tensor, lse)."""
    arguments = (q, k_cache, v_cache, hnd, block_table, seq_lens, sm_scale, logits_soft_cap)
    decode, decode_into, _, _ = _COMPILED if torch.compiler.is_compiling() else _EAGER
    if out is None:
        out, lse = decode(*arguments)
    else:
        lse = decode_into(*arguments, out)
    return out, lse


def check_query(name: str, query: Tensor | None, reuse: ReuseCache) -> None:
    """Queries of the model that the cache was made for."""
    shape = ("batch", reuse.num_qo_heads, reuse.head_dim)
    check_tensor(name, query, shape=shape, dtype=reuse.dtype, device=reuse.device)


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


@torch.library.register_fake("mac_attn::match")
def _match_fake(q_match: Tensor, seq_lens: Tensor, *args: object) -> Tensor:
    return seq_lens.new_empty((q_match.size(0), q_match.size(1)))


@torch.library.register_fake("mac_attn::amend")
def _amend_fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    source: Tensor | None,
    slots: Tensor | None,
    ring_anchors: Tensor | None,
    *args: object,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_qo_heads, head_dim = q.shape
    num_anchors = 0 if ring_anchors is None else ring_anchors.size(-1)
    return (
        q.new_empty((2, batch, num_qo_heads, head_dim), dtype=torch.float32),
        q.new_empty((2, batch, num_qo_heads), dtype=torch.float32),
        seq_lens.new_empty((batch, k_cache.size(2), num_anchors)),
    )


@torch.library.register_fake("mac_attn::complete_exact")
def _complete_exact_fake(*args: object) -> None:
    return None


@torch.library.register_fake("mac_attn::complete")
def _complete_fake(*args: object) -> None:
    return None


@torch.library.register_fake("mac_attn::decode_exact")
def _decode_exact_fake(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _decode_exact_into_fake(q, *args)


@torch.library.register_fake("mac_attn::decode_exact.into")
def _decode_exact_into_fake(q: Tensor, *args: object) -> Tensor:
    _check_one_device((q, *args))
    return q.new_empty((q.size(0), q.size(1)), dtype=torch.float32)


@torch.library.register_fake("mac_attn::decode_reuse")
def _decode_reuse_fake(q: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    source, lse = _decode_reuse_into_fake(q, *args)
    return source, q.new_empty(q.shape), lse


@torch.library.register_fake("mac_attn::decode_reuse.into")
def _decode_reuse_into_fake(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    _check_one_device((q, *args))
    heads = (q.size(0), q.size(1))
    return q.new_empty(heads, dtype=torch.int32), q.new_empty(heads, dtype=torch.float32)


def _check_one_device(args: tuple[object, ...]) -> None:
    """One tensor on "meta" among others brings a call here, where it would do nothing."""
    devices = {arg.device for arg in args if isinstance(arg, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"the tensors are on {sorted(map(str, devices))}, must be on one device")


@torch.library.register_fake("mac_attn::unrotate")
def _unrotate_fake(q: Tensor, *args: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
