"""What a calibration buys over one threshold for all heads, and what it is worth on other texts.

    python bench/calibration.py [--texts prose code dialogue] [--targets 0.02 0.03 0.04] [--json F]

For each target error: the KV read by the best single (threshold, anchors) and by thresholds for
every KV head and anchors for every layer, both chosen on one text and measured on every text. A
fair comparison needs equal errors: `single at equal error` is the KV that one threshold for all
(with the same text's best anchors) reads on the measured text at the error that the calibration
has there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import texts
import torch
from replay import default_cache, load_capture
from torch import Tensor

from mac_attn import ReuseConfig
from mac_attn.calibrate import Replayer, choose, measure
from mac_attn.calibrate.search import ANCHORS, THRESHOLDS


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
    tables: dict[str, tuple[Tensor, Tensor]] = {}
    for text in options.texts:
        captured = load_capture(text, options.tokens, options.steps, options.model, options.cache)
        tables[text] = measure(Replayer(captured), ReuseConfig(), THRESHOLDS, ANCHORS)
        print(f"{text}: {len(THRESHOLDS) * len(ANCHORS)} choices replayed", flush=True)
    rows = compare(tables, options.targets)
    print("                              calibrated       single        single at")
    print("target  chosen on measured on  error   KV      error   KV     equal error")
    for row in rows:
        print(
            f"{row['target']:6} {row['chosen_on']:>10} {row['measured_on']:>11}"
            f" {row['error']:6.4f} {row['kv_read']:6.1%}   {row['single_error']:6.4f}"
            f" {row['single_kv_read']:6.1%}   {row['single_at_equal_error']:6.1%}"
        )
    if options.json:
        command = " ".join(["python", *sys.argv])
        options.json.write_text(json.dumps({"command": command, "rows": rows}, indent=1))


def compare(
    tables: dict[str, tuple[Tensor, Tensor]], targets: Sequence[float]
) -> list[dict[str, Any]]:
    """A row for every target and pair of texts; tables hold error and read `[A, T, L, Hkv]`."""
    rows = []
    for target in targets:
        for chosen_on, (error, read) in tables.items():
            anchors, thresholds = choose(error, read, target)
            single = _best_single(error, read, target)
            for measured_on, (other_error, other_read) in tables.items():
                reached = _of_choice(other_error, anchors, thresholds)
                rows.append(
                    {
                        "target": target,
                        "chosen_on": chosen_on,
                        "measured_on": measured_on,
                        "error": reached,
                        "kv_read": _of_choice(other_read, anchors, thresholds),
                        "single_error": float(other_error[single].mean()),
                        "single_kv_read": float(other_read[single].mean()),
                        "single_at_equal_error": _at_error(other_error, other_read, reached),
                    }
                )
    return rows


def _of_choice(table: Tensor, anchors: list[int], thresholds: list[list[int]]) -> float:
    """Mean over the KV heads of what a choice has in a table `[A, T, L, Hkv]`."""
    layers = torch.arange(table.shape[2])[:, None]
    heads = torch.arange(table.shape[3])
    chosen = table[torch.tensor(anchors)[:, None], torch.tensor(thresholds), layers, heads]
    return float(chosen.mean())


def _best_single(error: Tensor, read: Tensor, target: float) -> tuple[int, int]:
    """Index (anchors, threshold) of the fewest reads within the target, the same for all heads."""
    reads = read.mean((2, 3)).masked_fill(error.mean((2, 3)) > target, torch.inf)
    return divmod(int(reads.argmin()), reads.shape[1])


def _at_error(error: Tensor, read: Tensor, wanted: float) -> float:
    """KV read at an error by one threshold for all, interpolated; the best number of anchors."""
    found = []
    for errors, reads in zip(error.mean((2, 3)), read.mean((2, 3)), strict=True):
        above = int((errors > wanted).int().argmax())  # errors rise with the threshold
        if above == 0:
            continue  # this text never errs as much
        low, high = float(errors[above - 1]), float(errors[above])
        part = (wanted - low) / (high - low)
        found.append(float(reads[above - 1]) * (1 - part) + float(reads[above]) * part)
    return min(found, default=float(read.mean((2, 3)).min()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    three = ["prose", "code", "dialogue"]
    parser.add_argument("--texts", nargs="+", default=three, choices=texts.NAMES)
    parser.add_argument("--targets", nargs="+", type=float, default=[0.02, 0.03, 0.04])
    parser.add_argument("--model", type=Path, help="a folder; default: SmolLM2 from its wheel")
    parser.add_argument("--tokens", type=int, default=5120)
    parser.add_argument("--steps", type=int, default=512, help="decoded, of the tokens")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of captures")
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    main()
