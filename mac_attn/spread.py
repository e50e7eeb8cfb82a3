"""How far the keys of a request spread: by that a distance of queries tells what logits do."""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLED = 512  # tokens, evenly over the request


def key_spread(k: Tensor, block_table: Tensor, seq_lens: Tensor) -> Tensor:
    """Variance of a request's keys, mean over their dimensions, float32 `[B, num_kv_heads]`.

    The logits of two queries at distance d from one another differ, over the keys, with a variance
    of about `sm_scale² d² spread`. From evenly spaced tokens; nothing waits for the device.

    Args:
        k: [num_pages, page_size, num_kv_heads, head_dim]; of float8 the spread is its numbers'.
        block_table: [B, max_pages] int32; of a row's pages those outside the cache are not read.
        seq_lens: [B] int32; 0 is a padding row, whose answer means nothing.
    """
    num_pages, page_size = k.shape[:2]
    step = torch.arange(SAMPLED, device=k.device)
    token = (step * seq_lens.clamp(min=0)[:, None].long()) // SAMPLED
    index = (token // page_size).clamp(max=block_table.shape[1] - 1)
    pages = block_table.gather(1, index).long().clamp(0, num_pages - 1)
    # Bytes, as not every device can index float8.
    float8 = k.dtype == torch.float8_e4m3fn
    sampled = (k.view(torch.uint8) if float8 else k)[pages, token % page_size]
    sampled = sampled.view(k.dtype).float()  # [B, SAMPLED, H, D]
    return sampled.var(1, correction=0).mean(-1)
