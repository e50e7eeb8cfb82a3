"""Replay of sampled hits in plain PyTorch: decisions of every step, errors of a share of them.

    python bench/sampled.py CAPTURE [--layers 0 8 16] [--rings 128x1024 64x2048] [--drifts 3 4 none]

`bench/replay.py` runs the ops themselves, over hundreds of steps; this replays thousands, float32,
with what the ops do not have as options, and so is where defaults are looked for. Decisions need
only distances of queries, so they are replayed for all (layer, KV head) pairs at once; the errors
of a hit are computed afterwards, densely, for every few of the last steps, with intervals (95%) by
bootstrap over blocks of steps. Samples are priority samples by the exact log-sum-exp: the ops go by
that of the step before. The keys' spread is that of the prompt, as it is when decoding starts.

CAPTURE is a file of `sampled_capture.py`: q and qm (before the rotation) `[L, R, Hq, D]` of the
last R positions, k and v `[L, n, Hkv, D]`, and scale, the factor of the logits.
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from intervals import mean_interval
from torch import Tensor

BLOCK = 16  # steps whose errors are drawn together for an interval


@dataclass(frozen=True)
class Options:
    threshold: float = 0.4
    max_drift: float | None = 4.0
    window: int = 2048
    entries: int = 128
    samples: int = 1024
    band: int = 256
    seeds: int = 0  # how many prompt queries are seeded; 0: as many as there are entries
    seed_over: int = 0  # the last so many positions they are spread over; 0: the last `seeds`
    cost_share: float = 0.5  # a hit only if it reads at most this share of n
    pick: str = "closest"  # or "cheapest": the youngest within the threshold
    warm: int = 10**6  # decode steps before the counted ones (at most what there is)
    mode: str = "priority"  # or "heaviest"
    shared_hash: bool = False
    answers: str = "bounded"  # b: for how many others a token answers; "none": 0, "all": a
    whiten: bool = False  # distances of queries weighed by the keys' deviation
    clamp: float = math.inf
    age_weight: float = 0.0  # of age / n in the score by which an entry is chosen


def sample_size(samples: Any, old: Any) -> Any:
    """How many of `old` tokens a sample keeps at most: a sixth (csrc/sample.h)."""
    return np.clip(old // 6, 1, samples)


class Replay:
    """One capture: `[L, R, Hq, D]` queries, `[L, n, Hkv, D]` keys and values."""

    def __init__(
        self,
        path: str,
        layers: list[int] | None = None,
        count: int = 512,
        stride: int = 4,
        max_window: int = 2048,
    ):
        c = torch.load(path, mmap=True, weights_only=True)
        index = list(range(len(c["k"]))) if layers is None else layers
        self.scale, self.count, self.stride = c["scale"], count, stride
        q, qm, k, v = (c[name][index].float().transpose(1, 2) for name in ("q", "qm", "k", "v"))
        L, Hkv, self.n, self.D = k.shape
        self.R = q.shape[2]
        self.G = q.shape[1] // Hkv
        self.H = L * Hkv
        # [H, G, R, D], [H, n, D]
        self.q = q.reshape(self.H, self.G, self.R, self.D)
        self.qm = qm.reshape(self.H, self.G, self.R, self.D)
        self.k, self.v = k.reshape(self.H, self.n, self.D), v.reshape(self.H, self.n, self.D)
        self.first = self.n - self.R  # position of row 0
        self.max_window = max_window
        self.T = self.R - max_window  # decode steps
        if (least := max_window + count) > self.R:
            raise ValueError(f"{path} has {self.R} rows of queries, must have at least {least}")
        prompt = self.first + max_window
        keys = self.k[:, torch.arange(512) * prompt // 512]
        self.spread = self.scale**2 * keys.var(1, correction=0).mean(-1)
        half = self.D // 2  # a pair of dimensions rotates together
        pairs = self.k[:, :prompt].var(1, correction=0).unflatten(1, (2, half)).mean(1)
        pairs = pairs / pairs.mean(1, keepdim=True)
        self.deviation = torch.cat(
            [pairs, pairs], 1
        ).sqrt()  # [H, D], its squares are 1 in the mean
        self._kept: tuple[Any, np.ndarray] | None = None

    def distances(self, o: Options) -> np.ndarray:
        """[H, T, back]: mean over the heads of |q - q'|² / |q|², a hit if below the threshold.

        Where `max_drift` allows a head less, its |q|² counts as so much less.
        """
        bound = math.inf
        if o.max_drift is not None and o.threshold > 0:
            bound = o.max_drift / o.threshold
        if self._kept is None or self._kept[0] != (bound, o.whiten):
            self._kept = None  # its memory first
            self._kept = (bound, o.whiten), self._distances(bound, o.whiten)
        return self._kept[1]

    def _distances(self, bound: float, whiten: bool) -> np.ndarray:
        T, W = self.T, self.max_window
        out = np.full((self.H, T, W + 1), 60000, dtype=np.float16)
        for h in range(self.H):
            x = self.qm[h] * self.deviation[h] if whiten else self.qm[h]
            norm = x.square().sum(-1)
            allowed = norm.clamp(max=bound / float(self.spread[h]))
            for t0 in range(0, T, 256):
                t1 = min(T, t0 + 256)
                lo, hi = t0, t1 + W  # rows
                now = slice(W + t0, W + t1)
                d = (
                    norm[:, lo:hi][:, None]
                    + norm[:, now][:, :, None]
                    - 2 * x[:, now] @ x[:, lo:hi].mT
                )
                d = (d / allowed[:, now][:, :, None]).mean(0)
                # p is row W + t; an entry b back is row W + t - b, so column (t - t0) + W - b.
                col = torch.arange(t1 - t0)[:, None] + W - torch.arange(W + 1)[None]
                out[h, t0:t1] = d.gather(1, col).clamp(0, 60000).half().numpy()
        return out

    def decide(self, o: Options) -> np.ndarray:
        """Back (p - c, 0 for a miss) of every decode step [T, H]."""
        H, T, W = self.H, self.T, self.max_window
        dist = self.distances(o)
        M = min(o.entries, W + 1)
        window = min(o.window, W)
        start = max(0, T - self.count - o.warm)
        seeds = o.seeds or min(M, window)
        over = o.seed_over or seeds
        rows = np.unique(
            np.round(np.linspace(start + W - over, start + W - 1, seeds)).astype(np.int64)
        )
        ring = np.full((H, M), -(10**9), dtype=np.int64)
        rows = rows[-M:]
        ring[:, : len(rows)] = rows
        stored = np.full(H, len(rows))
        back = np.zeros((T, H), dtype=np.int64)
        heads = np.arange(H)
        for t in range(start, T):
            row = W + t
            n = self.first + row + 1
            b = row - ring  # [H, M]
            ok = b <= window
            size = sample_size(o.samples, n - o.band) if o.mode == "priority" else 0
            ok &= b + o.band + size <= o.cost_share * n
            bc = np.where(ok, b, 0)
            d = dist[heads[:, None], t, bc]
            hit = ok & (d < o.threshold)
            if o.pick == "closest":
                d = np.where(hit, d + o.age_weight * b / n, 65000)
                j = d.argmin(1)
            else:
                j = np.where(hit, b, 10**9).argmin(1)
            got = hit[heads, j]
            back[t] = np.where(got, b[heads, j], 0)
            miss = np.nonzero(~got)[0]
            ring[miss, stored[miss] % M] = row
            stored[miss] += 1
        return back

    def evaluate(self, o: Options, back: np.ndarray, draws: int = 1) -> dict[str, Any]:
        """Error of every `stride`-th of the last `count` steps, full reads and reads of all."""
        t_all = np.arange(self.T - self.count, self.T)
        steps = t_all[:: self.stride]
        error = torch.zeros(len(steps), self.H, draws * self.G)  # 0 where it misses
        for h in range(self.H):
            hits = np.nonzero(back[steps, h])[0]
            for i in np.split(hits, range(64, len(hits), 64)):
                rp = torch.as_tensor(steps[i] + self.max_window)
                rc = rp - torch.as_tensor(back[steps[i], h])
                if len(i):
                    error[i, h] = self._hits(o, h, rp, rc, draws)
        means = error.mean((1, 2)).split(BLOCK)
        mean, low, high = mean_interval([block.tolist() for block in means])
        miss = back[t_all] == 0
        n = (self.first + self.max_window + t_all + 1)[:, None]
        fresh = o.band + back[t_all]
        size = sample_size(o.samples, n - fresh) if o.mode == "priority" else o.samples
        read = np.where(miss, n, np.minimum(n, fresh + size)) / n
        p99, p999 = np.quantile(error.numpy(), (0.99, 0.999))
        return dict(
            full=float(miss.mean()),
            error=mean,
            low=low,
            high=high,
            p99=float(p99),
            p999=float(p999),
            read=float(read.mean()),
            back=float(back[t_all][~miss].mean()) if (~miss).any() else 0.0,
        )

    def _hits(self, o: Options, h: int, rp: Tensor, rc: Tensor, draws: int) -> Tensor:
        """Errors `[B, draws * G]` of hits of the rows rp on entries of the rows rc."""
        token = torch.arange(self.n)
        q, k, v = self.q[h], self.k[h], self.v[h]
        pp, pc = rp + self.first, rc + self.first
        sp = (self.scale * q[:, rp]) @ k.T  # [G, B, n]
        sc = (self.scale * q[:, rc]) @ k.T
        sp.masked_fill_(token > pp[:, None], -torch.inf)
        sc.masked_fill_(token > pc[:, None], -torch.inf)
        lse_p, lse_c = sp.logsumexp(-1, keepdim=True), sc.logsumexp(-1, keepdim=True)
        wp, wc = (sp - lse_p).exp_(), (sc - lse_c).exp_()
        exact = wp @ v
        end = (pc + 1 - o.band)[:, None]
        old = token < end  # [B, n]
        w = wc.amax(0) * old  # [B, n]
        norm = exact.norm(dim=-1)
        # (lse ratio between p and c cancels in none of the sums: keep it)
        shift = lse_p - lse_c  # log units: sums of c times exp(-shift) are in units of p's
        most = min(o.samples, w.shape[1] - 1)
        size = (end // 6).clamp(1, most) if o.mode == "priority" else torch.full_like(end, most)
        errors = []
        for draw in range(draws):
            if o.shared_hash:
                gen = torch.Generator().manual_seed(1000 * draw + h)
                u = (1 - torch.rand(w.shape[1], generator=gen))[None]
            else:
                gen = torch.Generator().manual_seed(100_000 * draw + 1000 * h + int(rp[0]))
                u = 1 - torch.rand(w.shape, generator=gen)
            key = w if o.mode == "heaviest" else w / u
            tau = key.topk(most + 1, dim=-1).values.gather(1, size)
            inside = (key > tau) & old
            a = torch.zeros_like(w)
            if o.mode == "priority":
                a = (tau / w - 1).clamp_(min=0).masked_fill_(~inside, 0)
            b = {"none": 0 * a, "all": a, "bounded": a / (1 + a * (size / end))}[o.answers]
            rest = old & ~inside
            num, den = (wp * a).sum(-1, keepdim=True), (wc * a).sum(-1, keepdim=True)
            rho = torch.where(den > 0, num / den * shift.exp(), 1.0)
            rho = rho.clamp(1 / o.clamp, o.clamp) if math.isfinite(o.clamp) else rho
            f = rho * torch.exp(-shift)
            kept = wc * (rest.float() - b)  # what a sampled token answers for it takes over
            fresh = wp * ((~rest).float() + b)
            sums = kept @ v * f + fresh @ v
            out = sums / (kept.sum(-1, keepdim=True) * f + fresh.sum(-1, keepdim=True))
            errors.append((out - exact).norm(dim=-1) / norm)
        return torch.cat(errors).T


def show(name: str, r: dict[str, Any]) -> None:
    print(
        f"{name:36} full {r['full']:6.1%} error {r['error']:.4f} [{r['low']:.4f}, {r['high']:.4f}] "
        f"p99 {r['p99']:.3f} p999 {r['p999']:.3f} read {r['read']:.1%} back {r['back']:.0f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capture")
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--rings", type=_ring, nargs="+", default=[(128, 1024)], help="128x1024")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.4])
    parser.add_argument("--drifts", type=_drift, nargs="+", default=[4.0], help="or none: no bound")
    parser.add_argument("--answers", choices=("bounded", "none", "all"), default="bounded")
    parser.add_argument("--whiten", action="store_true", help="queries, by the keys' deviation")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--stride", type=int, default=16, help="steps whose errors are computed")
    given = parser.parse_args()
    replay = Replay(given.capture, given.layers, stride=given.stride, max_window=given.window)
    before = Options(
        threshold=0.1,
        max_drift=None,
        window=512,
        entries=512,
        samples=64,
        mode="heaviest",
        cost_share=1.0,
    )
    show("before: 0.1, 64 heaviest", replay.evaluate(before, replay.decide(before)))
    for threshold, drift in itertools.product(given.thresholds, given.drifts):
        for entries, samples in given.rings:
            o = Options(
                threshold=threshold,
                max_drift=drift,
                window=given.window,
                entries=entries,
                samples=samples,
                seed_over=given.window,
                answers=given.answers,
                whiten=given.whiten,
            )
            name = f"{threshold}, drift {drift}, {entries} x {samples}"
            show(name, replay.evaluate(o, replay.decide(o)))


def _ring(text: str) -> tuple[int, int]:
    entries, samples = text.split("x")
    return int(entries), int(samples)


def _drift(text: str) -> float | None:
    return None if text == "none" else float(text)


if __name__ == "__main__":
    main()
