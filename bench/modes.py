"""Ways to attend at decode steps, behind one transformers model and one prefilled MacCache.

`exact` and `MAC` are mac_attn's own; `streaming` and `quest` are the baselines of `baselines.py`
that need nothing but the KV cache, at a given share of it. Batch size 1.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from baselines import PAGE, SINKS
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import AttentionInterface

from mac_attn.integrations.transformers import MacCache, mac_attention_forward

MODES = ("exact", "MAC", "streaming", "quest")

_chosen: tuple[str, float] | None = None  # the baseline that decode steps use, and its share


def fork(cache: MacCache, mode: str) -> MacCache:
    """A copy of a prefilled cache that decodes in this mode."""
    cache = copy.deepcopy(cache)
    cache.mode = "reuse" if mode == "MAC" else "exact"
    return cache


@contextmanager
def attending(mode: str, share: float) -> Iterator[None]:
    """Decode steps of "mac" models attend in this mode; baselines to a share of the KV."""
    global _chosen
    AttentionInterface.register("mac", _attend)
    _chosen = (mode, share) if mode in ("streaming", "quest") else None
    try:
        yield
    finally:
        _chosen = None
        AttentionInterface.register("mac", mac_attention_forward)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    if _chosen is None or query.shape[2] > 1:
        return mac_attention_forward(module, query, key, value, mask, **options)
    name, share = _chosen
    n, heads = key.shape[2], key.shape[1]
    count = max(PAGE, round(share * n))
    rows = query[0].unflatten(0, (heads, -1))[:, :, 0]  # [Hkv, G, D]
    if name == "streaming":
        near = count - SINKS
        k, v = (torch.cat([t[0, :, :SINKS], t[0, :, -near:]], dim=1) for t in (key, value))
        out = scaled_dot_product_attention(rows, k, v, scale=options.get("scaling"))
    else:
        kept = _quest_pages(rows, key[0], count)[:, None]  # [Hkv, 1, n]
        out = scaled_dot_product_attention(
            rows, key[0], value[0], attn_mask=kept, scale=options.get("scaling")
        )
    return out.flatten(0, 1)[None, None], None


def _quest_pages(rows: Tensor, key: Tensor, count: int) -> Tensor:
    """Mask `[Hkv, n]` of the pages that Quest reads, the newest always, for a whole group."""
    n = key.shape[1]
    pages = n // PAGE  # whole ones; the newest tokens beyond them are kept
    paged = key[:, : pages * PAGE].unflatten(1, (pages, PAGE))
    low, high = paged.amin(2).float(), paged.amax(2).float()
    rows = rows.float() / rows.shape[-1] ** 0.5
    bound = rows.clamp(min=0) @ high.transpose(1, 2) + rows.clamp(max=0) @ low.transpose(1, 2)
    score = bound.log_softmax(-1).amax(1)  # [Hkv, pages]
    best = score.topk(min(pages, max(1, (count - n % PAGE) // PAGE)), dim=-1).indices
    kept = torch.zeros(score.shape, dtype=torch.bool).scatter_(1, best, True)
    kept = kept.repeat_interleave(PAGE, dim=1)
    return torch.nn.functional.pad(kept, (0, n - kept.shape[1]), value=True)
