"""A step of several query tokens beside one of a single one, exact, in the same rounds of one run.

    python bench/query_tokens.py [--json FILE]

Microseconds, median of the rounds, and how often that of a single token: keys and values are read
once for all of a step's tokens. "reuse": the same with a cache that learns the first token.
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
from workload import Case, Workload

import mac_attn


def decode(work: Workload, q: Tensor, reuse: mac_attn.ReuseCache | None = None) -> Tensor:
    """A step with the queries `[B, T, Hq, D]`."""
    options: dict[str, Any] = {}
    if reuse is not None:
        # Where the slots have ended; every replay begins there.
        options = {"reuse": reuse, "slots": work.slots, "q_match": q}
    out = mac_attn.decode(q, work.kv, work.block_table, work.seq_lens, **options, **work.scales)
    assert isinstance(out, Tensor)
    return out


def measure(
    case: Case, tokens: Sequence[int], device: torch.device, timer: Timer
) -> dict[str, Any]:
    """The times of each number of tokens, by name, "4" and "4 reuse" and so on."""
    work = Workload(case, device)
    reuse = mac_attn.ReuseCache(
        mac_attn.ReuseConfig(threshold=0.0),
        num_slots=case.batch,
        num_qo_heads=case.num_qo_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        dtype=case.dtype,
        device=device,
    )
    steps = []
    for count in tokens:
        shape = (case.batch, count, case.num_qo_heads, case.head_dim)
        q = torch.randn(shape, device=device).to(case.dtype)
        steps.append(Step(f"{count}", partial(decode, work, q)))
        put_back = partial(end_before, reuse, case.seq_len - count)
        steps.append(Step(f"{count} reuse", partial(decode, work, q, reuse), put_back))
    return {
        "layout": case.layout,
        "batch": case.batch,
        "context": case.context,
        "us": {name: asdict(timing) for name, timing in timer.measure(steps).items()},
    }


def end_before(reuse: mac_attn.ReuseCache, position: int) -> None:
    """All slots have ended there."""
    reuse.slot_end.fill_(position)
    reuse.slot_reach.fill_(position)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="cuda or cpu; default: cuda if there is one")
    parser.add_argument("--layouts", nargs="+", default=["32/8", "32/4"])
    parser.add_argument("--contexts", type=int, nargs="+", default=[126976])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 7, 16])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    timer = make_timer(device, options.rounds, warmup=3)
    print(machine(device), "\n")
    print("heads  batch  context  tokens      exact  ratio      reuse  ratio")
    rows = []
    for layout in options.layouts:
        for context in options.contexts:
            for batch in options.batches:
                case = Case.of(layout, context, batch, options.head_dim)
                row = measure(case, options.tokens, device, timer)
                rows.append(row)
                first = row["us"][f"{options.tokens[0]}"]["us"]
                for count in options.tokens:
                    pair = [row["us"][f"{count}{kind}"]["us"] for kind in ("", " reuse")]
                    times = "".join(f"{us:11.1f} {us / first:6.2f}" for us in pair)
                    print(f"{layout:>5} {batch:6} {context:8} {count:7}{times}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    main()
