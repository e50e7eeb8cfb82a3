"""Steps of the vLLM plugin without vLLM: the plans of both backends and what they attend to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm_batches import BLOCK, DIM, HEADS, KV_HEADS, Common, common_metadata

import mac_attn
from mac_attn.integrations.serving.slots import Place, Row, SlotTable
from mac_attn.integrations.vllm import attend, cpu_plan, cuda_plan
from mac_attn.integrations.vllm.decodes import Decode, count_decodes, plan_decodes

SCALES = {"_k_scale": torch.tensor(0.5), "_v_scale": torch.tensor([0.25, 2.0])}


class FakeEngine:
    """An engine whose requests and places are given."""

    batch_invariant = False

    def __init__(
        self,
        rows: list[Row | None],
        places: list[Place | None],
        seed: int = 0,
        query_tokens: int = 1,
    ) -> None:
        self._rows, self._places, self._seed = rows, places, seed
        self.query_tokens = query_tokens

    def rows(self, common: Any) -> list[Row | None]:
        return self._rows

    def place(self, rows: list[Row | None], leads: bool) -> list[Place | None]:
        assert leads
        assert rows == self._rows
        return self._places

    def seeded(self, row: Row) -> int:
        return 0 if row.tokens <= self.query_tokens else min(self._seed, row.tokens)


def _layer(
    rotary: mac_attn.RotaryEmbedding | None = None, float8: bool = False, threshold: float = 0
) -> SimpleNamespace:
    config = mac_attn.ReuseConfig(
        entries=8, window=8, band=4, anchors=0, min_context=8, threshold=threshold
    )
    ring = mac_attn.ReuseCache(
        config,
        num_slots=3,
        num_qo_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=torch.float32,
        rotary=rotary,
    )
    served = attend.Served(None, ring, float8)  # type: ignore[arg-type]
    impl = SimpleNamespace(mac=served, scale=DIM**-0.5, logits_soft_cap=0, head_size=DIM)
    return SimpleNamespace(impl=impl, **SCALES)


@pytest.fixture
def batch() -> Iterator[tuple[Common, Tensor, Tensor]]:
    """Three rows of decode, one of prefill; queries of all tokens; vLLM's pages."""
    common = common_metadata([1, 1, 1, 5], [9, 17, 30, 12])
    yield common, torch.randn(8, HEADS, DIM), torch.randn(32, KV_HEADS, BLOCK, 2 * DIM)


ROWS: list[Row | None] = [
    Row("a", 8, 9, 9),
    Row("b", 16, 17, 17),
    Row("c", 29, 30, 30),
    Row("d", 7, 12, 12),
]
PLACES = [Place(2, 7), None, Place(0, 9), Place(1, 4)]


def _expected(common: Common, query: Tensor, kv_cache: Tensor) -> Tensor:
    """Attention of the rows of decode, each by itself; bytes count what they stand for."""
    pages = list(kv_cache.split(DIM, dim=-1))
    if kv_cache.dtype == torch.uint8:
        scales = SCALES.values()
        numbers = (x.contiguous().view(torch.float8_e4m3fn) for x in pages)
        pages = [x.float() * scale.view(-1, 1, 1) for x, scale in zip(numbers, scales, strict=True)]
    table, lens = common.block_table_tensor[:3], common.seq_lens[:3]
    out = mac_attn.decode(query[:3], (pages[0], pages[1]), table, lens, kv_layout="HND")
    assert isinstance(out, Tensor)
    return out


def _build(seen: list[Common]) -> Callable[[Any], str]:
    def build(part: Common) -> str:
        seen.append(part)
        return "metadata"

    return build


