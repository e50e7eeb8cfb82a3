"""Time of a decode step against its hit rate, beside exact decode, other libraries and the floor.

    python bench/hit_curve.py [--quick | --authors] [--json FILE] [--csv FILE] [--png FOLDER]

Hits per head with an exact quota (and group decisions, with and without anchors), contexts 8K to
127K, batches 1 to 64. Hits are planted in the rings, never switched on in the kernels
(workload.py), and counted afterwards. How the time is taken: timing.py. What the columns mean, and
what the method's authors measured (`--authors`): bench/README.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from authors import authors_speedup
from peers import Peer, describe, make_peers
from report import Progress, Setting, machine, print_summary, write_csv
from timing import Bandwidth, CpuTimer, Step, Timer, Timing, make_timer
from torch import Tensor
from workload import Case, PlantedRing, Workload, hit_mask, reuse_config

RATES = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.875, 0.9, 0.95, 0.96875, 1.0]
# Where an option is not given. On a CPU what fits a machine's memory.
DEFAULTS = {
    "cuda": {
        "contexts": [8192, 32768, 126976],
        "batches": [1, 4, 16, 64],
        "layouts": ["32/8", "32/4", "64/8"],
        "rounds": 60,
        "warmup": 12,
    },
    "cpu": {
        "contexts": [8192, 32768, 126976],
        "batches": [1, 4],
        "layouts": ["32/8"],
        "rounds": 15,
        "warmup": 2,
    },
}
QUICK = {
    "cuda": {
        "contexts": [32768, 126976],
        "batches": [1, 16],
        "layouts": ["32/8"],
        "rates": [0.0, 0.5, 0.95, 1.0],
        "rounds": 20,
        "warmup": 5,
    },
    "cpu": {
        "contexts": [8192, 32768],
        "batches": [1],
        "rates": [0.0, 0.5, 1.0],
        "rounds": 7,
        "warmup": 1,
    },
}
# The authors' setting (authors.py), at the points that they publish.
AUTHORS = {
    "rates": [0.0, 0.95, 1.0],
    "contexts": [32768, 126976],
    "batches": [1, 16, 64],
    "layouts": ["32/4", "32/8"],
    "anchors": [0],
    "age": 64,
    "entries": 2048,
    "page_size": 1,
}


class Point:
    """One hit rate of one curve: its planted hits and its step."""

    def __init__(
        self,
        rate: float,
        setting: Setting,
        ring: PlantedRing,
        call: Callable[[], Tensor],
        mask: Tensor,
    ) -> None:
        self.rate = rate
        self.setting = setting
        self.ring = ring
        self.mask = mask
        hits = ring.on_device(mask)
        self.step = Step(f"{setting} {rate}", call, partial(ring.put_back, hits))
        self.hits_on_device = hits

    def check(self, work: Workload, timer: Timer) -> None:
        """Match finds what was planted and nothing else, and a step counts just those hits."""
        reuse = self.ring.reuse
        timer.run(self.step)  # the first run may capture the step, which runs it more often
        self.ring.put_back(self.hits_on_device)
        self.ring.check_match(work, self.hits_on_device)
        reuse.counters.zero_()
        timer.run(self.step)
        reuse.check()
        counted = reuse.stats().query_head_hits
        if counted != int(self.mask.sum()):
            raise SystemExit(
                f"{work.case}, {self.step.name}: {counted} hits, not {self.mask.sum()}"
            )


def measure_case(
    case: Case, options: argparse.Namespace, timer: Timer, bandwidth: Bandwidth, progress: Progress
) -> dict[str, Any]:
    work = Workload(case, options.device)
    progress.say(f"{case}: peers")
    peers = make_peers(work, slow=not options.quick, authors=options.authors)
    progress.say(str(case))
    points = []
    for setting in options.settings:
        cfg = reuse_config(setting.granularity, setting.anchors, options.entries)
        ring = PlantedRing(work, cfg, options.age)
        call = partial(work.mac, ring.reuse)
        for rate in options.rates:
            mask = hit_mask(case, setting.granularity, rate, options.spread)
            points.append(Point(rate, setting, ring, call, mask))
    for point in points:
        point.check(work, timer)
    rings = {id(point.ring): point.ring for point in points}.values()
    for ring in rings:
        ring.reuse.counters.zero_()

    exact = Step("exact", work.exact)
    others = [step for peer in peers for step in _peer_steps(peer, timer)]
    steps = [exact, *others, *(point.step for point in points)]
    timings = timer.measure(steps, lambda step: progress.advance(case, 1 / len(steps)))
    for ring in rings:
        expected = sum(
            timings[point.step.name].calls * int(point.mask.sum())
            for point in points
            if point.ring is ring
        )
        ring.reuse.check()
        if ring.reuse.stats().query_head_hits != expected:
            raise SystemExit(f"{case}: a timed step had other hits than were planted")

    if isinstance(timer, CpuTimer):
        bandwidth = timer.bandwidth()
    floor = case.floor()
    result = {
        "layout": case.layout,
        "batch": case.batch,
        "context": case.context,
        "exact": asdict(timings["exact"]),
        "exact_gb_s": floor.kv_bytes / timings["exact"].us / 1e3,
        "bandwidth_gb_s": bandwidth.bytes_per_s / 1e9,
        "exact_floor_us": bandwidth.us(floor.total_bytes),
        "peers": [_peer_result(peer, timings) for peer in peers],
    }
    result["points"] = [
        _point_result(case, point, timings, result, bandwidth, options) for point in points
    ]
    return result


def _peer_steps(peer: Peer, timer: Timer) -> list[Step]:
    """Steps of the variants that can be timed: on CUDA, those that a graph can capture."""
    steps = []
    for variant, call in list(peer.variants.items()):
        step = Step(f"{peer.name}, {variant}", call)
        try:
            timer.run(step)
        except Exception as error:
            del peer.variants[variant]
            peer.problems[variant] = describe(error)
        else:
            steps.append(step)
    return steps


def _peer_result(peer: Peer, timings: dict[str, Timing]) -> dict[str, Any]:
    us = {variant: timings[f"{peer.name}, {variant}"].us for variant in peer.variants}
    best = min(us, key=us.__getitem__) if us else None
    return {
        "name": peer.name,
        "us": us[best] if best is not None else None,
        "variant": best,
        "variants": us,
        "problems": peer.problems,
    }


def _point_result(
    case: Case,
    point: Point,
    timings: dict[str, Timing],
    result: dict[str, Any],
    bandwidth: Bandwidth,
    options: argparse.Namespace,
) -> dict[str, Any]:
    timing = timings[point.step.name]
    peers = {peer["name"]: peer["us"] for peer in result["peers"] if peer["us"] is not None}
    floor = case.floor(point.ring.reuse.cfg, point.mask, options.age)
    exact_floor = case.floor()
    authors = None
    if options.authors:
        authors = authors_speedup(case.layout, case.batch, case.context, point.rate)
    by_group = point.mask.view(case.batch, case.num_kv_heads, case.group_size)
    return {
        "granularity": point.setting.granularity,
        "anchors": point.setting.anchors,
        "rate": point.rate,
        "hits": int(point.mask.sum()),
        "heads": point.mask.numel(),
        "kv_head_hits": int(by_group.all(-1).sum()),
        "mac_us": timing.us,
        "mac_us_low": timing.low,
        "mac_us_high": timing.high,
        "exact_us": result["exact"]["us"],
        "over_exact": timing.us / result["exact"]["us"],
        "speedup_best_peer": min(peers.values()) / timing.us if peers else None,
        "speedup_flashinfer": peers["FlashInfer"] / timing.us if "FlashInfer" in peers else None,
        "speedup_authors": authors,
        "bytes": floor.total_bytes,
        "bytes_over_exact": floor.total_bytes / exact_floor.total_bytes,
        "floor_us": bandwidth.us(floor.total_bytes),
        "over_floor": timing.us / bandwidth.us(floor.total_bytes),
        "over_floor_max": timing.us / bandwidth.us(floor.total_bytes_max),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="cuda or cpu; default: cuda if there is one")
    parser.add_argument(
        "--rates", type=float, nargs="+", help="hit rates (0 ... 1, as the authors)"
    )
    parser.add_argument("--contexts", type=int, nargs="+", help="tokens before the new one")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--layouts", nargs="+", help="query/KV heads, for example 32/4 32/8")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, help="16")
    parser.add_argument(
        "--granularity", nargs="+", choices=["head", "group"], default=["head", "group"]
    )
    parser.add_argument(
        "--anchors", type=int, nargs="+", help="with group decisions (0 1024, and so two curves)"
    )
    parser.add_argument("--entries", type=int, help="of a ring (512 without anchors, 128 with)")
    parser.add_argument(
        "--age",
        type=int,
        help="how many steps ago the reused query was: a hit attends afresh to band + age tokens",
    )
    parser.add_argument("--spread", choices=["run", "even"], default="run", help="see hit_mask")
    parser.add_argument("--rounds", type=int, help="timed rounds of every step")
    parser.add_argument("--warmup", type=int)
    parser.add_argument("--warm", action="store_true", help="do not clear the caches in between")
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--quick", action="store_true", help="a small set, within a minute")
    preset.add_argument(
        "--authors", action="store_true", help="the setting of the method's authors, warm caches"
    )
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--csv", type=Path, help="write a row for every point here")
    parser.add_argument("--png", type=Path, help="draw a picture of every layout in this folder")
    options = parser.parse_args(argv)

    options.device = torch.device(
        options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    )
    defaults = {
        **{"rates": RATES, "anchors": [0, 1024], "age": 1, "page_size": 16},
        **DEFAULTS[options.device.type],
    }
    if options.quick:
        defaults.update(QUICK[options.device.type])
    if options.authors:
        defaults.update(AUTHORS)
        options.warm = True
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.rates = sorted(set(options.rates))
    options.settings = []
    if "head" in options.granularity:
        options.settings.append(Setting("head", 0))
    if "group" in options.granularity:
        options.settings += [Setting("group", anchors) for anchors in options.anchors]
    return options


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    command = "python bench/hit_curve.py " + " ".join(sys.argv[1:] if argv is None else argv)
    torch.manual_seed(0)
    timer = make_timer(options.device, options.rounds, options.warmup, warm=options.warm)
    bandwidth = timer.bandwidth()
    build = machine(options.device)
    cases = [
        Case.of(layout, context, batch, options.head_dim, options.page_size)
        for layout in options.layouts
        for context in options.contexts
        for batch in options.batches
    ]
    print(f"{build['device']}; mac_attn {build['mac_attn']}, torch {build['torch']}")
    if build["flashinfer-python"]:
        print(f"FlashInfer {build['flashinfer-python']}, cuDNN {build['cudnn']}")
    print(f"command: {command}")
    caches = "warm" if options.warm else "cold"
    print(
        f"{caches} caches, head_dim {options.head_dim}, bfloat16, pages of {options.page_size}, "
        f"shuffled; the reused query is {options.age} step(s) old; misses: {options.spread}; "
        f"median of {options.rounds} after {options.warmup} to warm up"
    )
    print(f"floor: {bandwidth.bytes_per_s / 1e9:.1f} GB/s, {bandwidth.how}")
    results: dict[str, Any] = {
        "command": command,
        "machine": build,
        "bandwidth": asdict(bandwidth),
        "options": {
            key: value if isinstance(value, (int, str, list, bool)) else str(value)
            for key, value in vars(options).items()
            if key not in ("settings", "json", "csv", "png")
        },
        "cases": [],
    }
    progress = Progress(cases)
    for case in cases:
        result = measure_case(case, options, timer, bandwidth, progress)
        results["cases"].append(result)
        progress.print_case(result)
        if options.device.type == "cuda":
            gc.collect()  # a peer's objects may refer to one another, and hold the case's tensors
            torch.cuda.empty_cache()
        # After every case: a run that is cut short leaves what it has.
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
        if options.csv:
            write_csv(options.csv, results["cases"])
    progress.close()
    print_summary(results)
    if options.png:
        try:
            from plot import draw
        except ImportError as error:
            print(f"no pictures ({error}); elsewhere: python bench/plot.py FILE.json FOLDER")
        else:
            draw(results, options.png)
    return results


if __name__ == "__main__":
    main()
