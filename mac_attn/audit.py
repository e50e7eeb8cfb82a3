"""Watching the error of reuse in production: now and then a step is computed exactly as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops
from ._checks import check_int
from .paging import KVCache


@dataclass(frozen=True, eq=False)
class AuditReport:
    """What an audit has seen so far.

    The error of a query head at a step is |out - exact| / |exact|, with both in the cache's dtype:
    bfloat16 alone rounds by 0.002. Without a step all errors are 0.

    Attributes:
        every: one step in this many was sampled.
        steps: (request, step) pairs sampled, of a step of several query tokens each of them.
        hits: [Hq] int64, sampled pairs in which this head reused.
        error: [Hq] float64, mean error over all sampled pairs: of what the model has seen.
        hit_error: [Hq] float64, mean error over those in which this head reused.
        max_error: [Hq] float64.
    """

    every: int
    steps: int
    hits: Tensor
    error: Tensor
    hit_error: Tensor
    max_error: Tensor

    @property
    def mean_error(self) -> float:
        """`error`, mean over the heads."""
        return float(self.error.mean())

    def __str__(self) -> str:
        return (
            f"{self.steps} steps audited (1 in {self.every}): error {self.mean_error:.4f}, "
            f"{float(self.hit_error.mean()):.4f} on hits, at most {float(self.max_error.max()):.4f}"
        )


class Audit:
    """Samples one step in `every` of each request; `ReuseCache.audit` makes it, `decode` feeds it.

    A request's step is sampled when `seq_len + slot` is a multiple of `every`, so that not all
    requests of a batch are at the same call. That is decided on the device: rows that are not
    sampled are given to the exact kernels as padding. So nothing waits for the device, and a CUDA
    graph samples as well; what it costs without a sampled row is some small launches. Of a step of
    several query tokens each is such a step of its own.

    Attributes:
        sums: [4, Hq] float64: sum of errors, sum of errors on hits, largest error, number of hits.
        steps: [1] int64.
    """

    def __init__(self, every: int, num_qo_heads: int, device: torch.device) -> None:
        self.every = check_int("every", every, low=1)
        self.sums = torch.zeros(4, num_qo_heads, dtype=torch.float64, device=device)
        self.steps = torch.zeros(1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def record(
        self,
        out: Tensor,
        source: Tensor,
        q: Tensor,
        kv_cache: KVCache,
        block_table: Tensor,
        seq_lens: Tensor,
        query_lens: Tensor | None,
        slots: Tensor,
        sinks: Tensor | None = None,
        **attention: Any,
    ) -> None:
        """Compare the sampled rows of a step with exact attention; arguments as in `decode`.

        source: int32, q's shape without the last dimension: the position whose entry each query has
        reused, or -1. `out` is only read.
        """
        if q.dim() == 4:  # each token becomes a row
            tokens = q.size(1)
            seq_lens = _lens_of_tokens(tokens, seq_lens, query_lens)
            block_table, slots = (
                t.unsqueeze(1).expand(-1, tokens, *t.shape[1:]).flatten(0, 1)
                for t in (block_table, slots)
            )
            out, source, q = (t.flatten(0, 1) for t in (out, source, q))
        sampled = (seq_lens > 0) & (slots >= 0) & ((seq_lens + slots) % self.every == 0)
        if out.device.type == "cpu" and not bool(sampled.any()):
            return
        lens = torch.where(sampled, seq_lens, 0)
        amended = ops.amend(q, kv_cache, block_table, lens, **attention)
        exact, _ = ops.complete(amended, lens, dtype=q.dtype, sinks=sinks)
        exact = exact.double()
        error = (out.double() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-30)
        # A request with bad values has NaN in its output; ReuseCache.check tells of it.
        counted = sampled[:, None] & error.isfinite()
        error = error.where(counted, 0.0)
        hit = counted & (source >= 0)
        self.sums[0] += error.sum(0)
        self.sums[1] += error.where(hit, 0.0).sum(0)
        self.sums[2].copy_(torch.maximum(self.sums[2], error.amax(0)))
        self.sums[3] += hit.sum(0)
        self.steps += counted.all(1).sum()

    def report(self) -> AuditReport:
        """The sums as means. Waits for the device."""
        total, on_hits, largest, hits = self.sums.cpu().unbind()
        steps = int(self.steps)
        return AuditReport(
            every=self.every,
            steps=steps,
            hits=hits.long(),
            error=total / max(1, steps),
            hit_error=on_hits / hits.clamp_min(1),
            max_error=largest,
        )


def _lens_of_tokens(tokens: int, seq_lens: Tensor, query_lens: Tensor | None) -> Tensor:
    """What each of T query tokens attends to, [B * T] int32; 0 for those that are not there."""
    token = torch.arange(tokens, dtype=torch.int32, device=seq_lens.device)
    there = tokens if query_lens is None else query_lens.unsqueeze(1)
    lens = seq_lens.unsqueeze(1) - there + token + 1
    return lens.where((token < there) & (seq_lens > 0).unsqueeze(1), 0).flatten()
