"""A few steps of one case, not captured in a graph, for a profiler.

    ncu --profile-from-start off -k regex:"match_kernel|amend_kernel|complete_kernel" \\
        python bench/one_step.py --batch 16 --context 126976

In this order: an exact step, then one with all heads missing, one at the given rate and one with
all heads hitting. Only these lie between the profiler's start and stop; each ran once before.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import torch
from workload import Case, PlantedRing, Workload, hit_mask, reuse_config


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layout", default="32/8", help="query/KV heads")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--granularity", choices=["head", "group"], default="group")
    parser.add_argument("--anchors", type=int, default=1024)
    parser.add_argument("--age", type=int, default=1)
    parser.add_argument("--rate", type=float, default=0.95)
    options = parser.parse_args(argv)
    case = Case.of(options.layout, options.context, options.batch, options.head_dim)
    work = Workload(case, torch.device(options.device))
    ring = PlantedRing(work, reuse_config(options.granularity, options.anchors), options.age)
    masks = [hit_mask(case, options.granularity, rate, "run") for rate in (0.0, options.rate, 1.0)]
    put_backs = [partial(ring.put_back, ring.on_device(mask)) for mask in masks]

    def steps(profiled: bool) -> None:
        for put_back in (None, *put_backs):
            if put_back is not None:
                put_back()
            if profiled:
                torch.cuda.synchronize()
                torch.cuda.cudart().cudaProfilerStart()
            work.exact() if put_back is None else work.mac(ring.reuse)
            if profiled:
                torch.cuda.synchronize()
                torch.cuda.cudart().cudaProfilerStop()

    steps(profiled=False)
    steps(profiled=options.device == "cuda")
    ring.reuse.check()
    expected = 2 * sum(int(mask.sum()) for mask in masks)
    if ring.reuse.stats().query_head_hits != expected:
        raise SystemExit("a step had other hits than were planted")
    print(f"{case}: exact, all missing, {options.rate:g} hitting, all hitting")


if __name__ == "__main__":
    main()
