"""Whether a sampled hit estimates what it should: many hashes of one pair of queries.

Every KV head of every layer holds the same keys and values and is asked the same, so that they
differ in nothing but the hash.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import one_thread, small_config
from torch import Tensor

import mac_attn
from mac_attn import reference
from mac_attn.reference import ReferenceReuse

KV_HEADS, LAYERS = 40, 25  # 1,000 hashes
GROUP, HEAD_DIM, BAND, LENGTH = 2, 64, 16, 300


class Problem:
    """An old query q_c, a new one near it, and what the new one should answer.

    Keys are such that some ten of the old tokens are heavy. `count` is how many candidates tau lets
    through on average, of which S are kept.
    """

    def __init__(self, anchors: int, count: float, device: torch.device, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.k, self.v = normal(LENGTH + 2, HEAD_DIM), normal(LENGTH + 2, HEAD_DIM)
        self.q_c = (normal(GROUP, HEAD_DIM) * 1.5).to(dtype)
        self.q_p = (self.q_c + 0.3 * normal(GROUP, HEAD_DIM)).to(dtype)
        self.old = LENGTH + 1 - BAND  # E(c), c = LENGTH
        self.cfg = small_config(
            anchors=anchors, entries=4, window=8, band=BAND, threshold=0.5, min_context=1
        )
        self.device, self.dtype = device, dtype
        self.now, self.then = (
            self.logits(q, self.k) for q in (self.q_p, self.q_c)
        )  # [G, LENGTH + 2]
        # The step before c asks the same, over one token less.
        self.last_lse = self.then[:, :LENGTH].logsumexp(-1)
        self.weight = torch.exp(self.then[:, : self.old] - self.last_lse[:, None]).amax(0)
        low, high = 1e-6, 1.0
        for _ in range(60):
            middle = (low * high) ** 0.5
            more = (self.weight / middle).clamp(max=1).sum() > count
            low, high = (middle, high) if more else (low, middle)
        self.tau = low

    @staticmethod
    def logits(q: Tensor, k: Tensor) -> Tensor:
        return q.double() @ k.double().T / HEAD_DIM**0.5

    def steps(self) -> list[tuple[int, Tensor]]:
        """Lengths and queries: one that leaves a log-sum-exp, the miss at c, the hit."""
        return [(LENGTH, self.q_c), (LENGTH + 1, self.q_c), (LENGTH + 2, self.q_p)]

    def call(self, n: int, q: Tensor) -> tuple[tuple, dict]:
        """Arguments of a decode step in which all KV heads are alike."""
        pages = [
            x[None, :, None].expand(1, -1, KV_HEADS, -1).contiguous() for x in (self.k, self.v)
        ]
        ints = [torch.tensor(x, dtype=torch.int32) for x in ([[0]], [n], [0])]
        table, lens, slots = (x.to(self.device) for x in ints)
        q = q.repeat(KV_HEADS, 1)[None].to(self.device)
        kv = tuple(x.to(self.device) for x in pages)
        q_match = q if n > LENGTH else -q  # the first of the three resembles none
        return (q, kv, table, lens), {"slots": slots, "q_match": q_match}

    def shape(self) -> dict[str, int]:
        return {"num_slots": 1, "num_qo_heads": KV_HEADS * GROUP, "num_kv_heads": KV_HEADS}


@dataclass
class Draws:
    """Samples of N hashes, and what a hit answered with each."""

    anchors: Tensor  # [N, S], -1 is unused
    weights: Tensor  # [N, S]
    out: Tensor  # [N, G, D]


def reference_draws(problem: Problem) -> Draws:
    """By the reference."""
    found = []
    for layer in range(LAYERS):
        reuse = ReferenceReuse(problem.cfg, **problem.shape(), layer=layer)
        for n, q in problem.steps():
            for ring in reuse.slots[0].rings:
                ring.tau = problem.tau
            args, rows = problem.call(n, q)
            with one_thread():
                step = reference.decode(*args, **rows, reuse=reuse)
        entries = [reuse.entries(0, head)[LENGTH] for head in range(KV_HEADS)]
        pad = problem.cfg.anchors
        anchors = torch.full((KV_HEADS, pad), -1)
        weights = torch.zeros(KV_HEADS, pad, dtype=torch.float64)
        for head, entry in enumerate(entries):
            anchors[head, : len(entry.anchors)] = entry.anchors
            weights[head, : len(entry.anchors)] = entry.weights
        assert (step.source == LENGTH).all()
        found.append((anchors, weights, step.out[0].unflatten(0, (KV_HEADS, GROUP))))
    return Draws(*(torch.cat(part) for part in zip(*found, strict=True)))


def backend_draws(problem: Problem) -> Draws:
    """By the kernels."""
    found = []
    for layer in range(LAYERS):
        cache = mac_attn.ReuseCache(
            problem.cfg, **problem.shape(), head_dim=HEAD_DIM, dtype=problem.dtype,
            device=problem.device, layer=layer,
        )  # fmt: skip
        for n, q in problem.steps():
            cache.ring_tau.fill_(problem.tau)
            args, rows = problem.call(n, q)
            out = mac_attn.decode(*args, **rows, reuse=cache)
        assert cache.stats().kv_head_hits == KV_HEADS
        place = int((cache.ring_position[0, 0] == LENGTH).nonzero())
        assert (cache.ring_position[0, :, place] == LENGTH).all()
        anchors, weights = (
            t[0, :, place].cpu() for t in (cache.ring_anchors, cache.ring_anchor_weights)
        )
        found.append(
            (anchors.long(), weights.double(), out[0].unflatten(0, (KV_HEADS, GROUP)).cpu())
        )
    return Draws(*(torch.cat(part) for part in zip(*found, strict=True)))


def check(problem: Problem, draws: Draws, rounding: float) -> None:
    """Assert that the sample's sums are unbiased, and the hit's estimates but for the quotient's.

    `rounding` is what the backend's outputs may be off by.
    """
    count, old = len(draws.anchors), problem.old
    assert count == KV_HEADS * LAYERS
    kept = torch.zeros(count, old + 1, dtype=torch.float64)  # 1 / pi of the kept; -1 goes last
    used = draws.anchors >= 0
    at = torch.where(used, draws.anchors, old)
    kept.scatter_(1, at, 1 + draws.weights)
    lifted = kept[:, :old]
    taken = lifted > 0
    check_unbiased(lifted - 1, taken.double().mean(0) > 0.03, "1 / pi")

    a = torch.where(taken, lifted - 1, 0.0)
    ratios, exact = [], []
    for name, logits in (("numerator", problem.now), ("denominator", problem.then)):
        terms = logits[:, None, :old].exp()  # [G, 1, E]
        estimate, rest = (a * terms).sum(-1), (~taken * terms).sum(-1)  # [G, N]
        check_unbiased((estimate - rest).T, None, name)
        ratios.append(estimate)
        exact.append(rest)
    ratio, truth = ratios[0] / ratios[1], exact[0] / exact[1]
    check_bias(ratio - truth, "rho")

    size = min(problem.cfg.anchors, old // 6)
    counts = torch.where(taken, 1 + 1 / (1 / a + size / old), 0.0)
    error = []  # what the output is off by, beside the exact one
    for g in range(GROUP):
        now, then = problem.now[g].exp(), problem.then[g, :old].exp()
        weights = counts * now[:old] + ratio[g][:, None] * (1 - counts) * then
        weights = torch.cat([weights, now[old:].expand(count, -1)], dim=-1)
        want = weights @ problem.v.double() / weights.sum(-1, keepdim=True)
        off = (draws.out[:, g].double() - want).abs().max()
        assert off < rounding, f"out of head {g} is not that of its sample: {off}"
        error.append(draws.out[:, g].double() - now @ problem.v.double() / now.sum())
    check_bias(torch.stack(error).permute(0, 2, 1), "out")


def check_unbiased(samples: Tensor, which: Tensor | None, what: str) -> None:
    """Assert that samples `[N, K]` have mean 0 within their standard errors, all K together too."""
    z = samples.mean(0) / (samples.std(0) / len(samples) ** 0.5)
    certain = samples.abs().amax(0) < 1e-5  # a token kept by all: 1 / pi is 1
    z = z[~certain if which is None else which & ~certain]
    assert len(z) and z.abs().max() < 4.5, f"{what} is biased: {z}"
    if len(z) > 20:
        assert 0.7 < z.square().mean() < 1.4, f"{what} is biased: {z.square().mean()}"


def check_bias(errors: Tensor, what: str) -> None:
    """Assert that the mean of errors `[..., N]` is below a third of their spread."""
    bias = errors.mean(-1).square().sum().sqrt()
    spread = errors.square().mean(-1).sum().sqrt()
    assert bias < spread / 3, f"{what}: bias {bias}, spread {spread}"
