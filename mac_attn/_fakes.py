"""What the ops answer under torch.compile: tensors of the right shape, dtype and device."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _C  # noqa: F401  (registers torch.ops.mac_attn)


@torch.library.register_fake("mac_attn::match")
def _match_fake(
    q_match: Tensor,
    seq_lens: Tensor,
    query_lens: Tensor | None,
    slots: Tensor,
    request_ids: Tensor | None,
    ring: Tensor,
    num_kv_heads: int,
    *args: object,
) -> tuple[Tensor, Tensor, Tensor]:
    stored = seq_lens.new_empty((q_match.size(0), num_kv_heads))
    return _per_query(q_match), _per_query(q_match), stored


@torch.library.register_fake("mac_attn::amend")
def _amend_fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    query_lens: Tensor | None,
    source: Tensor | None,
    place: Tensor | None,
    stored: Tensor | None,
    slots: Tensor | None,
    ring: Tensor | None,
    entries: int,
    anchors: int,
    *args: object,
) -> tuple[Tensor, ...]:
    batch, head_dim_v = q.size(0), v_cache.size(-1)
    tokens = q.size(1) if q.dim() == 4 else 1
    queries = tokens * q.size(-2)
    num_kv_heads, reuses = k_cache.size(2), source is not None

    def floats(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.float32)

    num_anchors = anchors if reuses else 0
    return (
        floats(2, batch, queries, head_dim_v),
        floats(2, batch, queries),
        floats(batch, queries if reuses else 0),
        seq_lens.new_empty((batch, num_kv_heads, num_anchors)),
        floats(batch, num_kv_heads, num_anchors),
        seq_lens.new_empty((batch, num_kv_heads * tokens if reuses else 0)),
    )


@torch.library.register_fake("mac_attn::complete_exact")
def _complete_exact_fake(*args: object) -> None:
    return None


@torch.library.register_fake("mac_attn::complete")
def _complete_fake(*args: object) -> None:
    return None


@torch.library.register_fake("mac_attn::decode_exact")
def _decode_exact_fake(
    q: Tensor, k_cache: Tensor, v_cache: Tensor | None, *args: object
) -> tuple[Tensor, Tensor]:
    return _out(q, v_cache), _decode_exact_into_fake(q, k_cache, v_cache, *args)


@torch.library.register_fake("mac_attn::decode_exact.into")
def _decode_exact_into_fake(out: Tensor, *args: object) -> Tensor:
    _check_one_device((out, *args))
    return out.new_empty(out.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("mac_attn::decode_reuse")
def _decode_reuse_fake(
    q: Tensor, k_cache: Tensor, v_cache: Tensor | None, *args: object
) -> tuple[Tensor, Tensor, Tensor]:
    return _out(q, v_cache), *_decode_reuse_into_fake(q, k_cache, v_cache, *args)


@torch.library.register_fake("mac_attn::decode_reuse.into")
def _decode_reuse_into_fake(out: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    _check_one_device((out, *args))
    return _per_query(out), out.new_empty(out.shape[:-1], dtype=torch.float32)


def _out(q: Tensor, v_cache: Tensor | None) -> Tensor:
    """As the queries, with rows of the values' size."""
    values = q if v_cache is None else v_cache
    return q.new_empty((*q.shape[:-1], values.size(-1)))


def _per_query(q: Tensor) -> Tensor:
    """int32 [B, Q] for queries [B, Hq, D] or [B, T, Hq, D]."""
    tokens = q.size(1) if q.dim() == 4 else 1
    return q.new_empty((q.size(0), tokens * q.size(-2)), dtype=torch.int32)


def _check_one_device(args: tuple[object, ...]) -> None:
    """One tensor on "meta" among others brings a call here, where it would do nothing."""
    devices = {arg.device for arg in args if isinstance(arg, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"the tensors are on {sorted(map(str, devices))}, must be on one device")


@torch.library.register_fake("mac_attn::unrotate")
def _unrotate_fake(q: Tensor, *args: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
