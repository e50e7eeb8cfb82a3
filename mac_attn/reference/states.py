"""The algebra of attention states, and the tokens of a paged cache as one tensor."""

from __future__ import annotations

import torch
from torch import Tensor

State = tuple[Tensor, Tensor]
KVCache = Tensor | tuple[Tensor, Tensor]
Scale = Tensor | float | None


def attention_logits(q: Tensor, k: Tensor, sm_scale: float, logits_soft_cap: float) -> Tensor:
    """Logits `[G, n]` of queries `[G, D]` over the keys `[n, D]` of their KV head."""
    logits = sm_scale * (q @ k.T)
    return logits_soft_cap * torch.tanh(logits / logits_soft_cap) if logits_soft_cap else logits


def attention_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sm_scale: float,
    logits_soft_cap: float = 0.0,
    counts: Tensor | None = None,
) -> State:
    """Attention state of queries that share a KV head, over a set of n >= 0 tokens.

    q `[G, D]`, k `[n, D]` and v `[n, Dv]`, float64. `logits_soft_cap` 0 is off; else a logit
    becomes `cap * tanh(logit / cap)` (Gemma 2). With `counts` `[n]` a token counts as so
    many. Returns o `[G, Dv]` and lse `[G]` (natural log).
    """
    logits = attention_logits(q, k, sm_scale, logits_soft_cap)
    if counts is not None:
        logits = logits + counts.log()
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.where(lse[:, None] == -torch.inf, 0.0, torch.exp(logits - lse[:, None]))
    return weights @ v, lse


def merge_states(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> State:
    """State of the union of two disjoint sets of tokens; o `[..., D]`, lse `[...]`.

    Commutative and associative, with the empty state `(0, -inf)` as neutral element.
    """
    lse = torch.logaddexp(lse1, lse2)
    # An empty operand weighs nothing; exp(lse1 - lse) would be NaN where both are empty.
    w1 = torch.where(lse1 == -torch.inf, 0.0, torch.exp(lse1 - lse))
    w2 = torch.where(lse2 == -torch.inf, 0.0, torch.exp(lse2 - lse))
    return o1 * w1[..., None] + o2 * w2[..., None], lse


def gather_kv(
    kv_cache: KVCache,
    block_table_row: Tensor,
    n: int,
    kv_layout: str = "NHD",
    scales: tuple[Scale, Scale] = (None, None),
) -> tuple[Tensor, Tensor]:
    """The first n tokens of one request: k and v `[n, num_kv_heads, D]`, float64.

    `kv_cache` is a pair of `[num_pages, page_size, num_kv_heads, D]` (NHD) or `[num_pages,
    num_kv_heads, page_size, D]` (HND), of V with a D of its own, or one tensor with the pair in
    dimension 1. Only the first
    `ceil(n / page_size)` ids of `block_table_row` are looked at. `scales`, of K and V, are what the
    numbers of a float8 cache are multiplied by: one, or one for each KV head.
    """
    pair = kv_cache.unbind(1) if isinstance(kv_cache, Tensor) else kv_cache
    tokens = []
    for pages, scale in zip(pair, scales, strict=True):
        pages = pages.transpose(1, 2) if kv_layout == "HND" else pages
        ids = block_table_row[: -(-n // pages.shape[1])].long()
        numbers = pages[ids].flatten(0, 1)[:n].cpu().double()
        factor = torch.as_tensor(1.0 if scale is None else scale, dtype=torch.float64).cpu()
        tokens.append(numbers * factor.reshape(-1, 1))
    return tokens[0], tokens[1]
