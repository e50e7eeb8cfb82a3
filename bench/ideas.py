"""Ideas beyond the algorithm, tried on captured queries: what they would change, at equal reads.

    python bench/ideas.py [--texts prose] [--layers 10]

Distance: other vectors to match by, through the real ops (`q_match` may be any vector).
- post-RoPE: the rotated query;
- key metric: the query times the square root of its KV head's key covariance, so that a distance
  is the spread of the difference of logits over the context.

Estimate: what a hit takes over, in a dense computation of its own. With `max_reuse_depth=1` the
reused state is always that of a miss, so it can be computed for all steps at once.
- plain: the algorithm as it is, a check of the computation against the ops;
- first order: the reused log-sum-exp moves by sm_scale * (q_p - q_c) . m_c, where m_c is the
  mean key under c's weights (stored with the entry, another head_dim floats a head);
- two neighbours: the mean of the two best entries' states, both exact to their own query;
- true lse: the reused mean of values with the log-sum-exp that it should have: a bound for all
  corrections of the log-sum-exp.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import texts
import torch
from replay import default_cache, load_capture
from torch import Tensor

import mac_attn
from mac_attn import ReuseConfig
from mac_attn.calibrate import Capture, Replayer

BASE = ReuseConfig()
THRESHOLDS = (0.05, 0.1, 0.2, 0.4)


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
    for text in options.texts:
        captured = load_capture(text, 5120, 512, options.model, options.cache)
        every = max(1, captured.num_layers // options.layers)
        captured = captured.layers(list(range(0, captured.num_layers, every)))
        print(
            f"\n{text}, every {every}th layer\ndistance     threshold  error  full reads  KV read"
        )
        rows = {
            "pre-RoPE": captured.q_match,
            "post-RoPE": captured.q,
            "key metric": key_metric(captured),
        }
        for name, q_match in rows.items():
            replayer = Replayer(replace(captured, q_match=q_match))
            for threshold in THRESHOLDS:
                run = replayer(replace(BASE, threshold=threshold))
                print(
                    f"{name:12} {threshold:9.2f} {run.mean_error:6.4f} "
                    f"{run.full_read_share:11.1%} {run.kv_read_share:8.1%}",
                    flush=True,
                )
        print("estimate         threshold  error  error of hits")
        replayer = Replayer(captured)
        for threshold in (0.2, 0.4):
            config = replace(BASE, threshold=threshold)
            run = replayer(config)
            print(f"{'(ops)':16} {threshold:9.2f} {run.mean_error:6.4f}")
            for name, error in estimates(captured, config, run.source).items():
                hit = run.source.permute(1, 2, 0) >= 0
                print(
                    f"{name:16} {threshold:9.2f} {float(error.mean()):6.4f} "
                    f"{float(error[hit].mean()):14.4f}",
                    flush=True,
                )


def key_metric(captured: Capture) -> Tensor:
    """`q_match` times the square root of the covariance of its KV head's keys before the rotation.

    The rotation turns pairs of dimensions, so that the covariance of both dimensions of a pair is
    mixed over the context: only the mean of the two variances counts, for each pair.
    """
    half = captured.head_dim // 2
    variance = captured.k.float().var(dim=1)  # [L, Hkv, D], rotated keys: pairs (i, i + D / 2)
    pair = (variance[..., :half] + variance[..., half:]) / 2
    scale = torch.cat([pair, pair], dim=-1).sqrt()
    scale = scale / scale.mean(dim=-1, keepdim=True)
    group = captured.num_qo_heads // captured.num_kv_heads
    scale = scale.repeat_interleave(group, dim=1)[:, None]  # [L, 1, Hq, D]
    return (captured.q_match.float() * scale).to(captured.q_match.dtype)


def estimates(captured: Capture, config: ReuseConfig, source: Tensor) -> dict[str, Tensor]:
    """Errors `[L, Hq, steps]` of each estimate for the matches `source` [steps, L, Hq]."""
    layers = [_layer(captured, config, layer, source[:, layer]) for layer in range(len(captured.k))]
    return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}


def _layer(captured: Capture, config: ReuseConfig, layer: int, source: Tensor) -> dict[str, Tensor]:
    heads, steps = (captured.num_kv_heads, -1), captured.steps
    n, rows = captured.num_tokens, captured.q.shape[1]
    token, first = torch.arange(n), captured.num_tokens - rows
    k, v = (t[layer].float().transpose(0, 1)[:, None] for t in (captured.k, captured.v))
    q = captured.q[layer].float().transpose(0, 1).unflatten(0, heads)  # [H, G, rows, D]
    logits = captured.sm_scale * q @ k.transpose(2, 3)
    position = torch.arange(first, n)
    logits.masked_fill_(token > position[:, None], -torch.inf)

    # Entries of all captured positions: anchors, and the state of [0, E) without them.
    end = (position + 1 - config.band)[:, None]
    weight = logits.softmax(-1).amax(1).masked_fill(token >= end, -1.0)  # [H, rows, n]
    anchors = torch.zeros(weight.shape, dtype=torch.bool)
    anchors.scatter_(2, weight.topk(config.anchors, dim=-1).indices, True)
    old = logits.masked_fill(((token >= end) | anchors)[:, None], -torch.inf)
    lse = old.logsumexp(-1)
    old = old.softmax(-1)
    out, mean_key = old @ v, old @ k
    del old, weight

    at = source.unflatten(1, heads)[..., 0].T - first  # [H, steps] row of the entry
    hit = at >= 0
    exact = captured.exact[layer].transpose(0, 1).unflatten(0, heads)
    now = logits[:, :, -steps:]

    def result(rows_of: Tensor, kind: str) -> Tensor:
        """Outputs `[H, G, steps, D]` with the entries in these rows `[H, steps]`."""
        index = rows_of.clamp(min=0)
        pick = index[:, None, :, None]
        group = q.shape[1]

        def take(t: Tensor) -> Tensor:
            return t.gather(2, pick.expand(-1, group, -1, t.shape[-1]))

        fresh = (
            token >= end[index] if index.dim() == 1 else token >= end.squeeze(1)[index][..., None]
        )
        fresh = fresh | anchors.gather(1, index[..., None].expand(-1, -1, n))
        new = now.masked_fill(~fresh[:, None], -torch.inf)
        reused_out, reused_lse = take(out), take(lse[..., None])[..., 0]
        if kind == "first order":
            moved = (q[:, :, -steps:] - take(q)) * take(mean_key)
            reused_lse = reused_lse + captured.sm_scale * moved.sum(-1)
        if kind == "true lse":
            reused_lse = now.masked_fill(fresh[:, None], -torch.inf).logsumexp(-1)
        new_out, new_lse = new.softmax(-1) @ v, new.logsumexp(-1)
        return mac_attn.merge_states(reused_out, reused_lse, new_out, new_lse)[0]

    def error(answer: Tensor) -> Tensor:
        answer = torch.where(hit[:, None, :, None], answer, exact)
        return ((answer - exact).norm(dim=-1) / exact.norm(dim=-1)).flatten(0, 1)

    plain = result(at, "plain")
    second = _second_best(captured, layer, at, first)
    both = torch.where(
        (second >= 0)[:, None, :, None], (plain + result(second, "plain")) / 2, plain
    )
    return {
        "plain": error(plain),
        "first order": error(result(at, "first order")),
        "two neighbours": error(both),
        "true lse": error(result(at, "true lse")),
    }


def _second_best(captured: Capture, layer: int, at: Tensor, first: int) -> Tensor:
    """Row of the nearest entry of the prompt besides the matched one, `[H, steps]`; -1 for none."""
    heads, steps = (captured.num_kv_heads, -1), captured.steps
    rows = captured.q.shape[1]
    q = captured.q_match[layer].float().transpose(0, 1).unflatten(0, heads)
    distance = torch.cdist(q[:, :, -steps:], q).square()
    score = (distance / q[:, :, -steps:].square().sum(-1, keepdim=True)).mean(1)  # [H, steps, rows]
    row = torch.arange(rows)
    now = torch.arange(rows - steps, rows)[:, None]
    # In the window, of the prompt (those have depth 0), and another one.
    allowed = (row >= now - 512) & (row < rows - steps)
    score = score.masked_fill(~allowed, torch.inf)
    score.scatter_(2, at.clamp(min=0)[..., None], torch.inf)
    best = score.min(-1)
    return torch.where(best.values < 1, best.indices, -1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", nargs="+", default=["prose"], choices=texts.NAMES)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--model", type=Path, help="a folder; default: SmolLM2 from its wheel")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of captures")
    return parser


if __name__ == "__main__":
    main()
