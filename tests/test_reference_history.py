"""The reference's decisions and bookkeeping: who is a candidate, what a slot remembers."""

from __future__ import annotations

import math

import pytest
import torch
from cases import ReferenceChain, close, small_config

from mac_attn import reference
from mac_attn.reference import ReferenceReuse

# --- decisions ----------------------------------------------------------------------------------


def test_anchors_are_the_heaviest_tokens_over_the_group():
    chain = ReferenceChain(small_config(anchors=4, threshold=0.0), steps=60)
    for p in range(60):
        chain.step(p)
        old = max(0, p + 1 - 16)
        for head, got in enumerate(chain.reuse.entries(0)[p].anchors):
            k = chain.kv.k[0, : p + 1, head].double()
            q = chain.q[p, 0, 2 * head : 2 * head + 2].double()
            weight = (q @ k.T / 4.0).softmax(-1).amax(0).tolist()
            want = sorted(range(old), key=lambda i: -weight[i])[:4]
            assert sorted(got.tolist()) == sorted(want)


def test_forced_anchors_replace_the_choice_and_leave_the_answer_of_a_miss_exact():
    cfg = small_config(anchors=4, threshold=0.0)
    chain = ReferenceChain(cfg, steps=40)
    chain.run(0, 39)
    forced = torch.tensor([[[3, 11, -1, -1], [23, 0, 7, 1]]])
    exact = reference.decode(chain.q[39], chain.kv.cache, chain.kv.table([40]), torch.tensor([40]))
    step = chain.step(39, anchors=forced)
    close(step.out, exact.out)
    assert [a.tolist() for a in chain.reuse.entries(0)[39].anchors] == [[3, 11], [23, 0, 7, 1]]
    for bad in ([24, 0, 1, 2], [5, 5, -1, -1]):  # 24 = E(39); 5 twice
        chain.reuse.truncate([0], [39])
        with pytest.raises(ValueError, match="anchors"):
            chain.step(39, anchors=torch.tensor([[bad, bad]]))


def test_a_tie_goes_to_the_newest():
    chain = ReferenceChain(small_config(), steps=60, jump=1.0)  # nothing resembles anything
    chain.run(0, 59)
    chain.reuse.slots[0].ring[40 % 32].query.copy_(chain.q_match[50, 0])
    again = chain.q_match[50]
    step = chain.step(59, q_match=again)
    assert step.candidates[0] == list(range(27, 59))
    assert step.scores[0][:, 40 - 27].tolist() == step.scores[0][:, 50 - 27].tolist() == [0.0] * 4
    assert step.source.tolist() == [[50] * 4]


