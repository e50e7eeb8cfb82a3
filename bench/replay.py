"""Error against KV read: decoding of a real model's texts again, under many options and baselines.

    python bench/replay.py [--texts prose code ...] [--model FOLDER] [--json FILE] [--png FILE]

Queries, keys and values come from one forward pass over each text (kept in a cache folder); the
last `--steps` positions are then decoded through match, amend and complete, every layer a request,
with rings seeded as after a prefill. Error: |out - exact| / |exact| of a query head, mean over
steps, layers and heads. `baselines.py` says what the baselines are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import baselines
import texts
import torch

from mac_attn import ReuseConfig
from mac_attn.calibrate import Capture, Replayed, Replayer, capture
from mac_attn.info import info

SHARES = (0.15, 0.2, 0.3, 0.4, 0.5, 0.7)  # of the KV cache, for the baselines
TARGET = 0.3  # of (step, KV head) pairs read in full, where MAC and the paper's scheme are compared

OURS = ReuseConfig()
HEADS = replace(OURS, anchors=0, granularity="head", max_reuse_depth=None)
RELATIVE = (0.1, 0.2, 0.3, 0.4, 0.5)
ABSOLUTE = (0.3, 0.45, 0.55, 0.65, 0.75)
# Curves of the sweep: options without the threshold, and the thresholds to try.
CURVES: dict[str, tuple[ReuseConfig, tuple[float, ...]]] = {
    "MAC": (OURS, RELATIVE),
    "paper": (ReuseConfig.paper(), ABSOLUTE),
    "head, relative": (HEADS, RELATIVE),
    "anchors 0": (replace(OURS, anchors=0), RELATIVE),
    "anchors 256": (replace(OURS, anchors=256), RELATIVE),
    "entries 64": (replace(OURS, entries=64), RELATIVE),
    "entries 256": (replace(OURS, entries=256), RELATIVE),
    "band 128": (replace(OURS, band=128), RELATIVE),
    "band 512": (replace(OURS, band=512), RELATIVE),
    "window 512": (replace(OURS, window=512), RELATIVE),
    "depth 2": (replace(OURS, anchors=0, max_reuse_depth=2), RELATIVE),
    "any depth": (replace(OURS, anchors=0, max_reuse_depth=None), RELATIVE),
}
QUICK = ("MAC", "paper")


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
    names = QUICK if options.quick else tuple(options.curves)
    result: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "machine": info()}
    result |= {"torch": torch.__version__, "texts": {}}
    for text in options.texts:
        captured = load_capture(text, options.tokens, options.steps, options.model, options.cache)
        print(
            f"\n{text}: {captured.num_tokens} tokens, {captured.steps} steps, "
            f"{captured.num_layers} layers of {captured.num_qo_heads}/{captured.num_kv_heads} heads"
        )
        result["texts"][text] = measure(captured, names, options.quick)
        if options.json:  # after every text, so that an interrupted run leaves something
            options.json.write_text(json.dumps(result, indent=1))
    if options.png:
        from replay_plot import draw

        draw(result, options.png)


def measure(captured: Capture, names: Sequence[str], quick: bool) -> dict[str, Any]:
    """All curves, the baselines, and both schemes at `TARGET` full reads; printed as it goes."""
    replayer = Replayer(captured)
    print(f"{'':16} threshold  error  full reads  KV read  hit rate  depth")
    curves: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        config, thresholds = CURVES[name]
        thresholds = thresholds[1::2] if quick else thresholds
        curves[name] = [
            point(name, replace(config, threshold=number), replayer) for number in thresholds
        ]
    equal = {}
    for name in ("MAC", "paper"):
        config, _ = CURVES[name]
        found = at_full_reads(replayer, config, TARGET, rounds=3 if quick else 7)
        equal[name] = point(f"{name} at {TARGET:.0%}", found, replayer, details=True)
    ratio = equal["MAC"]["error"] / equal["paper"]["error"]
    print(f"error of MAC over the paper's scheme at {TARGET:.0%} full reads: {ratio:.3f}")
    shares = list(SHARES[2:3] if quick else SHARES)
    others = {}
    print(f"{'':16} error at KV read of " + " ".join(f"{share:6.0%}" for share in shares))
    for name, error in baselines.errors(captured, shares).items():
        means = error.mean((1, 2)).tolist()
        print(f"{name:16} {'':20}" + " ".join(f"{mean:6.4f}" for mean in means), flush=True)
        others[name] = {
            "kv_read": shares,
            "error": means,
            "search": baselines.SEARCH.get(name, 0.0),
            "error_per_layer": error.mean(2).tolist(),
        }
    ring = ring_share(captured, OURS.entries)
    return {"curves": curves, "equal": equal, "ratio": ratio, "baselines": others, "ring": ring}


def point(
    name: str, config: ReuseConfig, replayer: Replayer, details: bool = False
) -> dict[str, Any]:
    """One replay, as a row."""
    start = time.perf_counter()
    run = replayer(config)
    row: dict[str, Any] = {
        "threshold": config.threshold,
        "error": run.mean_error,
        "full_reads": run.full_read_share,
        "kv_read": run.kv_read_share,
        "hit_rate": run.hit_rate,
        "depth": float(run.depth.float().mean()),
        "max_depth": int(run.depth.max()),
        "error_p99": float(run.error.flatten().quantile(0.99)),
        "seconds": time.perf_counter() - start,
    }
    if details:
        row |= per_head(run)
    print(
        f"{name:16} {row['threshold']:9.3f} {row['error']:6.4f} {row['full_reads']:11.1%} "
        f"{row['kv_read']:8.1%} {row['hit_rate']:9.1%} {row['depth']:6.1f}",
        flush=True,
    )
    return row


def per_head(run: Replayed) -> dict[str, Any]:
    """Tables `[L][heads]`: error and hits of query heads, full reads and KV read of KV heads."""
    hits = run.source >= 0
    by_depth = {}
    for low, high in ((0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 10**6)):
        chosen = (run.depth >= low) & (run.depth <= high)
        if chosen.any():
            by_depth[str(low)] = [float(run.error[chosen].mean()), int(chosen.sum())]
    return {
        "error_per_head": run.error.mean(0).tolist(),
        "hit_rate_per_head": hits.float().mean(0).tolist(),
        "full_reads_per_kv_head": run.full_reads().float().mean(0).tolist(),
        "kv_read_per_kv_head": run.read_share().tolist(),
        "error_by_depth": by_depth,
    }


def at_full_reads(
    replayer: Replayer, config: ReuseConfig, share: float, rounds: int
) -> ReuseConfig:
    """The options with the threshold that reads this share of (step, KV head) pairs in full."""
    absolute = config.threshold_mode == "absolute"
    low, high = 0.0, 1.0
    for _ in range(rounds):
        middle = (low + high) / 2
        reads = replayer(replace(config, threshold=middle)).full_read_share
        # A higher tau is stricter, a higher rho is not.
        if (reads < share) == absolute:
            low = middle
        else:
            high = middle
    return replace(config, threshold=(low + high) / 2)


def ring_share(captured: Capture, entries: int) -> list[float]:
    """Ring queries a step looks through, over the bytes of all keys and values: least and most.

    With group decisions the first head of a candidate may be enough to leave it.
    """
    group = captured.num_qo_heads // captured.num_kv_heads
    mean_length = captured.num_tokens - captured.steps / 2
    return [entries / (2 * mean_length), group * entries / (2 * mean_length)]


def load_capture(text: str, tokens: int, steps: int, path: Path | None, cache: Path) -> Capture:
    """The capture of a text, from the cache folder if it is there."""
    name = "smollm2" if path is None else path.resolve().name
    version = f"py{sys.version_info.major}.{sys.version_info.minor}"
    file = cache / f"{name}-{text}-{tokens}-{steps}-{version}.pt"
    if not file.exists():
        import mac_attn.integrations.transformers  # noqa: F401  (registers attention "mac")
        from mac_attn.demo import model as models

        model, tokenizer, _ = models.load(path, torch.bfloat16, torch.device("cpu"))
        ids = texts.token_ids(text, model, tokenizer, tokens)
        cache.mkdir(parents=True, exist_ok=True)
        seeded = min(OURS.window, tokens - steps - 1)
        capture(model, ids, steps=steps, seeded=seeded).save(file)
    return Capture.load(file)


def default_cache() -> Path:
    """Where captures are kept: some 330 MB for each text with the defaults."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "mac_attn" / "captures"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", nargs="+", default=list(texts.NAMES), choices=texts.NAMES)
    parser.add_argument("--model", type=Path, help="a folder; default: SmolLM2 from its wheel")
    parser.add_argument("--tokens", type=int, default=5120)
    parser.add_argument("--steps", type=int, default=512, help="decoded, of the tokens")
    parser.add_argument("--curves", nargs="+", default=list(CURVES), choices=CURVES)
    parser.add_argument("--quick", action="store_true", help="two curves, few points")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of captures")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    return parser


if __name__ == "__main__":
    main()
