"""Seeding after prefill, against attention written out in float64 and against the reference."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from cases import make_kv, make_q
from compare import check_ring, one_thread, state_tolerance
from torch import Tensor

from mac_attn import ReuseCache, ReuseConfig, RotaryEmbedding, reference, rotate, seed
from mac_attn.cache import NO_POSITION
from mac_attn.reference import ReferenceReuse

HEADS, HEAD_DIM = (6, 2), 32


class Case:
    """Prompts of several requests with their caches, and the state that an entry should hold."""

    def __init__(
        self,
        lens: list[int],
        length: int,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        page_size: int = 16,
        rotary: RotaryEmbedding | None = None,
        kv: dict[str, Any] | None = None,
        **config: Any,
    ) -> None:
        self.lens, self.length, self.device = lens, length, device
        self.cfg = ReuseConfig(**dict(window=32, band=16, anchors=4) | config)
        batch = len(lens)
        self.kv = make_kv(
            3,
            batch=batch,
            length=max(lens),
            num_kv_heads=HEADS[1],
            head_dim=HEAD_DIM,
            page_size=page_size,
            dtype=dtype,
            device=device,
            **kv or {},
        )
        self.kv.write([0] * batch, lens)
        self.q = make_q(4, batch, length, HEADS[0], HEAD_DIM, dtype=dtype, device=device)
        # Twice as large, so that some tokens stand out as anchors; its own values, to tell apart.
        self.q = self.q * 2
        self.q_match = make_q(5, batch, length, HEADS[0], HEAD_DIM, dtype=dtype, device=device)
        self.cache = ReuseCache(
            self.cfg,
            num_slots=batch + 1,
            num_qo_heads=HEADS[0],
            num_kv_heads=HEADS[1],
            head_dim=HEAD_DIM,
            dtype=dtype,
            device=device,
            rotary=rotary,
        )
        self.tolerance = state_tolerance(torch.float32, "cpu")  # float32 matmuls on every device

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
        seed(**self.arguments(**changes))

    def slot(self, b: int) -> int:
        return len(self.lens) - b

    def logits(self, b: int, head: int, c: int, sm_scale: float, cap: float) -> Tensor:
        """Of the query of position c over all tokens, float64 `[n]`."""
        q = self.q[b, c - self.lens[b] + self.length, head].cpu().double()
        k = self.kv.k[b, : self.lens[b], head // (HEADS[0] // HEADS[1])].cpu().double()
        logits = k @ q * sm_scale
        return cap * torch.tanh(logits / cap) if cap else logits

    def expected_anchors(self, b: int, kv_head: int, sm_scale: float, cap: float) -> list[int]:
        """The S heaviest of `[0, E(n-1))`, by the largest softmax weight over the voters."""
        n, group = self.lens[b], HEADS[0] // HEADS[1]
        weight = torch.full((n,), -1.0, dtype=torch.float64)
        for c in range(n - min(self.length, 32), n):
            for head in range(kv_head * group, (kv_head + 1) * group):
                seen = self.logits(b, head, c, sm_scale, cap)[: c + 1].softmax(0)
                weight[: c + 1] = torch.maximum(weight[: c + 1], seen)
        old = max(0, n - self.cfg.band)
        order = weight[:old].argsort(descending=True).tolist()
        return order[: self.cfg.anchors]

    def check(self, sm_scale: float = HEAD_DIM**-0.5, cap: float = 0.0) -> None:
        """Every entry of every request, written out."""
        cache, group, window = self.cache, HEADS[0] // HEADS[1], self.cfg.window
        for b, n in enumerate(self.lens):
            slot = self.slot(b)
            for kv_head in range(HEADS[1]):
                chosen = self.expected_anchors(b, kv_head, sm_scale, cap)
                for c in range(n - self.length, n):
                    end, at = max(0, c + 1 - self.cfg.band), c % window
                    assert cache.ring_position[slot, at] == c
                    kept = sorted(a for a in chosen if a < end)
                    padded = kept + [NO_POSITION] * (self.cfg.anchors - len(kept))
                    assert cache.ring_anchors[slot, kv_head, at].tolist() == padded
                    tokens = sorted(set(range(end)) - set(kept))
                    for g in range(group):
                        head, where = kv_head * group + g, (slot, kv_head, at, g)
                        logits = self.logits(b, head, c, sm_scale, cap)[tokens]
                        v = self.kv.v[b, tokens, kv_head].cpu().double()
                        self.tolerance.check(cache.ring_lse[where], logits.logsumexp(0), "lse")
                        self.tolerance.check(cache.ring_out[where], logits.softmax(0) @ v, "out")
                        query = self.q_match[b, c - n + self.length, head]
                        assert torch.equal(cache.ring_query[where], query)
                        assert cache.ring_depth[where] == 0
            assert (cache.slot_begin[slot], cache.slot_end[slot]) == (n - self.length, n)
            assert cache.slot_request[slot] == -1


CASES: dict[str, dict[str, Any]] = {
    "full window": dict(lens=[90, 61], length=32),
    "no anchors": dict(lens=[90, 61], length=32, anchors=0),
    "short": dict(lens=[90, 61], length=5),
    "one query": dict(lens=[40], length=1),
    "more queries than voters": dict(lens=[90], length=45, window=48),
    "more anchors than tokens": dict(lens=[20, 30], length=9, anchors=6),
    "nothing is old": dict(lens=[16, 9], length=9),
    "band of one": dict(lens=[33], length=20, band=1),
    "strided HND pages of one": dict(
        lens=[50, 40], length=12, page_size=1, kv=dict(layout="HND", strided=True)
    ),
    "combined": dict(lens=[50, 40], length=12, kv=dict(combined=True)),
    "bfloat16": dict(lens=[50, 40], length=12, dtype=torch.bfloat16),
    "float16": dict(lens=[50, 40], length=12, dtype=torch.float16),
}


@pytest.mark.parametrize("name", CASES)
def test_entries(name, device):
    case = Case(**CASES[name], device=device)
    case.seed()
    case.check()


@pytest.mark.parametrize("chunk", [7, 16, 64])
def test_chunks(chunk, device, monkeypatch):
    """The running softmax: contexts of many chunks, some of which a query does not see at all."""
    # By this name the package has the function.
    monkeypatch.setattr(importlib.import_module("mac_attn.seed"), "_CHUNK", chunk)
    case = Case([90, 61], 32, device)
    case.seed()
    case.check()


def test_long_context_in_real_chunks(device):
    case = Case([2600], 3, device, page_size=128)
    case.seed()
    case.check()


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_scale_and_soft_cap(cap, device):
    case = Case([70], 8, device)
    case.seed(sm_scale=0.5, logits_soft_cap=cap)
    case.check(0.5, cap)


def test_query_from_the_rotary_embedding(device):
    rotary = RotaryEmbedding(1e4 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    case = Case([90, 61], 12, device, rotary=rotary)
    positions = case.ints(case.lens)[:, None] - 12 + torch.arange(12, device=device)
    case.q = rotate(case.q_match, positions, rotary.to(device))
    case.seed(q_match=None)
    for b, n in enumerate(case.lens):
        at = [c % 32 for c in range(n - 12, n)]
        got = case.cache.ring_query[case.slot(b)][:, at].transpose(0, 1).flatten(1, 2)
        # Forth and back are two roundings of numbers up to 4 sigma.
        torch.testing.assert_close(got, case.q_match[b], rtol=0, atol=2e-6)


def test_padding_row_leaves_its_slot_alone(device):
    case = Case([50, 40], 12, device)
    before = {name: t.clone() for name, t in vars(case.cache).items() if isinstance(t, Tensor)}
    # The slot and the id of a padding row are ignored, whatever they are.
    ids = case.ints([-5, 3], torch.int64)
    case.seed(seq_lens=case.ints([0, 40]), slots=case.ints([99, 1]), request_ids=ids)
    assert case.cache.slot_end.tolist() == [0, 40, 0]
    assert case.cache.slot_request.tolist() == [-1, 3, -1]
    for name, tensor in before.items():
        if tensor.ndim > 0 and len(tensor) == 3:
            assert torch.equal(getattr(case.cache, name)[[0, 2]], tensor[[0, 2]]), name
    case.seed(seq_lens=case.ints([0, 0]))
    assert case.cache.slot_end.tolist() == [0, 40, 0]


@pytest.mark.parametrize(
    ("end", "request_id", "begin"), [(40, 7, 31), (40, 8, 40), (39, 7, 40), (41, 7, 40)]
)
def test_history(end, request_id, begin, device):
    """Older entries stay if the slot ended where the new ones begin, in the same request."""
    case = Case([50], 10, device)
    case.cache.slot_begin[1], case.cache.slot_end[1], case.cache.slot_request[1] = 31, end, 7
    case.seed(request_ids=case.ints([request_id], torch.int64))
    assert (case.cache.slot_begin[1], case.cache.slot_end[1]) == (begin, 50)
    assert case.cache.slot_request[1] == request_id


@pytest.mark.parametrize("anchors", [0, 4])
def test_against_the_reference(anchors, device):
    case = Case([90, 61], 20, device, anchors=anchors)
    twin = ReferenceReuse(case.cfg, num_slots=3, num_qo_heads=HEADS[0], num_kv_heads=HEADS[1])
    for length in (20, 11):
        arguments = case.arguments(
            q=case.q[:, :length],
            q_match=case.q_match[:, :length],
            request_ids=case.ints([4, 9], torch.int64),
        )
        seed(**arguments)
        with one_thread():
            reference.seed(
                twin, *list(arguments.values())[1:5], **dict(list(arguments.items())[5:])
            )
        for slot in range(3):
            check_ring(case.cache, twin, slot, case.tolerance)


def bad(**changes: Any) -> Any:
    """A change of the arguments of a case with lens [50, 40] and length 12."""
    return lambda case: {
        name: value(case) if callable(value) else value for name, value in changes.items()
    }


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
    "q has length 0, must be from 1 to the window": bad(
        q=lambda c: c.q[:, :0], q_match=lambda c: c.q_match[:, :0]
    ),
    "q has length 33, must be from 1 to the window": bad(
        q=lambda c: torch.rand(2, 33, 6, 32, device=c.device)
    ),
    "q has shape [2, 12, 4, 32]": bad(q=lambda c: c.q[:, :, :4]),
    "q_match has shape [2, 11, 6, 32]": bad(q_match=lambda c: c.q_match[:, 1:]),
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
    "q is torch.float16, must be torch.float32": bad(q=lambda c: c.q.half()),
    "q_match is torch.float16": bad(q_match=lambda c: c.q_match.half()),
    "k_cache is torch.float16": bad(kv_cache=lambda c: tuple(t.half() for t in c.kv.cache)),
    "block_table is torch.int64": bad(block_table=lambda c: c.kv.table(c.lens).long()),
    "seq_lens is torch.int64": bad(seq_lens=lambda c: c.ints([50, 40], torch.int64)),
    "slots is torch.int64": bad(slots=lambda c: c.ints([2, 1], torch.int64)),
    "slots is None": bad(slots=None),
    "request_ids is torch.int32": bad(request_ids=lambda c: c.ints([1, 2])),
    "sm_scale is of type str": bad(sm_scale="1"),
}


@pytest.mark.parametrize("message", [*BAD_VALUES, *BAD_TYPES])
def test_refuses_bad_arguments_and_writes_nothing(message, device):
    case = Case([50, 40], 12, device)
    case.seed()
    tensors = {name: t for name, t in vars(case.cache).items() if isinstance(t, Tensor)}
    before = {name: t.clone() for name, t in tensors.items()}
    error = ValueError if message in BAD_VALUES else TypeError
    with pytest.raises(error) as raised:
        case.seed(**(BAD_VALUES | BAD_TYPES)[message](case))
    assert message in str(raised.value)
    assert all(torch.equal(t, before[name]) for name, t in tensors.items())
