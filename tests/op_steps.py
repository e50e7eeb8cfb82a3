"""A step of six query heads over two KV heads, and the arguments of every op for it."""

import math

import torch
from torch import Tensor

import mac_attn

BATCH, HEADS, KV_HEADS, HEAD_DIM, PAGE, PAGES = 2, 6, 2, 64, 16, 20
WINDOW, BAND = 16, 8


def make_step(device, dtype=torch.float32, n=100):
    """Queries, pages, table and lengths of one decode step."""
    kv = torch.randn(BATCH * PAGES, 2, PAGE, KV_HEADS, HEAD_DIM, device=device).to(dtype)
    table = torch.randperm(BATCH * PAGES, device=device).int().view(BATCH, PAGES)
    q = torch.randn(BATCH, HEADS, HEAD_DIM, device=device).to(dtype)
    seq_lens = torch.tensor([n, n - 30], dtype=torch.int32, device=device)
    return q, kv, table, seq_lens


def make_reuse(device, dtype=torch.float32, rotary=None, **options):
    options = {"window": WINDOW, "band": BAND, "anchors": 4, "min_context": 1, **options}
    return mac_attn.ReuseCache(
        mac_attn.ReuseConfig(**options),
        num_slots=3,
        num_qo_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
        device=device,
        rotary=rotary,
    )


def snapshot(reuse: mac_attn.ReuseCache) -> list[Tensor]:
    return [t.clone() for t in vars(reuse).values() if isinstance(t, Tensor)]


def slots_on(device) -> Tensor:
    return torch.tensor([2, 0], dtype=torch.int32, device=device)


def two_steps(reuse, device, dtype=torch.float32):
    """A miss, then a hit on a nearly equal query; returns the arguments of the second step."""
    q, kv, table, seq_lens = make_step(device, dtype)
    q_match = torch.randn_like(q)
    mac_attn.decode(q, kv, table, seq_lens, reuse=reuse, slots=slots_on(device), q_match=q_match)
    return q, kv, table, seq_lens + 1, q_match


def op_arguments(reuse, device):
    q, kv, table, seq_lens, q_match = two_steps(reuse, device)
    slots = slots_on(device)
    ring = (reuse.slot_begin, reuse.slot_end, reuse.slot_request)
    match = (q_match, seq_lens, slots, None, reuse.ring_query, reuse.ring_depth)
    match += (reuse.ring_position, *ring, reuse.threshold, True, False, BAND, 1, 2**31 - 1)
    match += (reuse.workspace, reuse.error_flag)
    source = torch.ops.mac_attn.match(*match)
    assert (source == seq_lens[:, None] - 2).all()  # the planted hit
    scale = 1 / math.sqrt(HEAD_DIM)
    amend = (q, kv[:, 0], kv[:, 1], table, seq_lens, source, slots)
    amend += (reuse.ring_anchors, WINDOW, BAND, scale, 0.0, reuse.workspace, reuse.error_flag)
    states, state_lse, anchors = torch.ops.mac_attn.amend(*amend)
    out, lse = torch.empty_like(q), torch.empty_like(state_lse[0])
    complete = (states, state_lse, anchors, source, q_match, seq_lens, slots, None)
    complete += (reuse.ring_query, reuse.ring_out, reuse.ring_lse, reuse.ring_depth)
    complete += (reuse.ring_anchors, reuse.ring_position, *ring, reuse.counters, BAND)
    complete += (reuse.workspace, out, lse)
    attention = (*amend[:3], False, *amend[3:5])
    decode = (*attention, slots, q_match, None, *complete[8:18])
    decode += (reuse.threshold, True, False, BAND, 1, 2**31 - 1, scale, 0.0)
    decode += (reuse.workspace, reuse.error_flag, None, False, 1.0)
    return {
        "match.default": match,
        "amend.default": amend,
        "complete.default": complete,
        "decode_exact.default": (*attention, scale, 0.0),
        "decode_exact.into": (*attention, scale, 0.0, out),
        "decode_reuse.default": decode,
        "decode_reuse.into": (*decode, out),
        "complete_exact.default": (states, state_lse, seq_lens, out, lse),
    }
