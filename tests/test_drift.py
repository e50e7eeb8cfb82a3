"""`max_drift`: heads whose logits would move far hit less, by how far the keys spread."""

from __future__ import annotations

import math

import pytest
import torch
from cases import make_kv, make_q, small_config

import mac_attn
from mac_attn import reference

HEADS, KV_HEADS, DIM, LENGTH, PAGES = 4, 2, 32, 600, 70


def make(max_drift: float | None, device: torch.device):
    """A seeded cache, its reference, and a step whose queries resemble those of the step before."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().to(device)

    cfg = small_config(anchors=16, entries=8, band=8, threshold=0.4, max_drift=max_drift)
    shape = dict(num_slots=2, num_qo_heads=HEADS, num_kv_heads=KV_HEADS)
    cache = mac_attn.ReuseCache(cfg, **shape, head_dim=DIM, dtype=torch.bfloat16, device=device)
    judge = reference.ReferenceReuse(cfg, **shape)
    q = normal(1, 4, HEADS, DIM)
    k, v = normal(PAGES, 16, KV_HEADS, DIM), normal(PAGES, 16, KV_HEADS, DIM)
    k[:, :, 1] *= 3  # the second KV head is sharper
    table = torch.randperm(PAGES, generator=generator)[None].int().to(device)
    lens, slots = (torch.tensor([x], dtype=torch.int32, device=device) for x in (LENGTH, 1))
    for reuse, seed in ((cache, mac_attn.seed), (judge, reference.seed)):
        seed(reuse, q, (k, v), table, lens, slots=slots, q_match=q)
    near = q[:, -1] + 0.5 * normal(1, HEADS, DIM)  # a quarter of its square
    step = (near, (k, v), table, lens + 1)
    return cache, judge, step, dict(slots=slots, q_match=near)


def check_spread(cache: mac_attn.ReuseCache, judge: reference.ReferenceReuse) -> list[float]:
    got = cache.ring_spread[1].cpu()
    want = torch.tensor([ring.spread for ring in judge.slots[1].rings])
    # Variances of 512 numbers near 1, in float32 where the reference has float64.
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=0)
    assert (cache.ring_spread[0] == 0).all()  # nobody's slot
    return got.tolist()


def test_seed_measures_the_spread_of_the_keys(device):
    cache, judge, (_, (k, _), table, lens), _ = make(3.0, device)
    got = check_spread(cache, judge)
    assert 8.5 < got[1] / got[0] < 9.5  # keys three times as large
    keys = k[table[0].long()].flatten(0, 1)[:LENGTH].float()
    logits = torch.randn(64, DIM, device=device) @ keys[:, 0].T * DIM**-0.5 / DIM**0.5
    assert got[0] == pytest.approx(float(logits.var(-1).mean()), rel=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("float8", ["", "per head"])
@pytest.mark.parametrize("head_dim", [32, 80, 512])
def test_a_slot_that_starts_measures_it(head_dim, float8, dtype, device):
    """And then whenever the request has grown to a power of two; never with fewer than 512 keys."""
    if dtype == torch.float32 and device.type == "cuda":
        pytest.skip("no float32 on CUDA")
    cfg = small_config(anchors=16, entries=8, band=8)
    options = dict(num_kv_heads=2, head_dim=head_dim, dtype=dtype, device=device)
    shape = dict(num_slots=2, num_qo_heads=6, num_kv_heads=2)
    kv = make_kv(3, batch=1, length=1100, float8=float8, **options)
    kv.k = (kv.k.float() + 4).to(kv.k.dtype)  # a mean does not count
    kv.write([0], [1100])
    cache = mac_attn.ReuseCache(cfg, **shape, head_dim=head_dim, dtype=dtype, device=device)
    judge = reference.ReferenceReuse(cfg, **shape)
    slots = torch.tensor([1], dtype=torch.int32, device=device)
    seen = [0.0]
    # Steps that go on where the last one ended, as far as one may; 900, 1020, 700 and 300 do not.
    lengths = (509, 510, 511, 512, 513, 900, 901, 1020, 1024, 1025, 700, 701, 300)
    for n in lengths:
        tokens = 4 if n == 1024 else 1
        q = make_q(n, 1, tokens, 6, head_dim, dtype=dtype, device=device)
        q = q if tokens > 1 else q[:, 0]
        lens = torch.tensor([n], dtype=torch.int32, device=device)
        call = (q, kv.cache, kv.table([n]), lens)
        rows = dict(slots=slots, q_match=q, **kv.scales)
        reference.decode(*call, **rows, reuse=judge)
        mac_attn.decode(*call, **rows, reuse=cache)
        seen.append(check_spread(cache, judge)[1])
    changed = [n for n, old, new in zip(lengths, seen, seen[1:], strict=False) if old != new]
    assert changed == [512, 900, 1020, 1024, 700, 300]
    assert seen[-1] == 0.0


def test_complete_alone_measures_it_where_it_has_the_keys(device):
    cache, judge, (q, kv, table, lens), rows = make(3.0, device)
    for given in (True, False):
        cache.reset()
        matched = mac_attn.match(cache, rows["q_match"], lens, rows["slots"])
        amended = mac_attn.amend(
            q, kv, table, lens, matched=matched, reuse=cache, slots=rows["slots"]
        )
        keys = dict(k_cache=kv[0], block_table=table) if given else {}
        mac_attn.complete(amended, lens, reuse=cache, matched=matched, q=q, **rows, **keys)
        if given:
            judge.slots[1] = judge.empty_slot()
            reference.decode(q, kv, table, lens, **rows, reuse=judge)
            check_spread(cache, judge)
    assert (cache.ring_spread == 0).all()
    call = (amended, lens)
    given = dict(reuse=cache, matched=matched, q=q, **rows)
    with pytest.raises(ValueError, match="sm_scale is nan, must be"):
        mac_attn.complete(*call, **given, k_cache=kv[0], block_table=table, sm_scale=math.nan)
    with pytest.raises(ValueError, match="block_table is None, must be given, as k_cache is"):
        mac_attn.complete(*call, **given, k_cache=kv[0])


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
    mac_attn.decode(q, kv, table, lens - 500, **rows, reuse=cache)  # not where the slot ended
    assert (cache.ring_spread[1] == 0).all()  # and too few keys


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_drift_that_is_none(value):
    with pytest.raises(ValueError, match="max_drift"):
        mac_attn.ReuseConfig(max_drift=value)
