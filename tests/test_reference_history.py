"""The reference's decisions and bookkeeping: who is a candidate, what a slot remembers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from cases import ReferenceChain, small_config

from mac_attn import reference
from mac_attn.reference import ReferenceReuse

# --- decisions ----------------------------------------------------------------------------------


def test_a_tie_goes_to_the_youngest():
    chain = ReferenceChain(small_config(), steps=60, jump=1.0)  # nothing resembles anything
    chain.run(0, 59)
    for head in range(2):
        entries = chain.reuse.entries(0, head)
        entries[40].query.copy_(entries[50].query)
    step = chain.step(59, q_match=chain.q_match[50])
    for head in step.heads[0]:
        assert head.candidates == [list(range(58, 26, -1))]
        assert head.scores[0][:, [58 - 40, 58 - 50]].tolist() == [[0.0] * 2] * 2
    assert step.source.tolist() == [[50] * 4]


@pytest.mark.parametrize(
    "window, entries, oldest", [(32, 100, 59 - 32), (32, 32, 59 - 32), (200, 20, 39), (7, 9, 52)]
)
def test_the_oldest_candidate_is_the_last_in_both_window_and_ring(window, entries, oldest):
    """Entries count how many, the window how far back in positions."""
    cfg = small_config(window=window, entries=entries)
    chain = ReferenceChain(cfg, steps=60, jump=1.0)
    chain.run(0, 59)
    step = chain.step(59, q_match=chain.q_match[oldest])
    assert step.source.tolist() == [[oldest] * 4]
    chain.reuse.truncate([0], [59])
    step = chain.step(59, q_match=chain.q_match[oldest - 1])
    assert step.source.tolist() == [[-1] * 4]


def test_a_step_that_could_not_be_reused_takes_no_place():
    """With a depth of 1 hits store nothing, so that the ring reaches further back."""
    cfg = small_config(max_reuse_depth=1, entries=6, window=100, threshold=0.5)
    chain = ReferenceChain(cfg, steps=100, jump=0.05)
    chain.run(0, 100)
    for head in range(2):
        entries = chain.reuse.entries(0, head)
        assert len(entries) == 6 and min(entries) < 100 - 12
        assert all(not e.depth.any() for e in entries.values())


@pytest.mark.parametrize("granularity", ["head", "group"])
@pytest.mark.parametrize("mode, zero", [("relative", 0.0), ("absolute", 1.0)])
def test_threshold_zero_never_hits(granularity, mode, zero):
    cfg = small_config(granularity=granularity, threshold_mode=mode, threshold=zero)
    chain = ReferenceChain(cfg, steps=40)
    chain.q_match[:] = chain.q_match[0].clone()  # distance 0 to everything
    assert all((step.source == -1).all() for step in chain.run(0, 40))
    chain.reuse.reset()
    chain.q_match.zero_()  # and a relative threshold of 0 / 0
    assert all((step.source == -1).all() for step in chain.run(0, 40))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("granularity, missing", [("head", [1]), ("group", [0, 1])])
@pytest.mark.parametrize("mode, threshold", [("relative", 0.16), ("absolute", 0.6)])
def test_non_finite_query_is_a_miss_and_is_never_matched(
    bad, granularity, missing, mode, threshold
):
    cfg = small_config(granularity=granularity, threshold_mode=mode, threshold=threshold)
    chain = ReferenceChain(cfg, steps=42)
    chain.q_match[:] = chain.q_match[0].clone()
    chain.run(0, 40)
    chain.q_match[40, 0, 1, 3] = bad
    source = chain.step(40).source[0]
    assert source.tolist() == [-1 if h in missing else 39 for h in range(4)]
    # The finite entry before it wins for the heads whose query was bad, the newest for the others.
    source = chain.step(41).source[0]
    assert source.tolist() == [39 if h in missing else 40 for h in range(4)]


def test_hit_reads_nothing_but_the_anchors_below_the_source():
    cfg = small_config(anchors=3, threshold=2.0)
    chain = ReferenceChain(cfg, steps=61, jump=0.0, revisit=0.0)
    chain.run(0, 60)
    twin = ReferenceReuse(chain.reuse.cfg, num_slots=2, num_qo_heads=4, num_kv_heads=2)
    twin.slots[0] = chain.reuse.slots[0]
    twin.fork([0], [1])
    want = chain.step(60)
    assert (want.source >= 0).all()
    for head in range(2):
        lowest = int(want.source[0, 2 * head]) + 1 - 16
        poisoned = torch.ones(lowest, dtype=torch.bool)
        source = twin.entries(1, head)[int(want.source[0, 2 * head])]
        poisoned[source.anchors] = False
        at = poisoned.nonzero().flatten()
        for pages in chain.kv.cache:
            pages[chain.kv.pages[0, at // 4], at % 4, head] = math.nan
    chain.reuse = twin
    assert torch.equal(chain.step(60, slots=[1]).out, want.out)


# --- history --------------------------------------------------------------------------------------


def test_gap_repeat_and_new_request_start_anew():
    chain = ReferenceChain(small_config(), steps=80, jump=0.0)
    for p, request, candidates in [
        (50, 7, 0),  # an empty slot
        (51, 7, 1),
        (52, 7, 2),
        (52, 7, 0),  # the same token again: the slot ended at 53, not at 52
        (53, 7, 1),
        (55, 7, 0),  # a skipped token
        (56, 7, 1),
        (57, 8, 0),  # another request that happens to have the right length
        (58, 8, 1),
        (59, -1, 0),  # no request ids
        (60, -1, 1),
    ]:
        step = chain.step(p, request_ids=None if request < 0 else [request])
        assert len(step.heads[0][0].candidates[0]) == candidates, (p, request)
        slot = chain.reuse.slots[0]
        assert (slot.end, slot.request) == (p + 1, request)
        assert list(chain.reuse.entries(0)) == list(range(p, p - candidates - 1, -1))


def test_first_positions_need_no_request_id_and_count_as_unbroken():
    chain = ReferenceChain(small_config(), steps=20)
    chain.run(0, 20)
    assert list(chain.reuse.entries(0)) == [19, 18, 17, 16]  # E(c) > 0 from position 16 on


def test_truncate_forgets_the_tail_and_goes_on():
    """What had been overwritten stays lost: places are given out in turn."""
    chain = ReferenceChain(small_config(), steps=100, batch=2)
    chain.run(0, 90)
    before = chain.reuse.entries(0)
    chain.reuse.truncate([0], [80])
    assert chain.reuse.slots[0].end == 80
    assert list(chain.reuse.entries(0)) == list(range(79, 57, -1))
    assert list(chain.reuse.entries(1)) == list(range(89, 57, -1))
    assert all(chain.reuse.entries(0)[c] is before[c] for c in range(58, 80))
    chain.batch = 1
    step = chain.step(80, q=chain.q[80, :1], q_match=chain.q_match[80, :1])
    assert step.heads[0][0].candidates[0] == list(range(79, 57, -1))
    assert list(chain.reuse.entries(0)) == list(range(80, 58, -1))  # 58 was the oldest
    chain.reuse.truncate([0], [1000])  # nothing to forget
    assert chain.reuse.slots[0].end == 81
    chain.reuse.truncate([0], [3])  # before everything the ring remembers
    assert (chain.reuse.slots[0].end, chain.reuse.entries(0)) == (3, {})
    assert len(chain.step(3, q=chain.q[3, :1], q_match=chain.q_match[3, :1]).heads[0]) == 2


def test_fork_copies_and_then_they_part():
    chain = ReferenceChain(small_config(anchors=3), steps=70)
    chain.run(0, 60, request_ids=[5])
    chain.reuse.fork([0], [1])
    left = chain.step(60, request_ids=[5])
    assert 60 not in chain.reuse.entries(1) and chain.reuse.slots[1].end == 60
    right = chain.step(60, request_ids=[5], slots=[1])
    assert torch.equal(left.out, right.out) and torch.equal(left.source, right.source)


def test_reset_empties_the_given_slots():
    chain = ReferenceChain(small_config(), steps=40, batch=2)
    chain.run(0, 40, request_ids=[1, 2])
    chain.reuse.reset([1])
    assert chain.reuse.slots[0].end == 40 and chain.reuse.slots[1] == chain.reuse.empty_slot()
    chain.reuse.reset()
    assert chain.reuse.slots == [chain.reuse.empty_slot()] * 3


def test_padding_row_touches_no_slot():
    chain = ReferenceChain(small_config(), steps=40, batch=2)
    chain.run(0, 40)
    before = chain.reuse.slots[1].copy()
    step = reference.decode(
        chain.q[39],
        chain.kv.cache,
        chain.kv.table([40, 0]),
        torch.tensor([40, 0]),
        reuse=chain.reuse,
        slots=torch.tensor([0, 10**6]),  # ignored
        q_match=chain.q_match[39],
    )
    assert (step.out[1] == 0).all() and (step.lse[1] == -torch.inf).all()
    assert step.source[1].tolist() == [-1] * 4
    assert step.heads[1] == [] and chain.reuse.slots[1].end == 40
    for ring, old in zip(chain.reuse.slots[1].rings, before.rings, strict=True):
        assert all(a is b for a, b in zip(ring.places, old.places, strict=True))


def test_arguments_that_make_no_sense():
    with pytest.raises(ValueError, match="num_qo_heads"):
        ReferenceReuse(small_config(), num_slots=1, num_qo_heads=5, num_kv_heads=2)
    for options in (dict(granularity="head"), dict(max_reuse_depth=2), dict(max_reuse_depth=None)):
        cfg = SimpleNamespace(**{**vars(small_config()), "anchors": 2, **options})
        with pytest.raises(ValueError, match="anchors"):
            ReferenceReuse(cfg, num_slots=1, num_qo_heads=4, num_kv_heads=2)
    chain = ReferenceChain(small_config(), steps=4)
    with pytest.raises(ValueError, match="q_match"):
        reference.decode(
            chain.q[3], chain.kv.cache, chain.kv.table([4]), torch.tensor([4]), reuse=chain.reuse
        )
