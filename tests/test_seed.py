"""Seeding after prefill, against attention written out in float64 and against the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import make_kv, make_q
from compare import Twins, check_ring
from torch import Tensor

from mac_attn import ReuseConfig, RotaryEmbedding, rotate, seed

HEADS, HEAD_DIM = (6, 2), 64
GROUP = HEADS[0] // HEADS[1]


class Case:
    """Prompts of several requests with their caches, and the state that an entry should hold."""

    def __init__(
        self,
        lens: list[int],
        length: int,
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
        page_size: int = 16,
        head_dim: int = HEAD_DIM,
        head_dim_v: int | None = None,
        rotary: RotaryEmbedding | None = None,
        kv: dict[str, Any] | None = None,
        **config: Any,
    ) -> None:
        self.lens, self.length, self.device, self.head_dim = lens, length, device, head_dim
        options = dict(entries=32, window=60, band=16, anchors=4, min_context=1)
        self.cfg = ReuseConfig(**options | config)
        made = dict(dtype=dtype, device=device)
        batch = len(lens)
        self.kv = make_kv(
            3, batch=batch, length=max(lens), num_kv_heads=HEADS[1], head_dim=head_dim,
            page_size=page_size, head_dim_v=head_dim_v, **made, **kv or {},
        )  # fmt: skip
        self.kv.write([0] * batch, lens)
        self.q = make_q(4, batch, length, HEADS[0], head_dim, **made)
        # Twice as large, so that some tokens stand out; its own values, to tell apart.
        self.q = self.q * 2
        self.q_match = make_q(5, batch, length, HEADS[0], head_dim, **made)
        self.twins = Twins(
            self.cfg, num_slots=batch + 1, heads=HEADS, head_dim=head_dim, rotary=rotary, layer=5,
            head_dim_v=head_dim_v, **made,
        )  # fmt: skip
        self.cache = self.twins.cache

    def ints(self, values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def arguments(self, **changes: Any) -> dict[str, Any]:
        return dict(
            reuse=self.cache,
            q=self.q,
            kv_cache=self.kv.cache,
            block_table=self.kv.table(self.lens),
            seq_lens=self.ints(self.lens),
            slots=self.ints(list(range(len(self.lens), 0, -1))),
            q_match=self.q_match,
            kv_layout=self.kv.layout,
        ) | dict(changes)

    def seed(self, **changes: Any) -> None:
        """Seed the cache alone."""
        seed(**self.arguments(**changes))

    def seed_both(self, **changes: Any) -> None:
        """Seed the cache and the reference, and compare all slots."""
        given = self.arguments(**changes)
        call = [given.pop(name) for name in ("reuse", "q", "kv_cache", "block_table", "seq_lens")]
        self.twins.seed(*call[1:], **given)
        for slot in range(self.cache.num_slots):
            check_ring(self.cache, self.twins.reference, slot, self.twins.state)

    def slot(self, b: int) -> int:
        return len(self.lens) - b

    def check(self, sm_scale: float | None = None, cap: float = 0.0) -> None:
        """The states of every request's entries, written out; which positions have one."""
        sm_scale = sm_scale or self.head_dim**-0.5
        every = -(-self.length // self.cfg.entries)
        for b, n in enumerate(self.lens):
            slot = self.slot(b)
            positions = [c for c in range(n - 1, n - self.length - 1, -every) if c >= self.cfg.band]
            for kv_head in range(HEADS[1]):
                ring = self.twins.reference.entries(slot, kv_head)
                assert set(ring) <= set(positions)
                if not self.cfg.anchors:
                    assert list(ring) == positions
                for c, entry in ring.items():
                    old = c + 1 - self.cfg.band
                    k, v = (x[b, :old, kv_head].cpu().double() for x in (self.kv.k, self.kv.v))
                    heads = slice(kv_head * GROUP, (kv_head + 1) * GROUP)
                    logits = sm_scale * self.q[b, c - n, heads].cpu().double() @ k.T
                    logits = cap * torch.tanh(logits / cap) if cap else logits
                    torch.testing.assert_close(entry.lse, logits.logsumexp(-1))
                    torch.testing.assert_close(entry.out, logits.softmax(-1) @ v)
                    assert torch.equal(entry.query, self.q_match[b, c - n, heads].cpu().double())


CASES: dict[str, dict[str, Any]] = {
    "full ring": dict(lens=[90, 61], length=32),
    "no anchors": dict(lens=[90, 61], length=32, anchors=0),
    "chains of reuse": dict(lens=[90], length=20, anchors=0, max_reuse_depth=None),
    "per head": dict(lens=[90], length=20, anchors=0, granularity="head"),
    "short": dict(lens=[90, 61], length=5),
    "one query": dict(lens=[40], length=1),
    "every second": dict(lens=[90, 61], length=33),
    "every fifth, no anchors": dict(lens=[90, 61], length=58, entries=12, anchors=0),
    "one entry": dict(lens=[90, 61], length=20, entries=1),
    "more anchors than tokens": dict(lens=[30, 21], length=9, anchors=60),
    "nothing is old": dict(lens=[16, 9], length=9),
    "little is old": dict(lens=[20], length=12),
    "band of one": dict(lens=[33], length=20, band=1),
    "strided HND pages of one": dict(
        lens=[50, 40], length=12, page_size=1, kv=dict(layout="HND", strided=True)
    ),
    "combined": dict(lens=[50, 40], length=12, kv=dict(combined=True)),
    "bfloat16": dict(lens=[50, 40], length=12, dtype=torch.bfloat16),
    "float16": dict(lens=[50, 40], length=12, dtype=torch.float16),
    "heads of 512": dict(lens=[90, 61], length=12, head_dim=512),
    "a long context": dict(lens=[2600], length=3, page_size=128, anchors=64),
}


@pytest.mark.parametrize("name", CASES)
def test_entries(name, device):
    case = Case(**CASES[name], device=device)
    case.seed_both()
    case.check()
    assert not case.cache.counters.any()


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_scale_and_soft_cap(cap, device):
    case = Case([70], 8, device)
    case.seed_both(sm_scale=0.25, logits_soft_cap=cap)
    case.check(0.25, cap)


def test_query_from_the_rotary_embedding(device):
    rotary = RotaryEmbedding(1e4 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    case = Case([90, 61], 12, device, rotary=rotary, anchors=0)
    positions = case.ints(case.lens)[:, None] - 12 + torch.arange(12, device=device)
    case.q = rotate(case.q_match, positions, rotary.to(device))
    case.seed(q_match=None)
    for b in range(2):
        got = case.cache.ring_query[case.slot(b), :, :12].transpose(0, 1).flatten(1, 2)
        # Forth and back are two roundings of numbers up to 4 sigma.
        rounding = 4 * torch.finfo(got.dtype).eps
        torch.testing.assert_close(got, case.q_match[b], rtol=0, atol=max(2e-6, 2 * rounding))


def test_padding_row_leaves_its_slot_alone(device):
    case = Case([50, 40], 12, device)
    before = case.cache.ring.clone()
    # The slot and the id of a padding row are ignored, whatever they are.
    ids = case.ints([-5, 3], torch.int64)
    case.seed(seq_lens=case.ints([0, 40]), slots=case.ints([99, 1]), request_ids=ids)
    assert case.cache.slot_end.tolist() == [0, 40, 0]
    assert case.cache.slot_request.tolist() == [-1, 3, -1]
    assert torch.equal(case.cache.ring[[0, 2]], before[[0, 2]])
    before = case.cache.ring.clone()
    case.seed(seq_lens=case.ints([0, 0]))
    assert torch.equal(case.cache.ring, before)


@pytest.mark.parametrize("anchors", [0, 4])
@pytest.mark.parametrize("skip, request_id, stays", [(0, 7, True), (0, 8, False), (1, 7, False)])
def test_history(skip, request_id, stays, anchors, device):
    """Older entries stay if the slot ended where the new ones begin, in the same request."""
    case = Case([60], 19, device, anchors=anchors)
    ids = case.ints([7], torch.int64)
    older = dict(q=case.q[:, :9], q_match=case.q_match[:, :9])
    case.seed_both(seq_lens=case.ints([50 - skip]), request_ids=ids, **older)
    newer = dict(q=case.q[:, 9:], q_match=case.q_match[:, 9:])
    case.seed_both(request_ids=case.ints([request_id], torch.int64), **newer)
    assert (case.cache.slot_end[1], case.cache.slot_request[1]) == (60, request_id)
    for head in range(2):
        oldest = min(case.twins.reference.entries(1, head))
        assert (oldest < 50) == stays


def test_seeding_again_over_what_the_ring_held(device):
    """Places of an older history, and tags that are the same."""
    case = Case([90, 61], 20, device)
    for length in (20, 11, 20):
        case.seed_both(
            q=case.q[:, :length],
            q_match=case.q_match[:, :length],
            request_ids=case.ints([4, 9], torch.int64),
        )


def bad(**changes: Any) -> Any:
    """A change of the arguments of a case with lens [50, 40] and length 12."""
    return lambda case: {
        name: value(case) if callable(value) else value for name, value in changes.items()
    }


# Values that only the CPU looks at before it writes.
BAD_VALUES = {
    "seq_lens[1] is 11, must be 0 or at least 12": bad(seq_lens=lambda c: c.ints([50, 11])),
    "seq_lens[0] is -1": bad(seq_lens=lambda c: c.ints([-1, 40])),
    "seq_lens[0] is 65, must be at most 64": bad(seq_lens=lambda c: c.ints([65, 40])),
    "slots[1] is 3, must be from 0 to 2": bad(slots=lambda c: c.ints([1, 3])),
    "slots[0] is -1": bad(slots=lambda c: c.ints([-1, 1])),
    "slots[1] is 2, which slots[0] has too": bad(slots=lambda c: c.ints([2, 2])),
    "request_ids[1] is -1": bad(request_ids=lambda c: c.ints([1, -1], torch.int64)),
    "block_table[1, 2] is 99, must be from 0 to": bad(
        block_table=lambda c: c.kv.table(c.lens).index_put_(
            (torch.tensor(1), torch.tensor(2)), torch.tensor(99, dtype=torch.int32)
        )
    ),
}
BAD_ARGUMENTS = {
    "q has length 0, must be from 1 to the window": bad(
        q=lambda c: c.q[:, :0], q_match=lambda c: c.q_match[:, :0]
    ),
    "q has length 61, must be from 1 to the window": bad(
        q=lambda c: c.q.new_zeros(2, 61, 6, HEAD_DIM)
    ),
    "q has shape [2, 12, 4, 64]": bad(q=lambda c: c.q[:, :, :4]),
    "q_match has shape [2, 11, 6, 64]": bad(q_match=lambda c: c.q_match[:, 1:]),
    "q_match is None": bad(q_match=None),
    "k_cache has shape": bad(kv_cache=lambda c: (c.kv.cache[0][:, :, :1],) * 2),
    "block_table has shape [4]": bad(block_table=lambda c: c.kv.table(c.lens)[0]),
    "seq_lens has shape [3]": bad(seq_lens=lambda c: c.ints([50, 40, 30])),
    "slots has shape [1]": bad(slots=lambda c: c.ints([1])),
    "request_ids has shape [1]": bad(request_ids=lambda c: c.ints([1], torch.int64)),
    "kv_layout is 'hnd'": bad(kv_layout="hnd"),
    "sm_scale is nan": bad(sm_scale=math.nan),
    "logits_soft_cap is -1": bad(logits_soft_cap=-1.0),
}
BAD_TYPES = {
    "reuse is None": bad(reuse=None),
    "q is torch.float16, must be {dtype}": bad(q=lambda c: c.q.half()),
    "q_match is torch.float16": bad(q_match=lambda c: c.q_match.half()),
    "k_cache is torch.float16": bad(kv_cache=lambda c: tuple(t.half() for t in c.kv.cache)),
    "block_table is torch.int64": bad(block_table=lambda c: c.kv.table(c.lens).long()),
    "seq_lens is torch.int64": bad(seq_lens=lambda c: c.ints([50, 40], torch.int64)),
    "slots is torch.int64": bad(slots=lambda c: c.ints([2, 1], torch.int64)),
    "slots is None": bad(slots=None),
    "request_ids is torch.int32": bad(request_ids=lambda c: c.ints([1, 2])),
    "sm_scale is of type str": bad(sm_scale="1"),
}


@pytest.mark.parametrize("length", [50, 11])  # of one less than the queries match sees nothing
def test_slots_that_nobody_has_on_a_gpu(length, cuda):
    """Nobody reads them back there: they are marked, and the others are seeded as ever."""
    case, alone = Case([50, 40], 12, cuda), Case([50, 40], 12, cuda)
    alone.seed(slots=case.ints([-1, 1]))
    for slot in (3, -2, 10**6):
        case.cache.reset()
        case.seed(slots=case.ints([slot, 1]), seq_lens=case.ints([length, 40]))
        assert torch.equal(case.cache.ring[[0, 1, 2]], alone.cache.ring[[0, 1, 2]])
        if length == 50:
            with pytest.raises(ValueError, match="slots held"):
                case.cache.check()


@pytest.mark.parametrize("message", [*BAD_VALUES, *BAD_ARGUMENTS, *BAD_TYPES])
def test_refuses_bad_arguments_and_writes_nothing(message, device):
    if device.type != "cpu" and message in BAD_VALUES:
        pytest.skip("values on a GPU are not read back")
    case = Case([50, 40], 12, device)
    case.seed()
    before = case.cache.ring.clone()
    error = TypeError if message in BAD_TYPES else ValueError
    with pytest.raises(error) as raised:
        case.seed(**(BAD_VALUES | BAD_ARGUMENTS | BAD_TYPES)[message](case))
    assert message.format(dtype=case.cache.dtype) in str(raised.value)
    assert torch.equal(case.cache.ring, before)
