"""A step of several query tokens beside one of a single one, in the same rounds of one run.

    python bench/query_tokens.py [--hits 0 1] [--json FILE]

Microseconds, median of the rounds, and how often that of a single exact token: keys and values are
read once for all of a step's tokens. Then with reuse, where a share of the KV heads hits with all
tokens, each on an entry of its own; those that miss read once for all, too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import machine
from timing import Step, Timer, make_timer
from torch import Tensor
from workload import Case, PlantedRing, Workload, hit_mask

import mac_attn


def decode(work: Workload, q: Tensor, reuse: mac_attn.ReuseCache | None = None) -> Tensor:
    """A step with the queries `[B, T, Hq, D]`."""
    options: dict[str, Any] = {}
    if reuse is not None:
        options = {"reuse": reuse, "slots": work.slots, "q_match": q}
    out = mac_attn.decode(q, work.kv, work.block_table, work.seq_lens, **options, **work.scales)
    assert isinstance(out, Tensor)
    return out


def measure(
    case: Case,
    tokens: Sequence[int],
    hits: Sequence[float],
    anchors: int,
    device: torch.device,
    timer: Timer,
) -> dict[str, Any]:
    """The times of each number of tokens, by name: "4", and "4 0.9" where 90% hit."""
    work = Workload(case, device)
    ring = PlantedRing(work, mac_attn.ReuseConfig(anchors=anchors), max(tokens))
    steps = []
    for count in tokens:
        shape = (case.batch, count, case.num_qo_heads, case.head_dim)
        q = torch.randn(shape, device=device).to(case.dtype)
        steps.append(Step(f"{count}", partial(decode, work, q)))
        for rate in hits:
            mask = ring.on_device(hit_mask(case, "group", rate, "even"))
            put_back = partial(ring.put_back, mask, q)
            steps.append(Step(f"{count} {rate}", partial(decode, work, q, ring.reuse), put_back))
            check_hits(work, ring, mask, q)
    return {
        "layout": case.layout,
        "batch": case.batch,
        "context": case.context,
        "us": {name: asdict(timing) for name, timing in timer.measure(steps).items()},
    }


def check_hits(work: Workload, ring: PlantedRing, hits: Tensor, q: Tensor) -> None:
    """The KV heads of the mask hit with all tokens, and no others. Raises SystemExit."""
    ring.put_back(hits, q)
    source = mac_attn.match(ring.reuse, q, work.seq_lens, work.slots).source
    found = source.view(len(q), ring.case.num_kv_heads, -1) >= 0
    if not torch.equal(found, hits.all(2).expand_as(found)):
        raise SystemExit(f"{ring.case}: not what was planted has hit")


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="cuda or cpu; default: cuda if there is one")
    parser.add_argument("--layouts", nargs="+", default=["32/8", "32/4"])
    parser.add_argument("--contexts", type=int, nargs="+", default=[126976])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 7, 16])
    parser.add_argument("--hits", type=float, nargs="+", default=[0.0, 0.9, 1.0])
    parser.add_argument("--anchors", type=int, default=1024, help="short contexts need fewer")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    timer = make_timer(device, options.rounds, warmup=3)
    print(machine(device), "\n")
    rates = "".join(f"{f'{rate:.0%} hit':>11}  ratio" for rate in options.hits)
    print(f"heads  batch  context  tokens      exact  ratio{rates}")
    rows = []
    for layout in options.layouts:
        for context in options.contexts:
            for batch in options.batches:
                case = Case.of(layout, context, batch, options.head_dim)
                row = measure(case, options.tokens, options.hits, options.anchors, device, timer)
                rows.append(row)
                first = row["us"][f"{options.tokens[0]}"]["us"]
                for count in options.tokens:
                    names = [f"{count}", *(f"{count} {rate}" for rate in options.hits)]
                    each = [row["us"][name]["us"] for name in names]
                    times = "".join(f"{us:11.1f} {us / first:6.2f}" for us in each)
                    print(f"{layout:>5} {batch:6} {context:8} {count:7}{times}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    main()
