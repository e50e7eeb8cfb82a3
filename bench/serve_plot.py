"""A picture of what serve_gpu.py has measured: a token's time against the heads that hit.

python bench/serve_plot.py FILE.json PICTURE.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the backend is chosen)


def draw(rows: dict[str, list[dict[str, Any]]], picture: Path) -> None:
    """Write a panel for each case: vLLM with the plugin, and without it as a line."""
    cases = list(dict.fromkeys((row["requests"], row["context"]) for row in rows["plugin"]))
    figure, axes = plt.subplots(1, len(cases), figsize=(4.2 * len(cases), 3.4), squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        own, other = (
            [row for row in rows[kind] if (row["requests"], row["context"]) == case]
            for kind in ("plugin", "vLLM")
        )
        times = [row["ms_per_token"] for row in own]
        axis.plot([row["hit_rate"] for row in own], times, "C2.-", label="vLLM with the plugin")
        without = other[0]["ms_per_token"]
        axis.axhline(without, color="C3", lw=1, ls="--", label="vLLM")
        axis.set(xlabel="share of query heads that hit", ylim=(0, 1.15 * max(without, *times)))
        axis.set_title(f"{case[0]} requests of {case[1]:,} tokens", fontsize=10)
        axis.grid(True, lw=0.2)
    axes[0][0].set_ylabel("ms for a token of each request")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args(argv)
    draw(json.loads(options.json.read_text())["rows"], options.picture)


if __name__ == "__main__":
    main()
