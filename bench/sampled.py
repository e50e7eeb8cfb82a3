"""Replay of sampled hits in plain PyTorch: decisions of every step, errors of a share of them.

    python bench/sampled.py CAPTURE [--layers 0 8 16] [--entries 128] [--samples 1024 2048]

`bench/replay.py` runs the ops themselves, over hundreds of steps; this replays thousands, float32,
with what the ops do not have as options, and so is where defaults are looked for. Decisions need
only distances of queries, so they are replayed for all (layer, KV head) pairs at once; the errors
of a hit are computed afterwards, densely, for every few of the last steps. Samples are priority
samples by the exact log-sum-exp: the ops go by that of the step before.

CAPTURE is a file of `sampled_capture.py`: q and qm (before the rotation) `[L, R, Hq, D]` of the
last R positions, k and v `[L, n, Hkv, D]`, and scale, the factor of the logits.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    threshold: float = 0.25
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
        metric: str = "mean",
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
        self.dist = self._distances(metric)

    def _distances(self, metric: str) -> np.ndarray:
        T, W = self.T, self.max_window
        out = np.full((self.H, T, W + 1), 60000, dtype=np.float16)  # [.., back]
        for h in range(self.H):
            x = self.qm[h]
            norm = x.square().sum(-1)
            for t0 in range(0, T, 256):
                t1 = min(T, t0 + 256)
                lo, hi = t0, t1 + W  # rows
                now = x[:, W + t0 : W + t1]
                d = (
                    norm[:, lo:hi][:, None]
                    + norm[:, W + t0 : W + t1][:, :, None]
                    - 2 * now @ x[:, lo:hi].mT
                )
                d = d / norm[:, W + t0 : W + t1][:, :, None]
                d = d.mean(0) if metric == "mean" else d.amax(0)
                # p is row W + t; an entry b back is row W + t - b, so column (t - t0) + W - b.
                col = torch.arange(t1 - t0)[:, None] + W - torch.arange(W + 1)[None]
                out[h, t0:t1] = d.gather(1, col).clamp(0, 60000).half().numpy()
        return out

    def decide(self, o: Options) -> np.ndarray:
        """Back (p - c, 0 for a miss) of every decode step [T, H]."""
        H, T, W = self.H, self.T, self.max_window
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
            d = self.dist[heads[:, None], t, bc]
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

    def evaluate(
        self,
        o: Options,
        back: np.ndarray,
        samples: list[int] | None = None,
        draws: int = 1,
    ) -> list[dict[str, Any]]:
        """Mean and p99 error, full reads, reads; one row per S in `samples`."""
        samples = samples or [o.samples]
        t_all = np.arange(self.T - self.count, self.T)
        steps = t_all[:: self.stride]
        errors: dict[int, list[Tensor]] = {S: [] for S in samples}
        zeros = 0
        token = torch.arange(self.n)
        for h in range(self.H):
            ts = steps[back[steps, h] > 0]
            zeros += (len(steps) - len(ts)) * self.G
            for i0 in range(0, len(ts), 64):
                tt = torch.as_tensor(ts[i0 : i0 + 64])
                rp = tt + self.max_window
                rc = rp - torch.as_tensor(back[ts[i0 : i0 + 64], h])
                self._hits(o, h, rp, rc, token, samples, errors, draws)
        rows = []
        miss = back[t_all] == 0
        full = float(miss.mean())
        nbar = self.first + self.max_window + t_all + 1
        for S in samples:
            e = torch.cat(errors[S]) if errors[S] else torch.zeros(1)
            total = e.numel() + zeros * draws
            allerr = torch.cat([e, torch.zeros(zeros * draws)])
            fresh = o.band + back[t_all]
            size = sample_size(S, nbar[:, None] - fresh) if S else 0
            read = np.where(miss, nbar[:, None], np.minimum(nbar[:, None], fresh + size))
            rows.append(
                dict(
                    S=S,
                    full=full,
                    error=float(e.sum()) / total,
                    p99=float(allerr.quantile(0.99)) if allerr.numel() < 16_000_000 else -1,
                    p999=float(np.quantile(allerr.numpy(), 0.999)),
                    hit_error=float(e.mean()),
                    read=float((read / nbar[:, None]).mean()),
                    back=float(back[t_all][~miss].mean()) if (~miss).any() else 0.0,
                )
            )
        return rows

    def _hits(
        self,
        o: Options,
        h: int,
        rp: Tensor,
        rc: Tensor,
        token: Tensor,
        samples: list[int],
        errors: dict[int, list[Tensor]],
        draws: int,
    ) -> None:
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
        most = min(max(samples), w.shape[1] - 1)
        for draw in range(draws):
            if o.shared_hash:
                gen = torch.Generator().manual_seed(1000 * draw + h)
                u = (1 - torch.rand(w.shape[1], generator=gen))[None]
            else:
                gen = torch.Generator().manual_seed(100_000 * draw + 1000 * h + int(rp[0]))
                u = 1 - torch.rand(w.shape, generator=gen)
            key = w if o.mode == "heaviest" else w / u
            top = key.topk(most + 1, dim=-1)
            for S in samples:
                a = b = None
                if S == 0:
                    inside = torch.zeros_like(old)
                else:
                    size = (end // 6).clamp(1, min(S, most)) if o.mode == "priority" else None
                    tau = top.values[:, S:][:, :1] if size is None else top.values.gather(1, size)
                    inside = (key > tau) & old
                    if size is not None:
                        a = (tau / w - 1).clamp_(min=0).masked_fill_(~inside, 0)
                        b = a / (1 + a * (size / end))
                rest = old & ~inside
                mass_c = (wc * rest).sum(-1, keepdim=True)
                mean_c = (wc * rest) @ v
                if a is not None:
                    num, den = (wp * a).sum(-1, keepdim=True), (wc * a).sum(-1, keepdim=True)
                    rho = torch.where(
                        den > 0, num / den * torch.exp(shift), torch.exp(torch.zeros_like(shift))
                    )
                else:
                    rho = torch.ones_like(shift)
                if math.isfinite(o.clamp):
                    rho = rho.clamp(1 / o.clamp, o.clamp)
                f = rho * torch.exp(-shift)
                fresh = wp * ~rest
                if b is not None:  # what the sample answers for besides itself
                    left = wc * b
                    mass_c, mean_c = mass_c - left.sum(-1, keepdim=True), mean_c - left @ v
                    fresh = fresh + wp * b
                out = (mean_c * f + fresh @ v) / (mass_c * f + fresh.sum(-1, keepdim=True))
                errors[S].append(((out - exact).norm(dim=-1) / norm).flatten())


def show(name: str, rows: list[dict[str, Any]]) -> None:
    for r in rows:
        print(
            f"{name:24} S {r['S']:5} full {r['full']:6.1%} error {r['error']:.4f} "
            f"p99 {r['p99']:.3f} p999 {r['p999']:.3f} hits {r['hit_error']:.4f} "
            f"read {r['read']:.1%} back {r['back']:.0f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capture")
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--entries", type=int, nargs="+", default=[128])
    parser.add_argument("--samples", type=int, nargs="+", default=[1024])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.2, 0.25, 0.3, 0.4])
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--stride", type=int, default=16, help="steps whose errors are computed")
    given = parser.parse_args()
    replay = Replay(given.capture, given.layers, stride=given.stride, max_window=given.window)
    before = Options(
        threshold=0.1, window=512, entries=512, samples=64, mode="heaviest", cost_share=1.0
    )
    show("0.1, 64 heaviest", replay.evaluate(before, replay.decide(before), [64]))
    for entries in given.entries:
        for threshold in given.thresholds:
            o = Options(
                threshold=threshold,
                window=given.window,
                entries=entries,
                samples=min(given.samples),
                seed_over=given.window,
            )
            name = f"{threshold}, M {entries}"
            show(name, replay.evaluate(o, replay.decide(o), given.samples))


if __name__ == "__main__":
    main()
