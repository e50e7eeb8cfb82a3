"""A float8 KV cache beside one of the queries' dtype, in the same rounds of one run.

    python bench/float8.py [--json FILE]

Exact decode, and steps with reuse in which nothing hits and in which everything does; microseconds,
median of the rounds, and the time of the wider cache over that of float8.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import machine
from timing import Step, Timer, make_timer
from workload import Case, PlantedRing, Workload, hit_mask, reuse_config

STEPS = ("exact", "miss", "hit")


def measure(case: Case, anchors: int, device: torch.device, timer: Timer) -> dict[str, Any]:
    """The times of each step on both caches, by name, "float8 exact" and so on."""
    steps = []
    for prefix, one in (("", case), ("float8 ", replace(case, float8=True))):
        work = Workload(one, device)
        ring = PlantedRing(work, reuse_config("group", anchors), 1)
        steps.append(Step(f"{prefix}exact", work.exact))
        for name, rate in (("miss", 0.0), ("hit", 1.0)):
            mask = ring.on_device(hit_mask(one, "group", rate, "run"))
            put_back = partial(ring.put_back, mask)
            steps.append(Step(f"{prefix}{name}", partial(work.mac, ring.reuse), put_back))
    timings = timer.measure(steps)
    return {
        "layout": case.layout,
        "batch": case.batch,
        "context": case.context,
        "anchors": anchors,
        "us": {name: asdict(timing) for name, timing in timings.items()},
    }


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="cuda or cpu; default: cuda if there is one")
    parser.add_argument("--layouts", nargs="+", default=["32/8", "32/4"])
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768, 126976])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--anchors", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    timer = make_timer(device, options.rounds, warmup=3)
    print(machine(device), "\n")
    print(f"heads  batch  context{''.join(f'{n:>11}  float8 ratio' for n in STEPS)}")
    rows = []
    for layout in options.layouts:
        for context in options.contexts:
            for batch in options.batches:
                case = Case.of(layout, context, batch, options.head_dim)
                row = measure(case, options.anchors, device, timer)
                rows.append(row)
                pairs = [(row["us"][n]["us"], row["us"][f"float8 {n}"]["us"]) for n in STEPS]
                times = "".join(f"{a:11.1f} {b:7.1f} {a / b:5.2f}" for a, b in pairs)
                print(f"{layout:>5} {batch:6} {context:8}{times}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    main()
