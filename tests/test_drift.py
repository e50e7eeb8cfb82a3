"""`max_drift`: heads whose logits would move far hit less; `seed` measures how far keys spread."""

from __future__ import annotations

import pytest
import torch
from cases import small_config

import mac_attn
from mac_attn import reference

HEADS, KV_HEADS, DIM, LENGTH = 4, 2, 32, 200


def make(max_drift: float | None, device: torch.device, key_scale: float = 1.0):
    """A seeded cache, its reference, and a step whose queries resemble those of the step before."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().to(device)

    cfg = small_config(anchors=16, entries=8, band=8, threshold=0.4, max_drift=max_drift)
    shape = dict(num_slots=2, num_qo_heads=HEADS, num_kv_heads=KV_HEADS)
    cache = mac_attn.ReuseCache(cfg, **shape, head_dim=DIM, dtype=torch.bfloat16, device=device)
    judge = reference.ReferenceReuse(cfg, **shape)
    q = normal(1, 4, HEADS, DIM)
    k, v = key_scale * normal(16, 16, KV_HEADS, DIM), normal(16, 16, KV_HEADS, DIM)
    k[:, :, 1] *= 3  # the second KV head is sharper
    table = torch.randperm(16, generator=generator)[None].int().to(device)
    lens, slots = (torch.tensor([x], dtype=torch.int32, device=device) for x in (LENGTH, 1))
    for reuse, seed in ((cache, mac_attn.seed), (judge, reference.seed)):
        seed(reuse, q, (k, v), table, lens, slots=slots, q_match=q)
    near = q[:, -1] + 0.5 * normal(1, HEADS, DIM)  # a quarter of its square
    step = (near, (k, v), table, lens + 1)
    return cache, judge, step, dict(slots=slots, q_match=near)


def test_seed_measures_the_spread_of_the_keys(device):
    cache, judge, (_, (k, _), table, lens), _ = make(3.0, device)
    got = cache.ring_spread[1].cpu()
    want = torch.tensor([ring.spread for ring in judge.slots[1].rings])
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=0)
    assert 8.5 < got[1] / got[0] < 9.5  # keys three times as large
    keys = k[table[0].long()].flatten(0, 1)[:LENGTH].float()
    logits = torch.randn(64, DIM, device=device) @ keys[:, 0].T * DIM**-0.5 / DIM**0.5
    assert got[0] == pytest.approx(float(logits.var(-1).mean()), rel=0.2)
    assert (cache.ring_spread[0] == 0).all()  # nobody's slot


@pytest.mark.parametrize(
    "max_drift, hits",
    [(None, [True, True]), (8.0, [True, True]), (1.0, [True, False]), (0.05, [False, False])],
)
def test_sharp_heads_hit_less(max_drift, hits, device):
    cache, judge, args, rows = make(max_drift, device)
    want = reference.decode(*args, **rows, reuse=judge)
    assert (want.source[0] >= 0).tolist() == [hit for hit in hits for _ in range(2)]
    matched = mac_attn.match(cache, rows["q_match"], args[3], rows["slots"])
    assert matched.source.cpu().tolist() == want.source.tolist()


def test_before_the_spread_is_known_a_head_counts_as_sharp(device):
    for max_drift, hits in ((4.0, False), (5.4, True)):  # 4 / 16 of the query's square, 5.4 / 16
        cache, judge, args, rows = make(max_drift, device)
        cache.ring_spread.zero_()
        for ring in judge.slots[1].rings:
            ring.spread = 0.0
        want = reference.decode(*args, **rows, reuse=judge)
        matched = mac_attn.match(cache, rows["q_match"], args[3], rows["slots"])
        assert matched.source.cpu().tolist() == want.source.tolist()
        assert bool((want.source >= 0).all()) == hits


def test_another_request_in_the_slot_knows_nothing_of_it(device):
    cache, _, (q, kv, table, lens), rows = make(3.0, device)
    mac_attn.decode(q, kv, table, lens, **rows, reuse=cache)
    assert (cache.ring_spread[1] > 0).all()
    mac_attn.decode(q, kv, table, lens - 50, **rows, reuse=cache)  # not where the slot ended
    assert (cache.ring_spread[1] == 0).all()


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_drift_that_is_none(value):
    with pytest.raises(ValueError, match="max_drift"):
        mac_attn.ReuseConfig(max_drift=value)