def test_window_edge_is_a_candidate_and_the_one_before_is_not():
    chain = ReferenceChain(small_config(), steps=60, jump=1.0)
    chain.run(0, 59)
    near, far = chain.q_match[59 - 32], chain.q_match[59 - 33]
    assert chain.step(59, q_match=near).source.tolist() == [[59 - 32] * 4]
    chain.reuse.truncate([0], [59])
    assert chain.step(59, q_match=far).source.tolist() == [[-1] * 4]


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
    chain = ReferenceChain(small_config(anchors=3), steps=61, jump=0.0, revisit=0.0)
    chain.run(0, 60)
    source = chain.reuse.entries(0)[59]
    twin = ReferenceReuse(chain.reuse.cfg, num_slots=2, num_qo_heads=4, num_kv_heads=2)
    twin.slots[0] = chain.reuse.slots[0]
    twin.fork([0], [1])
    want = chain.step(60)
    assert (want.source >= 0).all()
    for head in range(2):
        lowest = int(want.source[0, 2 * head]) + 1 - 16
        poisoned = torch.ones(lowest, dtype=torch.bool)
        poisoned[chain.reuse.entries(0)[60].anchors[head]] = False
        at = poisoned.nonzero().flatten()
        for pages in chain.kv.cache:
            pages[chain.kv.pages[0, at // 4], at % 4, head] = math.nan
    assert source.position == 59
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
        assert len(step.candidates[0]) == candidates, (p, request)
        slot = chain.reuse.slots[0]
        assert (slot.begin, slot.end, slot.request) == (p - candidates, p + 1, request)
        assert list(chain.reuse.entries(0)) == list(range(p - candidates, p + 1))


def test_first_positions_need_no_request_id_and_count_as_unbroken():
    chain = ReferenceChain(small_config(), steps=20)
    chain.run(0, 20)
    assert chain.reuse.slots[0].begin == 0
    # E(c) > 0 from position 16 on.
    assert chain.step(19, q_match=chain.q_match[0]).candidates == [[]]


def test_truncate_forgets_the_tail_and_goes_on():
    chain = ReferenceChain(small_config(), steps=100, batch=2)
    chain.run(0, 90)
    before = chain.reuse.entries(0)
    chain.reuse.truncate([0], [80])
    slot = chain.reuse.slots[0]
    assert (slot.begin, slot.end) == (0, 80)
    assert list(chain.reuse.entries(0)) == list(range(90 - 32, 80))
    assert list(chain.reuse.entries(1)) == list(range(90 - 32, 90))
    assert all(chain.reuse.entries(0)[c] is before[c] for c in range(58, 80))
    alone = chain.reuse
    chain.batch = 1
    step = chain.step(80, q=chain.q[80, :1], q_match=chain.q_match[80, :1])
    assert step.candidates[0] == list(range(58, 80))
    alone.truncate([0], [1000])  # nothing to forget
    assert alone.slots[0].end == 81
    alone.truncate([0], [3])  # before everything the ring remembers
    assert (alone.slots[0].begin, alone.slots[0].end, alone.entries(0)) == (0, 3, {})


def test_truncate_below_begin_leaves_an_empty_slot():
    chain = ReferenceChain(small_config(), steps=60, jump=0.0)
    chain.run(50, 60)
    chain.reuse.truncate([0], [40])
    slot = chain.reuse.slots[0]
    assert (slot.begin, slot.end, chain.reuse.entries(0)) == (40, 40, {})
    assert chain.step(40).candidates == [[]]
    assert len(chain.step(41).candidates[0]) == 1


def test_fork_copies_and_then_they_part():
    chain = ReferenceChain(small_config(anchors=3), steps=70)
    chain.run(0, 60, request_ids=[5])
    chain.reuse.fork([0], [1])
    mother, child = chain.reuse.slots
    assert child is not mother and child == mother
    left = chain.step(60, request_ids=[5])
    assert list(chain.reuse.entries(1)) == list(range(28, 60))
    right = chain.step(60, request_ids=[5], slots=[1])
    assert torch.equal(left.out, right.out) and torch.equal(left.source, right.source)


def test_reset_empties_the_given_slots():
    chain = ReferenceChain(small_config(), steps=40, batch=2)
    chain.run(0, 40, request_ids=[1, 2])
    chain.reuse.reset([1])
    assert chain.reuse.slots[0].end == 40 and chain.reuse.slots[1] == reference.Slot()
    chain.reuse.reset()
    assert chain.reuse.slots == [reference.Slot()] * 3


def test_padding_row_touches_no_slot():
    chain = ReferenceChain(small_config(), steps=40, batch=2)
    chain.run(0, 40)
    before = chain.reuse.slots[1].ring.copy()
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
    assert chain.reuse.slots[1].ring == before and chain.reuse.slots[1].end == 40


def test_arguments_that_make_no_sense():
    with pytest.raises(ValueError, match="num_qo_heads"):
        ReferenceReuse(small_config(), num_slots=1, num_qo_heads=5, num_kv_heads=2)
    chain = ReferenceChain(small_config(), steps=4)
    with pytest.raises(ValueError, match="q_match"):
        reference.decode(
            chain.q[3], chain.kv.cache, chain.kv.table([4]), torch.tensor([4]), reuse=chain.reuse
        )
