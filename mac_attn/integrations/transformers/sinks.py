"""Attention with sinks where `mac_attn.decode` is not used: plain torch, as SDPA has none."""

from __future__ import annotations

import torch
from torch import Tensor

from .support import Refusal

_MOST_LOGITS = 1 << 26  # at a time


def check_sinks(sinks: Tensor, num_qo_heads: int) -> Tensor:
    """A keyword `s_aux` as `mac_attn.decode` takes sinks, [num_qo_heads] float32.

    Raises:
        ValueError: it is something else than a logit of each head.
    """
    if not isinstance(sinks, Tensor) or sinks.shape != (num_qo_heads,):
        shape = list(sinks.shape) if isinstance(sinks, Tensor) else type(sinks).__name__
        raise Refusal(
            f"`s_aux` is {shape}, must be a tensor [{num_qo_heads}], one learned logit of each "
            "query head; use attn_implementation='eager', with transformers' own cache"
        )
    return sinks.detach().float()


def attention_with_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor,
    scaling: float | None,
    *,
    causal: bool,
) -> Tensor:
    """Attention in which every query head sees one logit more, whose value is 0.

    A piece of the queries at a time, so that the logits of all are never there at once.

    Args:
        query: [B, Hq, T, D].
        key, value: [B, Hkv, n, D].
        mask: bool or additive [B or 1, 1, T, n], or None.
        sinks: [Hq] float32.
        scaling: factor of the logits; None is 1 / sqrt(D).
        causal: with `mask` None, whether query i sees the first i + 1 keys alone.

    Returns:
        [B, T, Hq, D].
    """
    batch, heads, new, dim = query.shape
    kv_heads, length = key.shape[1:3]
    scaling = dim**-0.5 if scaling is None else scaling
    if mask is None and causal and new > 1:
        mask = torch.ones(new, length, dtype=torch.bool, device=query.device).tril()[None, None]
    grouped = query.unflatten(1, (kv_heads, -1))  # [B, Hkv, G, T, D]
    keys, values = key.transpose(-1, -2)[:, :, None], value[:, :, None]
    sink = sinks.view(1, kv_heads, -1, 1, 1)
    step = max(1, _MOST_LOGITS // (batch * heads * length))
    out = []
    for first in range(0, new, step):
        rows = slice(first, first + step)
        logits = (grouped[..., rows, :] @ keys).float() * scaling
        if mask is not None:
            seen = mask[:, :, None, rows]
            logits = (
                logits.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else logits + seen
            )
        sums = torch.logaddexp(logits.logsumexp(-1, keepdim=True), sink)
        out.append((logits - sums).exp().to(value.dtype) @ values)
    return torch.cat(out, dim=-2).flatten(1, 2).transpose(1, 2).contiguous()
