"""What `ReuseCache.audit` costs: a step of `mac_attn.decode` with it on, sampled and not, and off.

python bench/audit_cost.py [--context 8192] [--rounds 200]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import median

import torch

import mac_attn
from mac_attn.info import info

_EVERY = 64


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args(argv)
    n, last = options.context, options.context + options.rounds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kv = torch.randn(2, 1, last, 8, 128, dtype=torch.bfloat16, device=device)
    cache, table = mac_attn.dense_as_pages(kv[0], kv[1])
    q = torch.randn(1, 32, 128, dtype=torch.bfloat16, device=device)
    slots = torch.zeros(1, dtype=torch.int32, device=device)
    times: dict[str, list[float]] = {"off": [], "not sampled": [], "sampled": []}
    for audited in (False, True):
        reuse = mac_attn.ReuseCache(
            mac_attn.ReuseConfig(),
            num_slots=1,
            num_qo_heads=32,
            num_kv_heads=8,
            head_dim=128,
            dtype=torch.bfloat16,
            device=device,
        )
        reuse.audit(_EVERY if audited else None)
        for length in range(n, last):  # the query stays the same: all steps hit but the first
            lens = torch.full((1,), length, dtype=torch.int32, device=device)
            start = time.perf_counter()
            mac_attn.decode(q, cache, table, lens, reuse=reuse, slots=slots, q_match=q)
            if q.is_cuda:
                torch.cuda.synchronize()
            kind = "off" if not audited else "not sampled" if length % _EVERY else "sampled"
            if length > n + 8:
                times[kind].append(1e6 * (time.perf_counter() - start))
    print(f"{info()['gpu'] or info()['simd']}, torch {torch.__version__}, 32/8 heads of 128, {n}")
    for kind, found in times.items():
        print(f"audit {kind:12} {median(found):8.1f} us a step")


if __name__ == "__main__":
    main()
