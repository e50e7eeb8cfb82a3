"""Long chains: every step builds on entries that earlier steps built, so errors would add up."""

from __future__ import annotations

import pytest
import torch
from cases import make_kv, make_q, random_walk, small_config
from compare import Twins, out_tolerance
from torch import Tensor

import mac_attn

HEADS = (4, 2)
HEAD_DIM = 64


def decode_chain(
    cfg: mac_attn.ReuseConfig,
    *,
    steps: int,
    first: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    rings_every: int = 1,
    seed: int = 0,
) -> Twins:
    """Decode `steps` tokens of each request from an empty ring, the first at length `first`.

    The answers are compared after every step and the rings after every `rings_every`.
    """
    length = first + steps
    kv = make_kv(
        seed,
        batch=batch,
        length=length,
        num_kv_heads=HEADS[1],
        head_dim=HEAD_DIM,
        dtype=dtype,
        device=device,
    )
    kv.write([0] * batch, [first] * batch)
    size = (batch, HEADS[0], HEAD_DIM)
    q = make_q(seed + 1, steps, *size, dtype=dtype, device=device)
    q_match = random_walk(
        seed + 2, steps, batch, HEADS[1], HEADS[0] // HEADS[1], HEAD_DIM, dtype=dtype, device=device
    )
    twins = Twins(cfg, num_slots=batch, heads=HEADS, head_dim=HEAD_DIM, dtype=dtype, device=device)
    for t in range(steps):
        n = first + t + 1
        kv.write([n - 1] * batch, [n] * batch)
        rings = t % rings_every == 0 or t == steps - 1
        twins.decode(kv, [n] * batch, q[t], q_match[t], list(range(batch)), rings=rings)
    return twins


def test_paper_setting_over_1000_steps(device):
    """S = 0, decisions per head, absolute threshold: the paper, step by step."""
    cfg = small_config(granularity="head", threshold_mode="absolute", threshold=0.75)
    twins = decode_chain(cfg, steps=1000, first=20, device=device)
    assert 0.2 < twins.hit_rate < 0.8, twins.hit_rate


def test_group_anchors_bfloat16_over_200_steps(device):
    cfg = small_config(anchors=8, window=48, entries=12)
    twins = decode_chain(cfg, steps=200, first=40, device=device, dtype=torch.bfloat16, batch=2)
    assert 0.2 < twins.hit_rate < 0.8, twins.hit_rate


def test_deep_reuse_does_not_drift(device):
    """Hits of hits of hits: with a lax threshold the depth grows to the number of steps."""
    cfg = small_config(threshold=4.0)
    twins = decode_chain(cfg, steps=150, first=40, device=device, rings_every=10)
    depths = [int(e.depth.max()) for e in twins.reference.entries(0).values()]
    assert max(depths) > 40, depths


@pytest.mark.parametrize("granularity, anchors", [("head", 0), ("group", 4)])
def test_relative_threshold_zero_equals_exact_decode(granularity, anchors, device):
    """No hit may ever occur, even for a repeated query, and a miss is exact attention."""
    cfg = small_config(threshold=0.0, granularity=granularity, anchors=anchors)
    cache = mac_attn.ReuseCache(
        cfg,
        num_slots=2,
        num_qo_heads=HEADS[0],
        num_kv_heads=HEADS[1],
        head_dim=HEAD_DIM,
        dtype=torch.float32,
        device=device,
    )
    kv = make_kv(30, batch=2, length=100, num_kv_heads=HEADS[1], head_dim=HEAD_DIM, device=device)
    kv.write([0, 0], [100, 100])
    q = make_q(31, 100, 2, *HEADS[:1], HEAD_DIM, device=device)
    q_match = make_q(32, 2, HEADS[0], HEAD_DIM, device=device)  # the same at every step

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    for n in range(1, 101):
        call = (q[n - 1], kv.cache, kv.table([n, n]), ints(n, n))
        out, lse = mac_attn.decode(
            *call, reuse=cache, slots=ints(1, 0), q_match=q_match, return_lse=True
        )
        exact, exact_lse = mac_attn.decode(*call, return_lse=True)
        # Both read every token, but split at different places: two float32 roundings apart.
        tolerance = out_tolerance(torch.float32, device)
        tolerance.check(out, exact, f"out at n = {n}")
        tolerance.check(lse, exact_lse, f"lse at n = {n}")
    assert (cache.ring_depth == 0).all()