@pytest.mark.parametrize("float8", [False, True])
def test_a_step_on_the_cpu(batch: tuple[Common, Tensor, Tensor], float8: bool) -> None:
    common, query, kv_cache = batch
    if float8:
        kv_cache = kv_cache.to(torch.float8_e4m3fn).view(torch.uint8)
    layer, seen = _layer(float8=float8), list[Common]()
    engine = FakeEngine(ROWS, PLACES, seed=3)
    plan = cpu_plan.plan_step(engine, True, common, BLOCK, _build(seen))  # type: ignore[arg-type]
    output = torch.full_like(query, torch.nan)
    (call,) = plan.decodes
    attend.decode(layer, call, query, kv_cache, output)
    torch.testing.assert_close(output[:3], _expected(common, query, kv_cache))
    ring = layer.impl.mac.ring
    assert ring.slot_end.tolist() == [30, 0, 9]
    assert ring.slot_request.tolist() == [9, -1, 7]

    assert plan.prefill is not None
    assert plan.prefill.tokens == slice(3, 8)
    (part,) = seen
    assert part.query_start_loc.tolist() == [0, 5]
    assert part.seq_lens.tolist() == [12]
    # Packed as vLLM would, the scratch cache holds the request's keys in order.
    keys = kv_cache[plan.prefill.pages, :, plan.prefill.places]
    table = common.block_table_tensor[3].long()
    assert torch.equal(keys, kv_cache[table].transpose(1, 2).flatten(0, 1)[:12])
    assert plan.prefill.slot_mapping.tolist() == list(range(12))
    assert part.block_table_tensor.tolist() == [[0, 1, 2]]

    attend.seed(layer, plan.seeds, query, kv_cache)
    assert ring.slot_end[1] == 12
    assert ring.ring_stored[1].tolist() == [3] * KV_HEADS
    assert (ring.ring_position[1, :, :3] == torch.tensor([9, 10, 11])).all()
    assert ring.slot_request[1] == 4


@pytest.mark.parametrize("padding", [0, 2])
def test_a_step_on_a_gpu(batch: tuple[Common, Tensor, Tensor], padding: int) -> None:
    """What a graph was recorded with serves every step."""
    _, query, kv_cache = batch
    lens = [9, 17, 30, *[0] * padding]
    common = common_metadata([1, 1, 1, *[0] * padding], lens)
    layer, buffers = _layer(), cuda_plan.Buffers(8, torch.device("cpu"))
    recorded = cuda_plan.plan_capture(common_metadata([1] * len(lens), [1] * len(lens)), buffers)
    rows = [*ROWS[:3], *[None] * padding]
    places = [*PLACES[:3], *[None] * padding]
    engine = FakeEngine(rows, places)
    plan = cuda_plan.plan_step(engine, True, common, buffers, _build([]))  # type: ignore[arg-type]
    assert plan.prefill is None
    expected = _expected(common, query, kv_cache)

    def run(step: cuda_plan.CudaPlan) -> Tensor:
        (call,) = step.decodes
        # A graph reads the block table where it was when recorded; vLLM writes it there.
        table = common.block_table_tensor[: len(call.rows.seq_lens)]
        output = torch.full_like(query, torch.nan)
        rows = replace(call.rows, block_table=table)
        attend.decode(layer, replace(call, rows=rows), query, kv_cache, output)
        return output[call.tokens]

    torch.testing.assert_close(run(plan), expected)
    replayed = run(recorded)
    torch.testing.assert_close(replayed[:3], expected)
    assert not replayed[3:].any()
    assert layer.impl.mac.ring.slot_request.tolist() == [9, -1, 7]


