"""Slots and logits that sampling should not meet: what is drawn and stored, what stays safe."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import make_kv, make_q, plain_dtype, random_walk, small_config
from compare import Twins
from poison import same_bits
from torch import Tensor

import mac_attn

HEADS, HEAD_DIM, BAND = (4, 2), 64, 16


class Case:
    """One request in slot 1 of a cache and of the reference: misses and a hit on command."""

    def __init__(self, device: torch.device, length: int = 130, **config: Any) -> None:
        cfg = small_config(**dict(anchors=6, entries=8, window=64, min_context=1) | config)
        options = dict(head_dim=HEAD_DIM, device=device)
        self.kv = make_kv(1, batch=1, length=length, num_kv_heads=HEADS[1], **options)
        self.kv.write([0], [length])
        self.q = make_q(2, length, 1, HEADS[0], HEAD_DIM, device=device)
        self.q_match = make_q(3, length, 1, HEADS[0], HEAD_DIM, device=device)
        self.twins = Twins(cfg, num_slots=2, heads=HEADS, **options)
        self.cache, self.rings = self.twins.cache, self.twins.reference.slots[1].rings
        self.device = device

    def decode(self, n: int, like: int | None = None) -> Any:
        """One step compared with the reference: a miss, or a hit on the entry of `like`."""
        matching = self.q_match[n - 1 if like is None else like]
        step = self.twins.decode(self.kv, [n], self.q[n - 1], matching, [1])
        self.rings = self.twins.reference.slots[1].rings
        assert (step.source >= 0).all() == (like is not None)
        return step

    def stored(self, step: Any) -> list[bool]:
        return [head.stored for head in step.heads[0]]

    def set_tau(self, tau: float) -> None:
        self.cache.ring_tau.fill_(tau)
        for ring in self.rings:
            ring.tau = tau

    def set_last_lse(self, lse: Tensor) -> None:
        """`[H, G]`"""
        self.cache.ring_last_lse.copy_(lse.to(self.device).expand_as(self.cache.ring_last_lse))
        for ring, one in zip(self.rings, lse.double(), strict=True):
            ring.last_lse = one


@pytest.mark.parametrize("tau", [math.nan, 0.0, -0.25, math.inf, -math.inf, 64.5, 3e38])
def test_a_tau_that_cannot_be_gone_by(tau, device):
    """The step draws nothing and stores nothing; the next ones go on from the first tau."""
    case = Case(device)
    case.decode(100)
    assert case.stored(case.decode(101)) == [True, True]
    case.set_tau(tau)
    assert case.stored(case.decode(102)) == [False, False]
    assert (case.cache.ring_tau[1] == 1 / 6).all()
    assert case.stored(case.decode(103)) == [True, True]
    case.decode(104, like=102)
    case.set_tau(tau)
    case.decode(105, like=102)  # a hit draws nothing, but repairs it too
    assert (case.cache.ring_tau[1] == 1 / 6).all()


def test_a_head_that_misses_for_long_draws_in_every_eighth_step(device):
    """Until it hits; whatever it draws then, the next misses draw too."""
    case = Case(device, length=200)
    drawn = []
    for missed in range(58):
        before = case.cache.ring_tau[1].clone()
        case.decode(100 + missed)
        assert (case.cache.ring_missed[1] == min(missed + 1, 32 + (missed - 31) % 8)).all()
        if not torch.equal(before, case.cache.ring_tau[1]):  # a sample that was drawn moves it
            drawn.append(missed)
    assert drawn == [*range(33), 40, 48, 56]  # the first step gives it a value
    case.decode(158, like=155)
    assert (case.cache.ring_missed[1] == 0).all()
    before = case.cache.ring_tau[1].clone()
    case.decode(159)
    assert (before != case.cache.ring_tau[1]).all()
    case.cache.reset(torch.tensor([1], dtype=torch.int32, device=device))
    assert (case.cache.ring_missed == 0).all()


@pytest.mark.parametrize("lse", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [(0, 1), (1, 0)])
def test_a_slot_without_a_last_log_sum_exp(lse, which, device):
    """Of one head is enough: its KV head draws nothing, the other does."""
    case = Case(device)
    case.decode(100)
    last = torch.stack([ring.last_lse for ring in case.rings])
    last[which] = lse
    case.set_last_lse(last)
    tau = case.cache.ring_tau[1].clone()
    step = case.decode(101)
    assert case.stored(step) == [which[0] == 1, which[0] == 0]
    assert case.cache.ring_tau[1, which[0]] == tau[which[0]]
    assert case.stored(case.decode(102)) == [True, True]  # that step left one


def test_the_first_step_of_a_history_stores_nothing(device):
    case = Case(device)
    assert case.stored(case.decode(100)) == [False, False]
    assert case.stored(case.decode(101)) == [True, True]
    assert case.stored(case.decode(103)) == [False, False]  # a gap
    assert case.stored(case.decode(104)) == [True, True]


def test_a_list_that_overflows_is_not_stored_and_tau_rises(device):
    """More candidates than there is room for: four steps later they fit again."""
    case = Case(device, length=400)
    case.decode(300)
    case.set_tau(1e-5)
    seen = []
    for n in range(301, 310):
        seen.append(case.stored(case.decode(n)))
    assert seen[0] == [False, False] and seen[-1] == [True, True], seen
    case.decode(310, like=308)


@pytest.mark.parametrize("rising", [1 / 6, 1e-3])
def test_tau_settles_at_one_and_a_half_times_the_anchors(rising, device):
    case = Case(device, length=400, entries=4, window=8)
    case.decode(300)
    case.set_tau(rising)
    counts = []
    for n in range(301, 340):
        before = case.cache.ring_tau[1].clone()
        case.decode(n)
        counts.append(9 * case.cache.ring_tau[1] / before)  # next = tau * count / 1.5 S
    assert 6 < torch.stack(counts[10:]).mean() < 13


def test_all_old_tokens_of_equal_weight(device):
    """Every key is one key, so that chance alone decides; the hit is right for any sample."""
    case = Case(device)
    for pages in case.kv.cache[:1]:
        pages[:] = pages[case.kv.pages[0, 0], 0].clone()
    for n in range(100, 104):
        step = case.decode(n)
    assert case.stored(step) == [True, True]
    entry = case.twins.reference.entries(1, 0)[102]
    assert (entry.weights > 5).all() and entry.weights.std() < 1e-3 * entry.weights.mean()
    case.decode(104, like=102)


def test_one_token_with_all_the_weight(device):
    """It is kept for certain and stands for itself; without it next to nothing is left."""
    case = Case(device)
    k, _ = case.kv.cache
    page, at = case.kv.pages[0, 37 // 16], 37 % 16
    for h in range(HEADS[1]):
        k[page, at, h] = (
            case.q[100:104, 0, 2 * h : 2 * h + 2].double().mean((0, 1)).to(k.dtype) * 40
        )
    case.q[100:106] = case.q[100:104].double().mean(0).to(k.dtype)
    for n in range(101, 104):
        step = case.decode(n)
    for head in range(HEADS[1]):
        entries = case.twins.reference.entries(1, head)
        assert all(37 in e.anchors.tolist() for e in entries.values()) and entries
        kept = entries[102]
        assert kept.weights[kept.anchors.tolist().index(37)] == 0
    step = case.decode(104, like=102)
    for head in step.heads[0]:
        (rest,) = head.rest  # of the one token
        assert (rest < 0.01).all()


@pytest.mark.parametrize("anchors", [200, 1000])
def test_more_anchors_than_the_context_has_tokens(anchors, device):
    """A sample is a sixth of the old tokens at most, and a hit reads at most half of all."""
    case = Case(device, anchors=anchors, window=100, entries=40)
    case.decode(70)
    for n in range(71, 96):
        case.decode(n)
    for head in range(HEADS[1]):
        entries = case.twins.reference.entries(1, head)
        sizes = {c: len(e.anchors) for c, e in entries.items()}
        assert all(size <= (c + 1 - BAND) // 6 for c, size in sizes.items())
        assert max(sizes.values()) > 5, sizes
    newest = [next(iter(case.twins.reference.entries(1, head))) for head in range(HEADS[1])]
    step = case.decode(96, like=min(newest))
    for head in step.heads[0]:
        assert head.tokens <= 96 // 2


def test_a_hit_that_would_read_more_than_half_is_a_miss(device):
    case = Case(device, window=100, entries=100)
    for n in range(60, 100):
        case.decode(n)
    # At n = 100: age + 16 + 6 <= 50.
    case.q_match[99] = case.q_match[99 - 29].clone()
    assert (case.twins.decode(case.kv, [100], case.q[99], case.q_match[99], [1]).source == -1).all()
    case = Case(device, window=100, entries=100)
    for n in range(60, 100):
        case.decode(n)
    case.decode(100, like=99 - 28)


def bad_keys(case: Case, tokens: list[int], value: float) -> None:
    """Keys of KV head 0 whose logit is NaN or -inf for every query of its group."""
    k, _ = case.kv.cache
    for i in tokens:
        k[case.kv.pages[0, i // 16], i % 16, 0, 5] = value
    case.q[:, :, :2, 5] = case.q[:, :, :2, 5].abs() + 0.25


def test_logits_of_minus_infinity_are_not_drawn(device):
    case = Case(device)
    tokens = [0, 3, 40, 41, 84]
    bad_keys(case, tokens, -math.inf)
    for n in range(100, 104):
        step = case.decode(n)
    assert case.stored(step) == [True, True]
    entry = case.twins.reference.entries(1, 0)[103 - 1]
    assert not set(entry.anchors.tolist()) & set(tokens)
    case.decode(104, like=102)


def test_only_logits_of_minus_infinity(device):
    """No old token weighs anything: an entry without anchors, whose state is empty."""
    case = Case(device)
    case.decode(100)
    bad_keys(case, list(range(101 - BAND)), -math.inf)
    step = case.decode(101)
    assert case.stored(step) == [True, True]
    entry = case.twins.reference.entries(1, 0)[100]
    assert len(entry.anchors) == 0 and (entry.lse == -math.inf).all()
    case.decode(102, like=100)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_no_number_shows_and_is_gone_with_it(bad, device):
    """The step answers NaN in that KV head and leaves no log-sum-exp, so that the next draws
    nothing; the other KV head does not notice."""
    case = Case(device)
    for n in (100, 101):
        case.decode(n)
    bad_keys(case, [20], bad)
    ints = [torch.tensor([x], dtype=torch.int32, device=device) for x in (102, 1)]
    table = case.kv.table([102])
    call = (case.q[101], case.kv.cache, table, ints[0])
    out = mac_attn.decode(*call, reuse=case.cache, slots=ints[1], q_match=case.q_match[101])
    assert out[0, :2].isnan().all() and out[0, 2:].isfinite().all()
    assert not case.cache.ring_last_lse[1, 0].isfinite().any()
    place = [int(case.cache.ring_stored[1, h]) for h in range(2)]
    good = make_kv(1, batch=1, length=130, num_kv_heads=2, head_dim=HEAD_DIM, device=device)
    case.kv.k[0, 20] = good.k[0, 20]
    case.kv.write([20], [21])
    args = (case.q[102], case.kv.cache, table, ints[0] + 1)
    out = mac_attn.decode(*args, reuse=case.cache, slots=ints[1], q_match=case.q_match[102])
    assert out.isfinite().all()
    assert [int(case.cache.ring_stored[1, h]) for h in range(2)] == [place[0], place[1] + 1]
    exact = mac_attn.decode(*args)
    case.twins.out.check(out, exact, "out")


def test_the_same_calls_leave_the_same_bytes(device):
    """Bit for bit, from run to run: outputs and slots, of several requests that miss and hit."""
    options = dict(dtype=plain_dtype(device), device=device)
    lengths = [900, 333, 620]
    kv = make_kv(1, batch=3, length=1000, num_kv_heads=2, head_dim=HEAD_DIM, **options)
    kv.write([0] * 3, [1000] * 3)
    steps = 30
    q = make_q(2, steps, 3, HEADS[0], HEAD_DIM, **options)
    q_match = random_walk(3, steps, 3, 2, 2, HEAD_DIM, **options)

    def run() -> list[Tensor]:
        cache = mac_attn.ReuseCache(
            small_config(anchors=24, entries=8), num_slots=3, num_qo_heads=HEADS[0],
            num_kv_heads=HEADS[1], head_dim=HEAD_DIM, **options,
        )  # fmt: skip
        slots, outs = torch.tensor([2, 0, 1], dtype=torch.int32, device=device), []
        for t in range(steps):
            n = [length + t for length in lengths]
            call = (q[t], kv.cache, kv.table(n), torch.tensor(n, dtype=torch.int32, device=device))
            outs += mac_attn.decode(
                *call, reuse=cache, slots=slots, q_match=q_match[t], return_lse=True
            )
        assert 0.1 < cache.stats().hit_rate < 0.9
        return [cache.ring, *outs]

    first = run()
    for again in (run(), run()):
        assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))
