"""Long chains: every step builds on entries that earlier steps built, so errors would add up."""

from __future__ import annotations

import pytest
import torch
from cases import make_kv, make_q, plain_dtype, random_walk, small_config
from compare import Twins, out_tolerance, state_tolerance
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
    dtype: torch.dtype | None = None,
    batch: int = 1,
    rings_every: int = 1,
    tokens: int = 1,
    seed: int = 0,
) -> Twins:
    """Decode `steps` tokens of each request from an empty ring, the first at length `first`.

    The answers are compared after every step and the rings after every `rings_every`. With several
    `tokens` a step has so many, of which all but one are rejected.
    """
    length = first + steps + tokens
    kv = make_kv(
        seed,
        batch=batch,
        length=length,
        num_kv_heads=HEADS[1],
        head_dim=HEAD_DIM,
        dtype=dtype,
        device=device,
    )
    kv.write([0] * batch, [first + tokens - 1] * batch)
    size = (batch, HEADS[0], HEAD_DIM)
    kind = {"dtype": dtype, "device": device}
    q = make_q(seed + 1, steps + tokens - 1, *size, **kind)
    group, every = HEADS[0] // HEADS[1], steps + tokens - 1
    q_match = random_walk(seed + 2, every, batch, HEADS[1], group, HEAD_DIM, **kind)
    twins = Twins(cfg, num_slots=batch, heads=HEADS, head_dim=HEAD_DIM, dtype=dtype, device=device)
    for t in range(steps):
        n = first + t + tokens
        kv.write([n - 1] * batch, [n] * batch)
        rings = t % rings_every == 0 or t == steps - 1
        queries = (q[t], q_match[t])
        if tokens > 1:
            queries = tuple(x[t : t + tokens].transpose(0, 1) for x in (q, q_match))
        twins.decode(kv, [n] * batch, *queries, list(range(batch)), rings=rings)
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


@pytest.mark.parametrize("tokens", [1, 3])
def test_deep_reuse_does_not_drift(tokens, device):
    """Hits of hits of hits: with a lax threshold the depth grows to the number of steps."""
    cfg = small_config(threshold=4.0)
    twins = decode_chain(cfg, steps=150, first=40, device=device, rings_every=10, tokens=tokens)
    depths = [int(e.depth.max()) for e in twins.reference.entries(0).values()]
    assert max(depths) > 40, depths


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("granularity, anchors", [("head", 0), ("group", 4)])
def test_relative_threshold_zero_equals_exact_decode(granularity, anchors, tokens, device):
    """No hit may ever occur, even for a repeated query, and a miss is exact attention."""
    cfg = small_config(threshold=0.0, granularity=granularity, anchors=anchors)
    cache = mac_attn.ReuseCache(
        cfg,
        num_slots=2,
        num_qo_heads=HEADS[0],
        num_kv_heads=HEADS[1],
        head_dim=HEAD_DIM,
        dtype=plain_dtype(device),
        device=device,
    )
    kv = make_kv(30, batch=2, length=100, num_kv_heads=HEADS[1], head_dim=HEAD_DIM, device=device)
    kv.write([0, 0], [100, 100])
    q = make_q(31, 100, 2, *HEADS[:1], HEAD_DIM, device=device)
    q_match = make_q(32, 2, HEADS[0], HEAD_DIM, device=device)  # the same at every step
    if tokens > 1:
        q, q_match = (x.unsqueeze(-3).expand(*x.shape[:-2], tokens, -1, -1) for x in (q, q_match))

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    for n in range(tokens, 101):
        call = (q[n - 1], kv.cache, kv.table([n, n]), ints(n, n))
        out, lse = mac_attn.decode(
            *call, reuse=cache, slots=ints(1, 0), q_match=q_match, return_lse=True
        )
        exact, exact_lse = mac_attn.decode(*call, return_lse=True)
        # Both read every token, but split at different places.
        out_tolerance(q.dtype, device, 2).check(out, exact, f"out at n = {n}")
        state_tolerance(q.dtype, device).check(lse, exact_lse, f"lse at n = {n}")
    assert (cache.ring_depth == 0).all()
