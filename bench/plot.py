"""Pictures of what hit_curve.py has measured, one for every head layout.

    python bench/plot.py FILE.json FOLDER

A row of panels for every batch, a column for every context. The lines: MAC for each way to decide,
exact decode, the fastest variant of every peer, and the floor (bytes that must move over the
bandwidth of a plain copy or read loop).
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
from report import Setting  # noqa: E402

CURVES = ("C0", "C1", "C2", "C4")
PEERS = {"FlashInfer": "C3", "FlashAttention": "C5", "torch SDPA": "C7", "FlexAttention": "C8"}


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write `hit_curve_32_8.png` and so on; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    layouts = dict.fromkeys(case["layout"] for case in results["cases"])
    return [_draw_layout(results, layout, folder) for layout in layouts]


def _draw_layout(results: dict[str, Any], layout: str, folder: Path) -> Path:
    cases = {
        (case["batch"], case["context"]): case
        for case in results["cases"]
        if case["layout"] == layout
    }
    batches = sorted({batch for batch, _ in cases})
    contexts = sorted({context for _, context in cases})
    figure, axes = plt.subplots(
        len(batches),
        len(contexts),
        figsize=(3.4 * len(contexts) + 1.5, 2.9 * len(batches) + 1),
        squeeze=False,
        sharex=True,
    )
    for i, batch in enumerate(batches):
        for j, context in enumerate(contexts):
            if (batch, context) in cases:
                _draw_case(axes[i][j], cases[batch, context])
            axes[i][j].set_title(f"batch {batch}, {context:,} tokens", fontsize=9)
        axes[i][0].set_ylabel("µs")
    for axis in axes[-1]:
        axis.set_xlabel("hit rate")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        lines, labels = axis.get_legend_handles_labels()
        handles.update(zip(labels, lines, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, fontsize=8)
    machine = results["machine"]
    figure.suptitle(
        f"One decode step, {layout} heads, bfloat16: {machine['device']}, "
        f"mac_attn {machine['mac_attn']}, torch {machine['torch']}",
        fontsize=10,
    )
    rows = -(-len(handles) // 4)
    bottom = (0.25 + 0.2 * rows) / figure.get_figheight()
    figure.tight_layout(rect=(0, bottom, 1, 0.98))
    path = folder / f"hit_curve_{layout.replace('/', '_')}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _draw_case(axis: Axes, case: dict[str, Any]) -> None:
    curves: dict[Setting, list[dict[str, Any]]] = {}
    for point in case["points"]:
        curves.setdefault(Setting(point["granularity"], point["anchors"]), []).append(point)
    for color, (setting, points) in zip(CURVES, curves.items(), strict=False):
        # By the hits there are: with few heads the quota is far from the rate that was asked for.
        rates = [point["hits"] / point["heads"] for point in points]
        axis.plot(
            rates, [p["mac_us"] for p in points], ".-", color=color, label=f"MAC, {setting}", ms=4
        )
        axis.plot(
            rates,
            [p["floor_us"] for p in points],
            ":",
            color=color,
            lw=1,
            label=f"floor, {setting}",
        )
    axis.axhline(case["exact"]["us"], color="k", lw=1, label="exact")
    for peer in case["peers"]:
        if peer["us"] is not None:
            color = PEERS.get(peer["name"], "C6")
            axis.axhline(peer["us"], color=color, lw=1, ls="--", label=peer["name"])
    axis.set_yscale("log")
    axis.grid(True, which="both", lw=0.2)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(argv)
    for path in draw(json.loads(options.json.read_text()), options.folder):
        print(path)


if __name__ == "__main__":
    main()