def test_a_mixed_step_on_a_gpu(batch: tuple[Common, Tensor, Tensor]) -> None:
    common, _, _ = batch
    seen: list[Common] = []
    engine = FakeEngine(ROWS, PLACES, seed=3)
    buffers = cuda_plan.Buffers(8, torch.device("cpu"))
    plan = cuda_plan.plan_step(engine, True, common, buffers, _build(seen))  # type: ignore[arg-type]
    assert plan.prefill is not None
    assert plan.prefill.tokens == slice(3, 8)
    (part,) = seen
    assert part.num_reqs == 1
    assert part.query_start_loc.tolist() == [0, 5]
    assert torch.equal(part.block_table_tensor, common.block_table_tensor[3:])
    assert torch.equal(part.slot_mapping, common.slot_mapping[3:])
    assert buffers.seq_lens[:4].tolist() == [9, 17, 30, 12]
    assert buffers.slots[:4].tolist() == [2, -1, 0, 1]
    (seed,) = plan.seeds
    assert (seed.first, seed.last) == (5, 8)
    # Out of the buffers: a tensor made for a seed alone would have the host wait for the GPU.
    for part, buffer in [
        (seed.rows.slots, buffers.slots),
        (seed.rows.request_ids, buffers.request_ids),
        (seed.rows.seq_lens, buffers.seq_lens),
    ]:
        assert part is not None and part.tolist() == buffer[3:4].tolist()
        assert part.data_ptr() == buffer[3:4].data_ptr()


def test_sinks_of_a_layer_are_in_its_answers(batch: tuple[Common, Tensor, Tensor]) -> None:
    common, query, kv_cache = batch
    layer = _layer()
    layer.impl.sinks = torch.tensor([0.5, -3.0, 2.0, 4.0], dtype=torch.bfloat16)
    rows = attend.Rows(common.block_table_tensor[:3], common.seq_lens[:3])
    got = torch.full_like(query, torch.nan)[:3]
    attend.decode(layer, Decode(rows, 1, slice(3)), query, kv_cache, got)
    pages = kv_cache.split(DIM, dim=-1)
    plain, lse = mac_attn.decode(
        query[:3],
        (pages[0], pages[1]),
        rows.block_table,
        rows.seq_lens,
        kv_layout="HND",
        return_lse=True,
    )
    share = (lse - layer.impl.sinks.float()).sigmoid()
    torch.testing.assert_close(got, plain * share[..., None])


def test_queries_that_are_not_rotated_are_matched_as_they_are(
    batch: tuple[Common, Tensor, Tensor],
) -> None:
    common, query, kv_cache = batch
    layer = _layer()
    rows = attend.Rows(
        common.block_table_tensor[:1],
        common.seq_lens[:1],
        torch.tensor([1], dtype=torch.int32),
        torch.tensor([5]),
    )
    output = torch.full_like(query, torch.nan)
    attend.decode(layer, Decode(rows, 1, slice(1)), query, kv_cache, output)
    stored = layer.impl.mac.ring.ring_query[1, :, 0].flatten(0, 1)
    assert torch.equal(stored, query[0])
    rotary = mac_attn.RotaryEmbedding(torch.tensor([1.0, 0.1]))
    layer = _layer(rotary)
    output = torch.full_like(query, torch.nan)
    attend.decode(layer, Decode(rows, 1, slice(1)), query, kv_cache, output)
    stored = layer.impl.mac.ring.ring_query[1, :, 0].flatten(0, 1)
    expected = mac_attn.unrotate(query[:1], common.seq_lens[:1] - 1, rotary)
    torch.testing.assert_close(stored, expected[0])


def test_which_rows_are_decode() -> None:
    assert count_decodes([0], 4) == 0
    assert count_decodes([0, 1, 5, 7, 8], 4) == 4
    assert count_decodes([0, 1, 5, 7, 8], 3) == 1
    assert count_decodes([0, 1, 2, 2, 2], 1) == 2  # the others are padding


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 5), max_size=8), st.booleans())
def test_every_token_of_decode_is_in_one_call(lengths: list[int], batch_invariant: bool) -> None:
    """Whatever the rows' lengths; those of one, or of any number, have a call of their own."""
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    count = len(lengths)
    rows = attend.Rows(
        torch.arange(count, dtype=torch.int32)[:, None], torch.arange(count, dtype=torch.int32)
    )
    states, found = torch.randn(starts[-1] + 2, 3), torch.full((starts[-1] + 2, 3), torch.nan)
    for call in plan_decodes(rows, starts, batch_invariant):
        q = call.take(states)
        assert q.shape == (len(call.rows.seq_lens), *([call.width] * (call.width > 1)), 3)
        lens = [lengths[row] for row in call.rows.seq_lens.tolist()]
        assert max(lens) == call.width
        assert (min(lens) == 1) == (call.width == 1)
        assert min(lens) == call.width or not batch_invariant
        if min(lens) < call.width:
            assert call.query_lens is not None and call.query_lens.tolist() == lens
        else:
            assert call.query_lens is None
        if isinstance(call.tokens, slice):
            call.take(found).copy_(q)
        else:
            call.put(q, found)
    assert torch.equal(found[:-2], states[:-2])
    assert found[-2:].isnan().all()


