"""Other ways to read a part of the KV cache, on the same captured queries, keys and values.

Each chooses tokens for every (step, KV head), as many as its share of the context allows, and
attends to those alone. The query heads that share a KV head share its tokens, so that the share
is what a GPU reads. What a method reads to choose is counted apart (`SEARCH`).

| name | source | what it keeps |
|---|---|---|
| streaming | StreamingLLM, arXiv:2309.17453 | the first 4 tokens and the newest |
| quest | Quest, arXiv:2406.10774 | pages of 16 with the largest bound on any logit, from the
|  | | minimum and maximum of their keys; the newest page |
| h2o | H2O, arXiv:2306.14048 | half of the budget newest tokens, half those with the largest sum of
|  | | attention weights so far; what is evicted never comes back |
| random | | pages of 16 by chance, anew at every step; the newest page |
| oracle | | the tokens with the largest weights at this very step: reads everything to know them |
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mac_attn.calibrate import Capture

NAMES = ("streaming", "quest", "h2o", "random", "oracle")
PAGE = 16
SINKS = 4
# Bytes read to choose, over the bytes of all keys and values: two rows of keys for each page.
SEARCH = {"quest": 2 / (2 * PAGE)}


def errors(captured: Capture, shares: list[float]) -> dict[str, Tensor]:
    """Mean error |out - exact| / |exact| for every baseline: name to `[shares, L, Hq]`."""
    found = {
        name: torch.empty(len(shares), captured.num_layers, captured.num_qo_heads) for name in NAMES
    }
    generator = torch.Generator().manual_seed(0)
    for layer in range(captured.num_layers):
        view = _Layer(captured, layer)
        for i, share in enumerate(shares):
            for name, mask in view.masks(share, generator):
                found[name][i, layer] = view.error(mask)
        for i, mask in enumerate(view.h2o(shares)):
            found["h2o"][i, layer] = view.error(mask)
    return found


class _Layer:
    """Weights of one layer's decode steps over all tokens; masks are `[H, steps, n]`."""

    def __init__(self, captured: Capture, layer: int) -> None:
        heads = (captured.num_kv_heads, -1)
        steps, n = captured.steps, captured.num_tokens
        self.values = captured.v[layer].float().transpose(0, 1)  # [H, n, D]
        self.keys = captured.k[layer].float().transpose(0, 1)
        self.exact = captured.exact[layer].transpose(0, 1).unflatten(0, heads)  # [H, G, steps, D]
        queries = captured.q[layer].float().transpose(0, 1).unflatten(0, heads) * captured.sm_scale
        self.queries = queries[:, :, -steps:]
        self.lens = torch.arange(n - steps + 1, n + 1)
        self.weights = self._weights(self.queries, self.lens)  # [H, G, steps, n]
        prompt_lens = torch.arange(n - captured.q.shape[1] + 1, n - steps + 1)
        self.prompt_weights = self._weights(queries[:, :, :-steps], prompt_lens).sum(
            (1, 2)
        )  # [H, n]

    def _weights(self, queries: Tensor, lens: Tensor) -> Tensor:
        logits = queries @ self.keys.transpose(1, 2)[:, None]
        hidden = torch.arange(logits.shape[-1]) >= lens[:, None]
        return logits.masked_fill_(hidden, -torch.inf).softmax(dim=-1)

    def error(self, mask: Tensor) -> Tensor:
        """`[Hq]`, mean over the steps of attention to a mask's tokens against exact attention."""
        kept = self.weights * mask[:, None]
        out = (kept @ self.values[:, None]) / kept.sum(-1, keepdim=True).clamp_min(1e-30)
        error = (out - self.exact).norm(dim=-1) / self.exact.norm(dim=-1)
        return error.mean(-1).flatten()

    def masks(self, share: float, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """The baselines whose choice at a step does not depend on the steps before."""
        heads, _, steps, n = self.weights.shape
        token, lens = torch.arange(n), self.lens[:, None]
        count = (share * lens).round()  # [steps, 1]
        recent = token >= lens - (count - SINKS)
        yield "streaming", ((recent | (token < SINKS)) & (token < lens)).expand(heads, -1, -1)

        pages = -(-n // PAGE)
        newest = (lens - 1) // PAGE  # [steps, 1]
        # The newest page counts with what it holds.
        count_pages = 1 + ((count - (lens - newest * PAGE)) / PAGE).round().clamp(min=0)
        bound = self._page_bounds(pages)
        chance = torch.rand(heads, steps, pages, generator=generator)
        for name, score in (("quest", bound), ("random", chance)):
            page = torch.arange(pages)
            score = score.masked_fill(page > newest, -torch.inf).masked_fill(
                page == newest, torch.inf
            )
            chosen = _largest(score, count_pages)
            yield name, chosen.repeat_interleave(PAGE, dim=2)[:, :, :n] & (token < lens)
        yield "oracle", _largest(self.weights.amax(1), count) & (token < lens)

    def _page_bounds(self, pages: int) -> Tensor:
        """Quest's upper bound on a page's logits, `[H, steps, pages]`, the largest over a group.

        Heads have logits of different height; each head's are taken over its own log-sum-exp.
        """
        padded = torch.nn.functional.pad(self.keys, (0, 0, 0, pages * PAGE - self.keys.shape[1]))
        paged = padded.unflatten(1, (pages, PAGE))
        low, high = paged.amin(2), paged.amax(2)  # [H, pages, D]
        bound = self.queries.clamp(min=0) @ high.transpose(1, 2)[:, None]
        bound += self.queries.clamp(max=0) @ low.transpose(1, 2)[:, None]
        return bound.log_softmax(-1).amax(1)

    def h2o(self, shares: list[float]) -> Tensor:
        """Masks `[shares, H, steps, n]` of H2O.

        The sums begin with the queries of the prompt that were captured, not with all of it.
        """
        heads, _, steps, n = self.weights.shape
        start = n - steps
        budget = torch.tensor([round(share * (start + n) / 2) for share in shares])[:, None, None]
        total = self.prompt_weights.repeat(len(shares), 1, 1)  # [shares, H, n]
        token = torch.arange(n)
        recent = budget // 2
        old = (token < start - recent).expand(total.shape)
        kept = _largest(total.masked_fill(~old, -torch.inf), budget - recent) & old
        kept |= (token >= start - recent) & (token < start)
        masks = torch.empty(len(shares), heads, steps, n, dtype=torch.bool)
        for step in range(steps):
            length = start + step + 1
            kept[..., length - 1] = True
            # One token too many: the lightest goes, of those that are not among the newest.
            evictable = kept & (token < length - recent)
            lightest = total.masked_fill(~evictable, torch.inf).argmin(-1, keepdim=True)
            kept.scatter_(2, lightest, False)
            masks[:, :, step] = kept
            weights = self.weights[:, :, step] * kept[:, :, None]  # [shares, H, G, n]
            total += (weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)).sum(2)
        return masks


def _largest(score: Tensor, count: Tensor) -> Tensor:
    """Mask of the `count` largest of the last dimension; count is broadcast to all others."""
    most = int(count.max())
    values, index = score.topk(most, dim=-1)
    keep = torch.arange(most) < count
    return torch.zeros(score.shape, dtype=torch.bool).scatter_(-1, index, keep.expand(index.shape))
