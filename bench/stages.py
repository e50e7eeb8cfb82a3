"""Match, amend and complete apart, so that a regression names its stage.

    python bench/stages.py [--quick] [--json FILE]

Every case is timed with all heads missing, missing for long, and all hitting, beside the whole
step, the same without `q_match` (it is turned back from `q` first), exact decode, and of both a
chain of steps in one CUDA graph, each on a KV cache and rings of its own, as the layers of a model
follow one another. A stage alone starts with cold caches, which within a step it does not, and it
cannot overlap the one before: the sum of the stages exceeds the step. Columns: bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import machine
from timing import Bandwidth, CpuTimer, Step, Timer, Timing, make_timer
from torch import Tensor
from workload import Case, PlantedRing, Workload, hit_mask, reuse_config

import mac_attn

COLUMNS = (
    "match",
    "amend",
    "complete",
    "step",
    "turned",
    "exact",
    "invariant",
    "chain",
    "its exact",
)
LONG = 33  # steps in a row without a hit, of a KV head that draws no sample in the next one
CHAIN_BYTES = 40 * 2**30  # of KV caches that a chain may take
# layout, context, batch
CASES = {
    "cuda": [
        ("32/8", 32768, 1),
        ("32/8", 126976, 1),
        ("32/8", 126976, 16),
        ("32/4", 126976, 16),
        ("32/8", 32768, 64),
        ("32/4", 126976, 64),
    ],
    "cpu": [("32/8", 8192, 1), ("32/8", 32768, 1), ("32/8", 126976, 1), ("32/8", 32768, 4)],
}


def measure(
    case: Case,
    granularity: str,
    anchors: int,
    age: int,
    device: torch.device,
    timer: Timer,
    bandwidth: Bandwidth,
    chain: int,
) -> list[dict[str, Any]]:
    """Rows for all heads missing, all that have missed for long, which draw a sample in every
    eighth step only (this is one of the others), and all hitting. A chain of less than 2 is none.
    """
    work = Workload(case, device)
    if chain * work.kv.nbytes > CHAIN_BYTES:
        chain = 0
    works = [work] + [Workload(case, device) for _ in range(1, chain)]
    rings = [PlantedRing(w, reuse_config(granularity, anchors), age) for w in works]
    ring, reuse = rings[0], rings[0].reuse

    def chained() -> None:
        for w, r in zip(works, rings, strict=True):
            w.mac(r.reuse)

    def all_back(hits: Tensor) -> None:
        for r in rings:
            r.put_back(hits)

    def exact_chained() -> None:
        for w in works:
            w.exact()

    step = partial(work.mac, reuse)
    rows = []
    cases = [("miss", 0.0, 0), ("long", 0.0, LONG), ("hit", 1.0, 0)]
    for name, rate, missed in cases if anchors else cases[::2]:
        for r in rings:
            r.missed = missed
        mask = hit_mask(case, granularity, rate, "run")
        put_back = partial(ring.put_back, ring.on_device(mask))
        put_back()
        ring.check_match(work, ring.on_device(mask))
        match = partial(mac_attn.match, reuse, work.q_match, work.seq_lens, work.slots)
        matched = match()
        amend = partial(
            mac_attn.amend,
            work.q,
            work.kv,
            work.block_table,
            work.seq_lens,
            matched=matched,
            reuse=reuse,
            slots=work.slots,
        )
        complete = partial(
            mac_attn.complete,
            amend(),
            work.seq_lens,
            reuse=reuse,
            matched=matched,
            q=work.q,
            q_match=work.q_match,
            slots=work.slots,
        )
        steps = [
            Step("match", match, put_back),
            Step("amend", amend, put_back),
            Step("complete", complete, put_back),
            Step("step", step, put_back),
            Step("turned", partial(step, turned=True), put_back),
            Step("exact", work.exact),
            Step("invariant", partial(work.exact, batch_invariant=True)),
        ]
        if chain > 1:
            chain_back = partial(all_back, ring.on_device(mask))
            steps += [Step("chain", chained, chain_back), Step("its exact", exact_chained)]
        timings = timer.measure(steps)
        for r in rings:
            r.reuse.check()
        if isinstance(timer, CpuTimer):
            bandwidth = timer.bandwidth()
        floor = case.floor(reuse.cfg, mask, age)
        floors = {
            "match": floor.ring_query_bytes + case.batch * case.num_qo_heads * 2 * case.head_dim,
            "amend": floor.kv_bytes + floor.anchor_bytes + floor.block_table_bytes,
            "complete": floor.state_read_bytes + floor.state_write_bytes,
            "step": floor.total_bytes,
            "turned": floor.total_bytes,
            "exact": case.floor().total_bytes,
            "invariant": case.floor().total_bytes,
        }
        if chain > 1:
            timings |= {name: each_of(timings[name], chain) for name in ("chain", "its exact")}
            floors |= {"chain": floors["step"], "its exact": floors["exact"]}
        rows.append(
            {
                "layout": case.layout,
                "batch": case.batch,
                "context": case.context,
                "page_size": case.page_size,
                "granularity": granularity,
                "anchors": anchors,
                "heads": name,
                "chain": chain,
                "us": {stage: asdict(timing) for stage, timing in timings.items()},
                "floor_us": {stage: bandwidth.us(size) for stage, size in floors.items()},
            }
        )
    return rows


def each_of(timing: Timing, count: int) -> Timing:
    """The time of one of `count` steps that were timed together."""
    return replace(timing, us=timing.us / count, low=timing.low / count, high=timing.high / count)


def print_row(row: dict[str, Any]) -> None:
    decides = row["granularity"] + (f", {row['anchors']} anchors" if row["anchors"] else "")
    times = "".join(
        f"{row['us'][name]['us']:11.1f} {row['us'][name]['us'] / row['floor_us'][name]:5.1f}"
        if name in row["us"]
        else f"{'-':>11} {'-':>5}"
        for name in COLUMNS
    )
    print(
        f"{row['layout']:>5} {row['batch']:5} {row['context']:8}  {decides:17} "
        f"{row['heads']:4}{times}",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="cuda or cpu; default: cuda if there is one")
    parser.add_argument("--layouts", nargs="+", help="these and the next two replace the cases")
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--granularity", choices=["head", "group"], default="group")
    parser.add_argument("--anchors", type=int, nargs="+", default=[0, 1024])
    parser.add_argument("--age", type=int, default=1, help="see hit_curve.py")
    parser.add_argument("--chain", type=int, help="steps of it; default: 32 on CUDA, else none")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true", help="the first two cases, few rounds")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = device.type == "cuda"
    if options.layouts or options.contexts or options.batches:
        shapes = [
            (layout, context, batch)
            for layout in options.layouts or ["32/8"]
            for context in options.contexts or [32768]
            for batch in options.batches or [1]
        ]
    else:
        shapes = CASES[device.type][: 2 if options.quick else None]
    rounds = options.rounds or ((20 if options.quick else 60) if cuda else 7)
    anchors = [0] if options.granularity == "head" else options.anchors
    chain = options.chain if options.chain is not None else 32 if cuda and not options.quick else 0

    command = "python bench/stages.py " + " ".join(sys.argv[1:] if argv is None else argv)
    torch.manual_seed(0)
    timer = make_timer(device, rounds, 12 if cuda else 2)
    bandwidth = timer.bandwidth()
    build = machine(device)
    print(f"{build['device']}; mac_attn {build['mac_attn']}, torch {build['torch']}")
    print(f"command: {command}")
    print(f"floor: {bandwidth.bytes_per_s / 1e9:.1f} GB/s, {bandwidth.how}")
    print(f"microseconds, median of {rounds}, and how many times the floor\n")
    print(
        "heads batch  context  decides           all "
        + "".join(f"{name:>11} floor" for name in COLUMNS)
    )
    rows = []
    for layout, context, batch in shapes:
        case = Case.of(layout, context, batch, options.head_dim, options.page_size)
        for count in anchors:
            new = measure(
                case, options.granularity, count, options.age, device, timer, bandwidth, chain
            )
            for row in new:
                print_row(row)
            rows += new
            if cuda:
                torch.cuda.empty_cache()
    result = {
        "command": command,
        "machine": build,
        "bandwidth": asdict(bandwidth),
        "rows": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