class Drafting:
    """An engine whose steps verify drafts, with slots of its own."""

    query_tokens = 4
    batch_invariant = False

    def __init__(self) -> None:
        self.slots = SlotTable(3, self.query_tokens - 1)

    def rows(self, common: Any) -> list[Row | None]:
        starts, ends = common.query_start_loc.tolist(), common.seq_lens.tolist()
        return [
            Row(row, end - (starts[row + 1] - starts[row]), end, end)
            for row, end in enumerate(ends)
        ]

    def place(self, rows: list[Row], leads: bool) -> list[Place | None]:
        return self.slots.place(rows, [True] * len(rows), lambda key: True)

    def seeded(self, row: Row) -> int:
        return 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("seed", range(3))
def test_rejected_drafts_leave_nothing(device: str, seed: int) -> None:
    """Steps of one token and of several hit on queries from before and between drafts, and see none
    rejected.

    A request asks the same all the time, so that a hit is exact; keys and values of what was
    rejected are NaN until others take their places.
    """
    draw = torch.Generator().manual_seed(seed)

    def number(first: int, last: int) -> int:
        return int(torch.randint(first, last + 1, (), generator=draw))

    engine, layer, blocks = Drafting(), _layer(threshold=0.3), 20
    queries = torch.randn(3, HEADS, DIM, generator=draw)
    kv_cache = torch.full((3 * blocks, KV_HEADS, BLOCK, 2 * DIM), torch.nan)
    buffers = cuda_plan.Buffers(4, torch.device("cpu"))
    begin, lens, numbers = [0, 0, 0], [13, 22, 30], set()
    ring, hits = layer.impl.mac.ring, Counter[bool]()

    def write(row: int, positions: range, keys: Tensor) -> None:
        at = torch.arange(positions.start, positions.stop)
        pages = common.block_table_tensor[row].long()[at // BLOCK]
        kv_cache[pages, :, at % BLOCK] = keys

    for step in range(16):
        common = common_metadata(lens, [b + n for b, n in zip(begin, lens, strict=True)], blocks)
        for row, (b, n) in enumerate(zip(begin, lens, strict=True)):
            write(row, range(b, b + n), torch.randn(n, KV_HEADS, 2 * DIM, generator=draw))
        if step > 0:  # the first one is prefill
            if device == "cpu":
                plan: Any = cpu_plan.plan_step(engine, True, common, BLOCK, _build([]))  # type: ignore[arg-type]
            else:
                plan = cuda_plan.plan_step(engine, True, common, buffers, _build([]))  # type: ignore[arg-type]
            assert plan.prefill is None
            query = queries.repeat_interleave(torch.tensor(lens), 0)
            output = torch.full_like(query, torch.nan)
            for call in plan.decodes:
                before = ring.stats().kv_head_hits
                attend.decode(layer, call, query, kv_cache, output)
                hits[call.width > 1] += ring.stats().kv_head_hits - before
                numbers |= set(call.rows.request_ids.tolist())
            # Each token by itself.
            of = torch.arange(3).repeat_interleave(torch.tensor(lens))
            ends = [b + t + 1 for b, n in zip(begin, lens, strict=True) for t in range(n)]
            key, value = kv_cache.split(DIM, dim=-1)
            ends = torch.tensor(ends, dtype=torch.int32)
            table = common.block_table_tensor[of]
            expected = mac_attn.decode(query, (key, value), table, ends, kv_layout="HND")
            torch.testing.assert_close(output, expected)
        for row, n in enumerate(lens):
            kept = number(1, n) if step > 0 else n
            begin[row] += kept
            write(row, range(begin[row], begin[row] + n - kept), torch.tensor(torch.nan))
        wide = step % 4 == 1  # now and then all rows have drafts
        lens = [number(2, 4) if wide or number(0, 3) == 0 else 1 for _ in range(3)]
    assert len(numbers) == 3  # no request was taken for a new one
    assert hits[False] > 10 and hits[True] > 10


@pytest.mark.parametrize("padding", [0, 2])
def test_a_graph_of_steps_that_verify(padding: int) -> None:
    """Recorded for rows of as many tokens; slots, lengths and padding are those of the step."""
    layer, width = _layer(), 3
    query_lens, lens = [width] * 3 + [0] * padding, [9, 17, 30, *[0] * padding]
    common = common_metadata(query_lens, lens)
    count = len(lens)
    query = torch.randn(count * width, HEADS, DIM)
    kv_cache = torch.randn(8 * count, KV_HEADS, BLOCK, 2 * DIM)
    buffers = cuda_plan.Buffers(8, torch.device("cpu"))
    dummies = common_metadata([width] * count, [width] * count)
    (recorded,) = cuda_plan.plan_capture(dummies, buffers).decodes
    rows = [Row(name, n - width, n, n) for name, n in zip("abc", lens, strict=False)]
    engine = FakeEngine([*rows, *[None] * padding], [*PLACES[:3], *[None] * padding], 0, 4)
    plan = cuda_plan.plan_step(engine, True, common, buffers, _build([]))  # type: ignore[arg-type]
    assert plan.prefill is None
    key, value = kv_cache.split(DIM, dim=-1)
    real = slice(3 * width)
    expected = mac_attn.decode(
        query[real].unflatten(0, (3, width)),
        (key, value),
        common.block_table_tensor[:3],
        common.seq_lens[:3],
        kv_layout="HND",
    )
    assert isinstance(expected, Tensor)
    (call,) = plan.decodes
    for one in (
        call,
        replace(recorded, rows=replace(recorded.rows, block_table=common.block_table_tensor)),
    ):
        output = torch.full_like(query, torch.nan)
        attend.decode(layer, one, query, kv_cache, output)
        torch.testing.assert_close(output[real], expected.flatten(0, 1))
    assert not output[3 * width :].any()  # of the graph, which has rows for padding too
    assert layer.impl.mac.ring.slot_request.tolist() == [9, -1, 7]
    assert layer.impl.mac.ring.slot_reach.tolist() == [30, 0, 9]


def test_a_step_of_drafts_beside_prefill(batch: tuple[Common, Tensor, Tensor]) -> None:
    """Longer ones than decode takes are vLLM's, with the prompts."""
    common, seen = common_metadata([1, 3, 5, 6], [9, 17, 30, 12]), list[Common]()
    rows = [
        Row(name, end - n, end, end)
        for name, n, end in zip("abcd", [1, 3, 5, 6], [9, 17, 30, 12], strict=True)
    ]
    engine = FakeEngine(rows, PLACES, 2, query_tokens=4)  # type: ignore[arg-type]
    plan = cpu_plan.plan_step(engine, True, common, BLOCK, _build(seen))  # type: ignore[arg-type]
    assert [(call.width, len(call.rows.seq_lens)) for call in plan.decodes] == [(1, 1), (3, 1)]
    assert plan.prefill is not None
    assert plan.prefill.tokens == slice(4, 15)
    assert seen[0].query_start_loc.tolist() == [0, 5, 11]
