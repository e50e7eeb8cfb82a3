"""Steps of several query tokens, of which each looks for itself: what decides about a hit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import make_kv, make_q, small_config
from compare import Twins

import mac_attn


def int32(values: list[int], device: Any = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


class Case:
    """One request of 240 tokens, whose entries are of queries that have nothing in common.

    With so many, three tokens that hit with anchors read no more than half of what a miss does.
    """

    def __init__(self, device: Any, tokens: int, **options: Any) -> None:
        self.device, self.tokens, self.n = device, tokens, 240
        cfg = small_config(**options)
        self.twins = Twins(cfg, num_slots=2, heads=(4, 2), head_dim=64, device=device)
        self.kv = make_kv(6, batch=1, length=280, num_kv_heads=2, head_dim=64, device=device)
        self.kv.write([0], [280])
        self.q = make_q(7, 280, 4, 64, device=device)
        self.entries = make_q(8, 280, 4, 64, device=device)
        steps = 32 if cfg.anchors else 40  # misses, which all draw a sample
        for p in range(self.n - steps, self.n):
            self.twins.decode(self.kv, [p + 1], self.q[None, p], self.entries[None, p], [1])

    def step(self, q_match: torch.Tensor, query_len: int | None = None, **options: Any) -> Any:
        """A step of the next tokens with these queries `[T, Hq, D]`."""
        given = self.tokens if query_len is None else query_len
        q = self.q[None, self.n : self.n + self.tokens]
        return self.twins.decode(
            self.kv, [self.n + given], q, q_match[None], [1], query_lens=[given], **options
        )

    def of(self, *positions: int) -> torch.Tensor:
        """The queries of these entries, one for each token."""
        return self.entries[list(positions)].clone()


@pytest.mark.parametrize("options", [{}, {"anchors": 6}, {"granularity": "head"}], ids=str)
def test_one_token_that_misses_makes_its_heads_miss(options, device):
    """And no other: those of its KV head or, where heads decide alone, its head."""
    case = Case(device, 3, **options)
    where = [230, 226, 235]
    queries = case.of(*where)
    queries[1, 2] = case.entries[260, 2]  # of one head, in the second KV head, like no entry
    step = case.step(queries)
    missing = [2] if "granularity" in options else [2, 3]
    want = torch.tensor(where)[:, None].expand(3, 4).clone()
    want[:, missing] = -1
    assert step.source[0].tolist() == want.tolist()
    stats = case.twins.cache.stats()
    assert stats.query_head_hits == 3 * (4 - len(missing)) and stats.kv_head_hits == 3
    # A token that is not there has no say.
    case = Case(device, 3, **options)
    step = case.step(queries, query_len=1)
    assert step.source[0].tolist() == [[230] * 4, [-1] * 4, [-1] * 4]


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("anchors", [0, 6])
def test_exact_reuses_nothing_and_learns(tokens, anchors, device):
    case = Case(device, tokens, anchors=anchors)
    at = [230, 226, 235][:tokens]
    step = case.step(case.of(*at), exact=True)
    assert (step.source == -1).all()
    cache = case.twins.cache
    assert (cache.ring_position[1] == case.n).any(-1).all()
    lens = int32([case.n + tokens], device)
    q = case.q[None, case.n : case.n + tokens]
    plain = mac_attn.decode(q, case.kv.cache, case.kv.table(lens.tolist()), lens)
    case.twins.out.check(plain, step.out, "out")
    case.n += 1
    step = case.step(case.of(*at))  # the first now resembles what has been learnt
    assert step.source[0].tolist() == [[p] * 4 for p in (case.n - 1, *at[1:])]


def test_a_token_goes_by_its_own_threshold(device):
    """0.16 of its own squared length, whatever that of the first is."""
    for factor, hits in ((1.5, True), (0.75, True), (1.7, False), (0.7, False)):
        case = Case(device, 2)
        queries = case.of(230, 230)
        queries[1] *= factor
        step = case.step(queries)
        assert (step.source >= 0).all() == (step.source >= 0).any() == hits, factor


def test_a_token_goes_by_its_own_position(device):
    """How far back it may reach, and how much context it needs."""
    queries = Case(device, 2).entries
    for back, hits in (((10, 19), True), ((10, 20), False), ((20, 10), True), ((21, 10), False)):
        step = Case(device, 2, window=20).step(queries[[240 - x for x in back]])
        assert (step.source >= 0).all() == (step.source >= 0).any() == hits, back
    for least, hits in ((241, True), (242, False)):
        step = Case(device, 2, min_context=least).step(queries[[230, 230]])
        assert (step.source >= 0).all() == (step.source >= 0).any() == hits


def test_hits_of_all_tokens_read_at_most_half_of_what_a_miss_reads(device):
    """Band, age and sample: of three tokens each a sixth of the context, of two a fourth."""
    for query_len, age, hits in ((3, 18, True), (3, 20, False), (2, 20, True), (2, 31, True)):
        case = Case(device, 3, anchors=6)
        before = case.twins.cache.stats().kv_tokens_read
        step = case.step(case.of(240 - age, 235, 235), query_len=query_len)
        there = step.source[0, :query_len] >= 0
        assert there.all() == there.any() == hits, (query_len, age)
        read = case.twins.cache.stats().kv_tokens_read - before
        miss = 2 * (240 + query_len)  # of both KV heads
        assert read <= miss / 2 if hits else read == miss


@pytest.mark.parametrize("anchors", [0, 6])
def test_rejected_tokens_are_never_reused(anchors, device):
    case = Case(device, 4, anchors=anchors)
    queries = make_q(9, 4, 4, 64, device=device)
    case.step(queries)
    for i in range(4):  # the step after, which may begin at any of them, with the query of one
        lens = int32([case.n + 1 + i], device)
        for token in range(4):
            query = queries[None, token]
            matched = mac_attn.match(case.twins.cache, query, lens + 1, int32([1], device))
            assert (matched.source == (case.n if token == 0 else -1)).all(), (i, token)


READS = {
    "entries": 64,
    "window": 40,
    "min_context": 24,
}  # E(c) of 230, 201 and 235 are 215, 186 and 220


@pytest.mark.parametrize(("page", "read"), [(10, False), (11, True)])
def test_pages_of_each_token_are_checked(page, read):
    """Those that the second reads; below, where only a miss would, there may be anything."""
    case = Case(torch.device("cpu"), 3, **READS)
    queries = case.of(230, 201, 235)
    call = [case.q[None, 240:243], case.kv.cache, case.kv.table([243]), int32([243])]
    case.kv.table = lambda lengths: call[2]
    call[2][0, page] = -5
    if not read:
        assert (case.step(queries).source >= 0).all()
        return
    before, out = case.twins.cache.ring.clone(), torch.full((1, 3, 4, 64), 7.0)
    rows = {"reuse": case.twins.cache, "slots": int32([1]), "q_match": queries[None]}
    with pytest.raises(ValueError, match=rf"block_table\[0, {page}\] is -5, must be"):
        mac_attn.decode(*call, out=out, **rows)
    assert (out == 7).all() and torch.equal(case.twins.cache.ring, before)


def test_anchors_of_each_token_are_checked():
    case = Case(torch.device("cpu"), 3, anchors=6)
    cache = case.twins.cache
    place = int((cache.ring_position[1, 1] == 226).nonzero())
    cache.ring_anchors[1, 1, place, 0] = 211  # E(226)
    before = cache.ring.clone()
    with pytest.raises(
        ValueError, match="ring_anchors of slot 1, position 226 hold 211, must be fr"
    ):
        case.step(case.of(230, 226, 235))
    assert torch.equal(cache.ring, before)


def test_heads_that_hit_with_some_tokens_are_refused():
    """By amend and complete, which check what they are given: it may come from anywhere."""
    case = Case(torch.device("cpu"), 3)
    q, q_match = case.q[None, 240:243], case.of(230, 226, 235)[None]
    lens, slots, some = int32([242]), int32([1]), {"query_lens": int32([2])}
    rows = {"reuse": case.twins.cache, "slots": slots}
    good = mac_attn.match(case.twins.cache, q_match, lens, slots, **some)
    assert good.source[0].tolist() == 2 * [230, 230, 226, 226, -1, -1]
    call = (q, case.kv.cache, case.kv.table([242]), lens)
    amended = mac_attn.amend(*call, matched=good, **rows, **some)
    for where, value, message in (
        (8, -1, r"source\[0, 8\] is -1, must not be -1, as a head hits with all tokens or none"),
        (4, 75, r"source\[0, 4\] is 75, must be -1, as of another token or one that is not there"),
    ):
        source = good.source.clone()
        source[0, where] = value
        bad = good._replace(source=source)
        with pytest.raises(ValueError, match=message):
            mac_attn.amend(*call, matched=bad, **rows, **some)
        with pytest.raises(ValueError, match=message):
            mac_attn.complete(amended, lens, matched=bad, q=q, q_match=q_match, **rows, **some)
