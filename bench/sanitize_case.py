"""Small cases of every CUDA kernel, for compute-sanitizer; each compared with the CPU kernels.

    compute-sanitizer --tool memcheck python bench/sanitize_case.py

Exact decode, and chained steps that miss and hit, with decisions per head and per group, with and
without anchors, several head sizes and both dtypes, float8 caches with sinks, lengths off every
tile boundary, and padding.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import mac_attn

# head_dim, num_qo_heads, num_kv_heads, dtype, granularity, float8 KV cache and sinks, anchors
CASES = [
    (128, 8, 2, torch.bfloat16, "group", False, 16),
    (128, 8, 1, torch.bfloat16, "head", False, 0),
    (64, 6, 2, torch.float16, "group", False, 0),
    (96, 20, 1, torch.bfloat16, "group", False, 0),
    (256, 4, 2, torch.bfloat16, "group", False, 8),
    (128, 8, 2, torch.bfloat16, "group", True, 16),
    (64, 6, 2, torch.float16, "head", True, 0),
    (80, 20, 1, torch.bfloat16, "group", True, 0),
    (256, 4, 2, torch.bfloat16, "group", True, 8),
    (512, 16, 2, torch.bfloat16, "group", False, 8),
    (512, 8, 2, torch.float16, "head", True, 0),
    (192, 8, 2, torch.bfloat16, "group", False, 8),
]
HEAD_DIM_V = {192: 128}  # of values that are shorter than keys
# Before the first step; 0 stays a padding row. Of 512 keys and more their spread is measured.
LENGTHS = [520, 0, 150, 333]
PAGE_SIZE, STEPS = 16, 5


Case = tuple[int, int, int, torch.dtype, str, bool, int]


def run(case: Case, device: str) -> list[Tensor]:
    """Outputs of exact decode, chained steps of reuse and `unrotate`, on the CPU in float32."""
    head_dim, num_qo_heads, num_kv_heads, dtype, granularity, float8, anchors = case
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    batch, per_request = len(LENGTHS), (max(LENGTHS) + STEPS) // PAGE_SIZE + 1
    head_dim_v = HEAD_DIM_V.get(head_dim, head_dim)
    rows = (batch * per_request, PAGE_SIZE, num_kv_heads)
    kv = (random(*rows, head_dim), random(*rows, head_dim_v))
    more: dict[str, Tensor] = {}
    if float8:
        kv = (kv[0].to(torch.float8_e4m3fn), kv[1].to(torch.float8_e4m3fn))
        scales = torch.linspace(0.5, 2, num_kv_heads, device=device)
        sinks = torch.linspace(-2, 4, num_qo_heads, device=device)
        more = {"k_scale": scales, "v_scale": scales.flip(0), "sinks": sinks}
    table = torch.randperm(batch * per_request, generator=generator, dtype=torch.int32)
    table = table.view(batch, per_request).to(device)
    cfg = mac_attn.ReuseConfig(
        entries=24,
        window=64,
        band=48,
        anchors=anchors,
        threshold=0.5,
        granularity=granularity,  # type: ignore[arg-type]
        min_context=64,
        max_reuse_depth=1 if anchors else None,
    )
    reuse = mac_attn.ReuseCache(
        cfg,
        num_slots=batch + 1,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=dtype,
        device=device,
    )
    slots = torch.tensor([2, 0, 4, 1], dtype=torch.int32, device=device)
    first = random(batch, num_qo_heads, head_dim)
    frequencies = 10000.0 ** -(torch.arange(head_dim // 4, device=device) / (head_dim // 4))
    rotary = mac_attn.RotaryEmbedding(frequencies, interleaved=granularity == "head")
    outs: list[Any] = []
    for step in range(STEPS):
        # Half of those that decide return to the first query at every other step, the others in
        # between: hits and misses in one call.
        fresh = random(batch, num_qo_heads, head_dim)
        together = 1 if granularity == "head" else num_qo_heads // num_kv_heads
        again = torch.arange(num_qo_heads, device=device)[:, None] // together % 2 == step % 2
        q = torch.where(again, first, fresh)
        lengths = [n + step + 1 if n else 0 for n in LENGTHS]
        seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
        outs.append(mac_attn.decode(q, kv, table, seq_lens, **more))
        ring = {"reuse": reuse, "slots": slots, "q_match": q}
        outs.append(mac_attn.decode(q, kv, table, seq_lens, **ring, **more))
        outs.append(mac_attn.unrotate(q, seq_lens - 1, rotary))
    reuse.check()
    outs.append(torch.tensor([reuse.stats().query_head_hits]))
    return [out.float().cpu() for out in outs]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many")
    options = parser.parse_args(argv)
    for case in CASES[: options.cases]:
        expected, outs = run(case, "cpu"), run(case, options.device)
        if int(outs[-1]) != int(expected[-1]) or int(outs[-1]) == 0:
            raise SystemExit(f"{case}: {int(outs[-1])} hits, the CPU kernels {int(expected[-1])}")
        # Anchors may be chosen differently where weights are close, which chains of hits carry on.
        limit = 0.05 if case[-1] else 0.01
        for i, (out, other) in enumerate(zip(outs[:-1], expected[:-1], strict=True)):
            error = float((out - other).norm() / other.norm())
            if not error <= limit:
                raise SystemExit(f"{case}: output {i} is off by {error:.1e} from the CPU kernels")
        print(f"{case}: agrees with the CPU kernels, {int(outs[-1])} hits", flush=True)


if __name__ == "__main__":
    main()
