"""Decode attention on the CPU: exact and all-hit steps beside torch SDPA and a plain read loop.

    python bench/cpu_decode.py [--quick] [--contexts 8192 32768] [--rounds 15] [--json FILE]

Everything runs in one process on the same data, round robin, and the median of the rounds counts.
Before each call the read loop goes over a buffer that exceeds the processor's caches by far: that
is what clears them, and what the bandwidth is compared with. The columns are explained in
bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
from report import cpu_name
from timing import CPU_FLUSH_BYTES, read_loop
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import mac_attn
from mac_attn.info import info

NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
PAGE_SIZE = 16


class Context:
    """One context length: its cache, and what is timed on it."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.kv_bytes = 2 * length * NUM_KV_HEADS * HEAD_DIM * 2
        pages = length // PAGE_SIZE
        shape = (pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
        self.kv = tuple(torch.randn(shape).to(torch.bfloat16) for _ in range(2))
        # SDPA's own layout: a dense [1, num_kv_heads, length, head_dim].
        self.dense = tuple(t.contiguous() for t in self._strided())
        self.table = torch.arange(pages, dtype=torch.int32)[None]
        self.seq_lens = torch.tensor([length], dtype=torch.int32)
        self.q = torch.randn(1, NUM_QO_HEADS, HEAD_DIM).to(torch.bfloat16)
        self.slots = torch.zeros(1, dtype=torch.int32)
        self.ring = self._ring()
        self._check()

    def _strided(self) -> tuple[Tensor, ...]:
        """The pages as SDPA takes them without a copy."""
        return tuple(
            t.view(1, self.length, NUM_KV_HEADS, HEAD_DIM).transpose(1, 2) for t in self.kv
        )

    def _ring(self) -> mac_attn.ReuseCache:
        """A ring that has seen, and after every step sees again, nearly the current query."""
        reuse = mac_attn.ReuseCache(
            mac_attn.ReuseConfig(),
            num_slots=1,
            num_qo_heads=NUM_QO_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            dtype=torch.bfloat16,
        )
        # Random queries first, so that match has a full ring to search, then the planted one.
        entries = reuse.cfg.entries
        reuse.ring_query.copy_(torch.randn(reuse.ring_query.shape).to(torch.bfloat16))
        first = self.length - 9 - entries
        reuse.ring_position.copy_(torch.arange(first, first + entries, dtype=torch.int32))
        reuse.ring_stored.fill_(entries)
        reuse.slot_end[0] = reuse.slot_reach[0] = self.length - 9
        for n in range(self.length - 8, self.length - 1):  # misses, until lists have their length
            self._decode(reuse, n)
            reuse.ring_position[reuse.ring_position >= n - 1] = 0
        self._decode(reuse, self.length - 1)  # a miss whose entry stays
        return reuse

    def _decode(self, reuse: mac_attn.ReuseCache | None, n: int) -> Tensor:
        seq_lens = self.seq_lens if n == self.length else self.seq_lens - (self.length - n)
        if reuse is None:
            return mac_attn.decode(self.q, self.kv, self.table, seq_lens)
        return mac_attn.decode(
            self.q, self.kv, self.table, seq_lens, reuse=reuse, slots=self.slots, q_match=self.q
        )

    def _check(self) -> None:
        expected = sdpa(
            self.q[:, :, None].float(), *(t.float() for t in self.dense), enable_gqa=True
        )[:, :, 0]
        out = self._decode(None, self.length).float()
        error = float((out - expected).norm() / expected.norm())
        # bfloat16 output: half a unit of its 8 bits
        if error > 4e-3:
            raise SystemExit(f"exact decode at {self.length} is off by {error:.1e} from SDPA")

    def sdpa(self) -> None:
        sdpa(self.q[:, :, None], *self.dense, enable_gqa=True)

    def sdpa_strided(self) -> None:
        sdpa(self.q[:, :, None], *self._strided(), enable_gqa=True)

    def exact(self) -> None:
        self._decode(None, self.length)

    def hit(self) -> None:
        """The step after the planted one; `put_back` makes the next one the same."""
        self._decode(self.ring, self.length)

    def put_back(self) -> None:
        self.ring.slot_end[0] = self.length - 1

    def hit_bytes(self) -> int:
        """K, V and ring queries that an all-hit step has to read."""
        reuse = self.ring
        stats = reuse.stats()
        steps = stats.steps - 8  # all but the planted misses
        assert stats.query_head_hits == steps * NUM_QO_HEADS, "a timed step was not a hit"
        misses = sum(range(self.length - 8, self.length)) * NUM_KV_HEADS
        tokens = (stats.kv_tokens_read - misses) / steps
        return int(tokens * 2 * HEAD_DIM * 2) + reuse.ring_query.nbytes


def measure(contexts: list[int], rounds: int) -> dict[str, object]:
    loop = read_loop()
    buffer = torch.ones(CPU_FLUSH_BYTES // 4, dtype=torch.int32)
    times: dict[tuple[int, str], list[float]] = {}
    loop_times = []
    rows = []
    for length in contexts:
        context = Context(length)
        calls = ("sdpa", "sdpa_strided", "exact", "hit")
        for i in range(rounds + 2):
            for name in calls:
                # SDPA takes hundreds of milliseconds at 128K: a third of the rounds is enough.
                if name.startswith("sdpa") and i % 3:
                    continue
                context.put_back()
                start = time.perf_counter()
                loop(buffer)
                loop_times.append(time.perf_counter() - start)
                call = getattr(context, name)
                start = time.perf_counter()
                call()
                elapsed = time.perf_counter() - start
                if i >= 2 or name.startswith("sdpa") and i > 0:
                    times.setdefault((length, name), []).append(elapsed)
        ms = {name: 1e3 * median(times[length, name]) for name in calls}
        peer = min(ms["sdpa"], ms["sdpa_strided"])
        rows.append(
            {
                "context": length,
                "sdpa_ms": peer,
                "exact_ms": ms["exact"],
                "exact_speedup": peer / ms["exact"],
                "exact_gb_s": context.kv_bytes / ms["exact"] / 1e6,
                "hit_ms": ms["hit"],
                "hit_speedup": peer / ms["hit"],
                "hit_gb_s": context.hit_bytes() / ms["hit"] / 1e6,
            }
        )
        del context
    gb_s = buffer.nbytes / median(loop_times) / 1e9
    for row in rows:
        row["exact_share_of_loop"] = row["exact_gb_s"] / gb_s
    return {"read_loop_gb_s": gb_s, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each kind")
    parser.add_argument("--quick", action="store_true", help="8K and 32K, few rounds")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    if options.quick:
        options.contexts, options.rounds = [8192, 32768], 9
    torch.manual_seed(0)
    build = info()
    print(f"{cpu_name()}, {torch.get_num_threads()} threads; mac_attn {build['mac_attn']}")
    print(f"({build['simd']}, {build['compiler']}), torch {torch.__version__}")
    print(f"command: python {' '.join(sys.argv)}")
    print(
        f"batch 1, {NUM_QO_HEADS}/{NUM_KV_HEADS} heads of {HEAD_DIM}, bfloat16, "
        f"median of {options.rounds}\n"
    )
    result = measure(options.contexts, options.rounds)
    print(f"plain read loop: {result['read_loop_gb_s']:.1f} GB/s\n")
    print("context   SDPA ms  exact ms  ratio  GB/s  of loop  all-hit ms  ratio  GB/s")
    for r in result["rows"]:
        print(
            f"{r['context']:7}  {r['sdpa_ms']:8.2f}  {r['exact_ms']:8.2f}  "
            f"{r['exact_speedup']:5.1f}  {r['exact_gb_s']:4.1f}  {r['exact_share_of_loop']:7.0%}  "
            f"{r['hit_ms']:10.3f}  {r['hit_speedup']:5.0f}  {r['hit_gb_s']:4.1f}"
        )
    last = result["rows"][-1]
    for earlier in result["rows"][:-1]:
        print(
            f"all-hit step at {last['context']} over {earlier['context']}: "
            f"{last['hit_ms'] / earlier['hit_ms']:.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps({"build": build, "cpu": cpu_name(), **result}, indent=1))


if __name__ == "__main__":
    main()
