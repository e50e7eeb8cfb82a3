"""Pictures of what replay.py has measured: error over the share of the KV cache that is read.

python bench/replay_plot.py FILE.json FILE.png
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
from matplotlib.axes import Axes  # noqa: E402

OURS = {"MAC": "C0", "paper": "C1", "head, relative": "C5", "anchors 0": "C9"}
OTHERS = {"streaming": "C2", "quest": "C3", "h2o": "C4", "random": "C7", "oracle": "k"}
LABELS = {
    "MAC": "MAC (group, anchors)",
    "paper": "paper (per head, absolute, no anchors)",
    "head, relative": "per head, relative, no anchors",
    "anchors 0": "group, no anchors",
    "streaming": "StreamingLLM",
    "quest": "Quest",
    "h2o": "H2O",
    "random": "random pages",
    "oracle": "heaviest tokens (reads all to know them)",
}


def draw(result: dict[str, Any], path: Path) -> None:
    """A panel for every text; a dashed line adds what a method reads to choose."""
    texts = result["texts"]
    figure, axes = plt.subplots(
        1, len(texts), figsize=(4.2 * len(texts) + 0.5, 4.6), squeeze=False, sharey=True
    )
    for axis, (text, data) in zip(axes[0], texts.items(), strict=True):
        _panel(axis, data)
        axis.set_title(text, fontsize=10)
        axis.set_xlabel("share of keys and values read")
    axes[0][0].set_ylabel("mean error |out - exact| / |exact|")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _panel(axis: Axes, data: dict[str, Any]) -> None:
    for name, color in OURS.items():
        if rows := data["curves"].get(name):
            rows = sorted(rows, key=lambda row: row["kv_read"])
            x, y = [row["kv_read"] for row in rows], [row["error"] for row in rows]
            axis.plot(x, y, "o-", ms=3, color=color, label=LABELS[name])
            if name == "MAC":
                search = [share + data["ring"][1] for share in x]
                axis.plot(search, y, "--", lw=0.8, color=color)
    for name, color in OTHERS.items():
        if row := data["baselines"].get(name):
            style = ":" if name == "oracle" else "s-"
            axis.plot(row["kv_read"], row["error"], style, ms=3, color=color, label=LABELS[name])
            if row["search"]:
                search = [share + row["search"] for share in row["kv_read"]]
                axis.plot(search, row["error"], "--", lw=0.8, color=color)
    axis.set_yscale("log")
    axis.set_ylim(1e-3, 2)
    axis.set_xlim(0, 1)
    axis.grid(alpha=0.3, which="both", lw=0.4)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("png", type=Path)
    options = parser.parse_args(argv)
    draw(json.loads(options.json.read_text()), options.png)


if __name__ == "__main__":
    main()
