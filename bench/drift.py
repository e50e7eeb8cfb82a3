"""Does the error of reuse grow while a text is written? Error and full reads over time, by depth.

    python bench/drift.py [--steps 2048 --text prose]

With chains of reuse of any depth, what a hit takes over is itself a result of reuse. Without
anchors, which only results of exact attention have.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import texts
from replay import default_cache, load_capture

from mac_attn import ReuseConfig
from mac_attn.calibrate import Replayer

_PART = 256
# (max_reuse_depth, threshold)
CASES = ((1, 0.16), (1, 0.2), (1, 0.25), (2, 0.16), (4, 0.16), (None, 0.13), (None, 0.16))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", default="prose", choices=texts.NAMES)
    parser.add_argument("--steps", type=int, default=2048)
    parser.add_argument("--prompt", type=int, default=4608)
    parser.add_argument("--every", type=int, default=4, help="of the layers one in this many")
    parser.add_argument("--model", type=Path, help="a folder; default: SmolLM2 from its wheel")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of captures")
    options = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
    tokens = options.prompt + options.steps
    captured = load_capture(options.text, tokens, options.steps, options.model, options.cache)
    layers = list(range(1, captured.num_layers, options.every))
    replayer = Replayer(captured.layers(layers))
    print(f"{options.text}, layers {layers}, parts of {_PART} steps")
    for depth, threshold in CASES:
        config = ReuseConfig(
            entries=512, anchors=0, threshold=threshold, max_drift=None, max_reuse_depth=depth
        )
        run = replayer(config)
        print(
            f"max_reuse_depth {depth}, threshold {threshold}: error {run.mean_error:.4f}, ", end=""
        )
        print(f"{run.full_read_share:.1%} full reads, depth up to {int(run.depth.max())}")
        for name, values in (("error", run.error), ("full reads", run.full_reads().float())):
            parts = " ".join(f"{float(part.mean()):6.3f}" for part in values.split(_PART))
            print(f"  {name:10} {parts}", flush=True)


if __name__ == "__main__":
    main()
