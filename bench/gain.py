"""The README's picture: a step's time against the hit rate, one case of what hit_curve.py measured.

python bench/gain.py bench/results/h200.csv bench/results/gain.png
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the backend is chosen)


def draw(table: Path, picture: Path, layout: str, batch: int, context: int, anchors: int) -> None:
    """Write one panel: exact decode, FlashInfer's fastest, and reuse with decisions per KV head.

    Raises ValueError if the table has no such case.
    """
    with table.open(newline="") as lines:
        points = [
            row
            for row in csv.DictReader(lines)
            if (row["layout"], int(row["batch"]), int(row["context"])) == (layout, batch, context)
            and (row["granularity"], int(row["anchors"])) == ("group", anchors)
        ]
    if not points:
        raise ValueError(f"{table} has no {layout}, batch {batch}, {context} tokens with {anchors}")
    figure, axis = plt.subplots(figsize=(6.4, 3.4))
    rates = [int(point["hits"]) / int(point["heads"]) for point in points]
    axis.plot(
        rates,
        [float(point["mac_us"]) for point in points],
        "C2.-",
        label=f"reuse, {anchors:,} anchors",
    )
    exact, peer = float(points[0]["exact_us"]), float(points[0]["FlashInfer us"])
    axis.axhline(exact, color="k", lw=1, label="exact decode of mac_attn")
    fastest = points[0]["FlashInfer fastest"]
    axis.axhline(peer, color="C3", lw=1, ls="--", label=f"FlashInfer ({fastest})")
    axis.set(
        xlabel="share of query heads that hit",
        ylabel="µs, one layer",
        ylim=(0, 1.15 * max(exact, peer)),
    )
    axis.set_title(
        f"One decode step: batch {batch}, {context:,} tokens, {layout} heads", fontsize=10
    )
    axis.grid(True, lw=0.2)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--layout", default="32/8")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=126976)
    parser.add_argument("--anchors", type=int, default=1024)
    options = parser.parse_args(argv)
    draw(
        options.csv,
        options.picture,
        options.layout,
        options.batch,
        options.context,
        options.anchors,
    )


if __name__ == "__main__":
    main()
