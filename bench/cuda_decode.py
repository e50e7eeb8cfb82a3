"""Decode attention on a GPU: exact, all-miss and all-hit steps, as CUDA-graph replays.

    python bench/cuda_decode.py [--anchors 0 64] [--json FILE]

Hits are planted in the rings: random entries fill the window, and one holds the current query.
The L2 cache is overwritten before every replay; the median of 30 counts. The history of the slots
is put back by one small fill kernel within the graph, whose own time stands in the last column.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

import mac_attn
from mac_attn.info import info

HEAD_DIM, PAGE_SIZE, AGE = 128, 16, 300
CASES = [  # batch, num_qo_heads, num_kv_heads, context
    (1, 32, 8, 32768),
    (1, 32, 8, 126976),
    (16, 32, 8, 32768),
    (16, 32, 4, 126976),
    (64, 32, 4, 32768),
    (64, 32, 8, 32768),
]


def replay_us(call: Callable[[], object], flush: torch.Tensor, rounds: int = 30) -> float:
    """Median time of a captured call, microseconds, its data not in the L2 cache."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for i in range(rounds + 5):
        flush.fill_(i)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 5:
            times.append(1e3 * start.elapsed_time(end))
    return median(times)


def measure(case: tuple[int, int, int, int], anchors: int, flush: torch.Tensor) -> dict[str, float]:
    batch, num_qo_heads, num_kv_heads, length = case
    device, dtype = "cuda", torch.bfloat16
    pages = length // PAGE_SIZE
    kv = torch.empty(
        (batch * pages, 2, PAGE_SIZE, num_kv_heads, HEAD_DIM), dtype=dtype, device=device
    ).normal_()
    table = torch.randperm(batch * pages, device=device).int().view(batch, pages)
    seq_lens = torch.full((batch,), length, dtype=torch.int32, device=device)
    slots = torch.arange(batch, dtype=torch.int32, device=device)
    q, q_match = (
        torch.randn(batch, num_qo_heads, HEAD_DIM, device=device).to(dtype) for _ in range(2)
    )
    reuse = mac_attn.ReuseCache(
        mac_attn.ReuseConfig(anchors=anchors),
        num_slots=batch,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        dtype=dtype,
        device=device,
    )
    window = reuse.cfg.window
    reuse.ring_query.normal_()
    reuse.ring_out.normal_()
    reuse.ring_lse.fill_(10.0)
    if anchors:
        random = torch.randint(0, length - 2048, reuse.ring_anchors.shape, device=device)
        reuse.ring_anchors.copy_(random.sort(-1).values)
    positions = torch.arange(length - 1 - window, length - 1, dtype=torch.int32, device=device)
    reuse.ring_position[:, positions.long() % window] = positions

    def put_back() -> None:
        reuse.slot_end.fill_(length - 1)

    def step() -> None:
        put_back()
        mac_attn.decode(q, kv, table, seq_lens, reuse=reuse, slots=slots, q_match=q_match)

    times = {"exact": replay_us(lambda: mac_attn.decode(q, kv, table, seq_lens), flush)}
    times["miss"] = replay_us(step, flush)
    if reuse.stats().query_head_hits:
        raise SystemExit("a step that was to miss has hit")
    group = num_qo_heads // num_kv_heads
    place = (length - 1 - AGE) % window
    reuse.ring_query[:, :, place] = q_match.view(batch, num_kv_heads, group, HEAD_DIM)
    reuse.ring_depth.zero_()
    reuse.counters.zero_()
    times["hit"] = replay_us(step, flush)
    if reuse.stats().hit_rate != 1:
        raise SystemExit("a step that was to hit has missed")
    reuse.check()
    times["put_back"] = replay_us(put_back, flush)
    times["exact_tb_s"] = 2 * kv[:, 0].nbytes / times["exact"] / 1e6
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--anchors", type=int, nargs="+", default=[0, 64])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    build = info()
    print(f"{build['gpu']}; mac_attn {build['mac_attn']} for {build['cuda_arches']},")
    print(f"torch {torch.__version__}; command: python {' '.join(sys.argv)}")
    print(f"head_dim {HEAD_DIM}, bfloat16, pages of {PAGE_SIZE}; microseconds\n")
    print("batch  heads  context  anchors    exact  TB/s  all-miss  all-hit  of it put back")
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    rows = []
    for case in CASES:
        for anchors in options.anchors:
            t = measure(case, anchors, flush)
            batch, num_qo_heads, num_kv_heads, length = case
            print(
                f"{batch:5}  {num_qo_heads}/{num_kv_heads:<3} {length:8}  {anchors:7}  "
                f"{t['exact']:7.1f}  {t['exact_tb_s']:4.2f}  {t['miss']:8.1f}  {t['hit']:7.1f}  "
                f"{t['put_back']:14.1f}",
                flush=True,
            )
            rows.append({"case": case, "anchors": anchors, **t})
    if options.json:
        options.json.write_text(json.dumps({"build": build, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
