"""One captured step, replayed ten thousand times while lengths, pages, slots and queries change.

Beside it the same steps run without a graph on a cache of their own. The kernels add up in a fixed
order, so both must agree to the bit. Steps that are known to miss must be exact decode, too.
"""

from __future__ import annotations

import pytest
import torch

import mac_attn

REPLAYS = 10_000
BATCH, SLOTS, PAGE_SIZE, MAX_PAGES = 4, 6, 16, 40
NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 64


def make_cache(anchors: int, device: torch.device) -> mac_attn.ReuseCache:
    cfg = mac_attn.ReuseConfig(
        entries=32,
        window=48,
        band=48,
        anchors=anchors,
        threshold=0.3,
        min_context=64,
        max_reuse_depth=1 if anchors else None,
    )
    return mac_attn.ReuseCache(
        cfg,
        num_slots=SLOTS,
        num_qo_heads=NUM_QO_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=torch.bfloat16,
        device=device,
    )


@pytest.mark.slow
@pytest.mark.parametrize("anchors", [0, 8])
def test_replays(anchors: int, cuda: torch.device) -> None:
    generator = torch.Generator().manual_seed(anchors)

    def below(limit: int, *shape: int) -> torch.Tensor:
        return torch.randint(limit, shape, generator=generator)

    kv = torch.randn(
        BATCH * MAX_PAGES, 2, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, generator=generator
    ).to(cuda, torch.bfloat16)
    # Three directions and little noise: a query resembles the others of its direction.
    directions = torch.randn(3, NUM_QO_HEADS, HEAD_DIM, generator=generator)
    table = torch.randperm(BATCH * MAX_PAGES, generator=generator).view(BATCH, MAX_PAGES)
    table = table.to(cuda, torch.int32)
    lengths = below(500, BATCH).int()
    seq_lens, slots = lengths.to(cuda), torch.arange(BATCH, dtype=torch.int32, device=cuda)
    q = torch.empty(BATCH, NUM_QO_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=cuda)
    q_match = torch.empty_like(q)
    captured, eager = make_cache(anchors, cuda), make_cache(anchors, cuda)

    def step(reuse: mac_attn.ReuseCache) -> torch.Tensor:
        out = mac_attn.decode(q, kv, table, seq_lens, reuse=reuse, slots=slots, q_match=q_match)
        assert isinstance(out, torch.Tensor)
        return out

    def draw() -> None:
        """The next step: most requests go on, some are others now, some rows are padding."""
        event = below(20, BATCH)
        fresh = event == 0
        lengths[:] = torch.where(fresh, below(500, BATCH).int(), lengths + 1)
        lengths[lengths >= PAGE_SIZE * MAX_PAGES] = 1
        seq_lens.copy_(torch.where(event == 1, 0, lengths))
        slots.copy_(torch.randperm(SLOTS, generator=generator)[:BATCH] if fresh.any() else slots)
        if fresh.any():
            pages = torch.randperm(BATCH * MAX_PAGES, generator=generator)
            table.copy_(pages.view(BATCH, MAX_PAGES).int())
        noise = torch.randn(q.shape, generator=generator)
        q_match.copy_(directions[below(3, BATCH)] + 0.05 * noise)
        q.copy_(torch.randn(q.shape, generator=generator))

    draw()
    for _ in range(3):
        step(captured)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(captured)
    captured.reset(torch.arange(SLOTS, dtype=torch.int32, device=cuda))
    differing = torch.zeros((), dtype=torch.int64, device=cuda)
    exact_error = torch.zeros((), device=cuda)
    for i in range(REPLAYS):
        draw()
        if i % 50 == 0:  # nothing like it in any ring
            q_match.copy_(torch.randn(q.shape, generator=generator) * 20)
        graph.replay()
        differing += (out != step(eager)).sum()
        if i % 50 == 0:
            exact = mac_attn.decode(q, kv, table, seq_lens).float()
            error = ((out.float() - exact).abs() / (1 + exact.abs())).max()
            exact_error = torch.maximum(exact_error, error)
    captured.check()
    assert int(differing) == 0
    # Weights and results are rounded to bfloat16, by 2^-9 each, on both sides: 2^-7 of the result
    # and of the values' spread, which is 1. Twice that for the worst of some 10^6 elements.
    assert float(exact_error) <= 2**-6
    stats = captured.stats()
    print(stats)
    assert stats.steps > REPLAYS
    assert 0.2 < stats.hit_rate < 0.9  # both kinds of step were there
