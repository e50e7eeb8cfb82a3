"""A step of six query heads over two KV heads, and the arguments of every op for it."""

import math

import torch
from cases import plain_dtype
from torch import Tensor

import mac_attn

BATCH, HEADS, KV_HEADS, HEAD_DIM, PAGE, PAGES = 2, 6, 2, 64, 16, 20
ENTRIES, BAND = 16, 8


def make_step(device, dtype=None, n=100):
    """Queries, pages, table and lengths of one decode step."""
    dtype = dtype or plain_dtype(device)
    kv = torch.randn(BATCH * PAGES, 2, PAGE, KV_HEADS, HEAD_DIM, device=device).to(dtype)
    table = torch.randperm(BATCH * PAGES, device=device).int().view(BATCH, PAGES)
    q = torch.randn(BATCH, HEADS, HEAD_DIM, device=device).to(dtype)
    seq_lens = torch.tensor([n, n - 30], dtype=torch.int32, device=device)
    return q, kv, table, seq_lens


def make_reuse(device, dtype=None, rotary=None, head_dim_v=HEAD_DIM, **options):
    base = {"entries": ENTRIES, "window": 16, "band": BAND, "anchors": 4, "min_context": 1}
    options = {**base, "threshold": 0.1, **options}
    return mac_attn.ReuseCache(
        mac_attn.ReuseConfig(**options),
        num_slots=3,
        num_qo_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        head_dim_v=head_dim_v,
        dtype=dtype or plain_dtype(device),
        device=device,
        rotary=rotary,
    )


def snapshot(reuse: mac_attn.ReuseCache) -> list[Tensor]:
    """All tensors but the one that holds most others, of which there are views."""
    tensors = {name: t for name, t in vars(reuse).items() if isinstance(t, Tensor)}
    return [t.clone() for name, t in tensors.items() if name != "ring"]


def slots_on(device) -> Tensor:
    return torch.tensor([2, 0], dtype=torch.int32, device=device)


def prime(reuse, q, kv, table, seq_lens):
    """The step before `seq_lens`, of other queries: it leaves what a sample is drawn by.

    It does not count.
    """
    slots, other = slots_on(q.device), torch.randn_like(q)
    mac_attn.decode(q, kv, table, seq_lens - 1, reuse=reuse, slots=slots, q_match=other)
    reuse.counters.zero_()


def two_steps(reuse, device):
    """A miss, then a hit on a nearly equal query; returns the arguments of the second step.

    The pages are one tensor, or a pair where values are shorter than keys.
    """
    q, kv, table, seq_lens = make_step(device, reuse.dtype)
    if reuse.head_dim_v < HEAD_DIM:
        kv = (kv[:, 0], kv[:, 1, ..., : reuse.head_dim_v])
    prime(reuse, q, kv, table, seq_lens)
    q_match = torch.randn_like(q)
    mac_attn.decode(q, kv, table, seq_lens, reuse=reuse, slots=slots_on(device), q_match=q_match)
    return q, kv, table, seq_lens + 1, q_match


def op_arguments(reuse, device, tokens=None):
    """Of a step of one query token or, with `tokens`, of so many, the second request's fewer."""
    q, kv, table, seq_lens, q_match = two_steps(reuse, device)
    slots, query_lens, first = slots_on(device), None, seq_lens - 1
    if tokens:
        q, q_match = (x[:, None].repeat(1, tokens, 1, 1) for x in (q, q_match))
        query_lens = torch.tensor([tokens, tokens - 1], dtype=torch.int32, device=device)
        seq_lens = first + query_lens
    scale, persistent = 1 / math.sqrt(HEAD_DIM), (reuse.workspace, reuse.error_flag)
    rings = (*reuse.ring_arguments, reuse.threshold, *reuse.match_options)
    match = (q_match, seq_lens, query_lens, slots, None, *rings, *persistent)
    matched = torch.ops.mac_attn.match(*match)
    there = torch.arange(tokens or 1, device=device) < (seq_lens - first)[:, None]
    source = torch.where(there, (first - 1)[:, None], -1)  # the planted hit
    assert torch.equal(matched[0].view(BATCH, KV_HEADS, -1, HEADS // KV_HEADS).amin((1, 3)), source)
    ring, *_, entries, anchors = reuse.ring_arguments
    cache = (*(kv if isinstance(kv, tuple) else kv.unbind(1)), None, None, table)
    amend = (q, *cache, seq_lens, query_lens, *matched, slots, ring, entries, anchors, BAND)
    amend += (reuse.layer, scale, 0.0, False, *persistent)
    amended = torch.ops.mac_attn.amend(*amend)
    out = q.new_empty((*q.shape[:-1], reuse.head_dim_v))
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    complete = (*amended, *matched, q, q_match, seq_lens, query_lens, slots, None, ring, KV_HEADS)
    complete += (entries, BAND, reuse.match_options[-1], amend[1], None, table, scale)
    complete += (None, reuse.workspace, out, lse)
    attention = (*amend[:3], False, *amend[3:8])  # to query_lens
    decode = (
        *attention,
        slots,
        q_match,
        None,
        *rings,
        False,
        True,
        reuse.layer,
        scale,
        0.0,
        False,
        None,
    )
    decode += (*persistent, None, False, 1.0)
    return {
        "match.default": match,
        "amend.default": amend,
        "complete.default": complete,
        "decode_exact.default": (*attention, scale, 0.0, False, None),
        "decode_exact.into": (out, *attention, scale, 0.0, False, None),
        "decode_reuse.default": decode,
        "decode_reuse.into": (out, *decode),
        "complete_exact.default": (
            *(*amended[:2], seq_lens, query_lens, KV_HEADS if tokens else 1, None, out, lse),
        ),
    }
