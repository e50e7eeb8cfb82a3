"""Steps of the vLLM plugin without vLLM: the plans of both backends and what they attend to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm_batches import BLOCK, DIM, HEADS, KV_HEADS, Common, common_metadata

import mac_attn
from mac_attn.integrations.serving.slots import Place, Row
from mac_attn.integrations.vllm import attend, cpu_plan, cuda_plan

SCALES = {"_k_scale": torch.tensor(0.5), "_v_scale": torch.tensor([0.25, 2.0])}


class FakeEngine:
    """An engine whose requests and places are given."""

    def __init__(self, rows: list[Row | None], places: list[Place | None], seed: int = 0) -> None:
        self._rows, self._places, self._seed = rows, places, seed

    def rows(self, common: Any) -> list[Row | None]:
        return self._rows

    def place(self, rows: list[Row | None], leads: bool) -> list[Place | None]:
        assert leads
        assert rows == self._rows
        return self._places

    def seeded(self, row: Row) -> int:
        return 0 if row.is_decode else min(self._seed, row.end - row.begin)


def _layer(rotary: mac_attn.RotaryEmbedding | None = None, float8: bool = False) -> SimpleNamespace:
    config = mac_attn.ReuseConfig(
        entries=8, window=8, band=4, anchors=0, min_context=8, threshold=0
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
    assert plan.decode is not None
    assert plan.num_decodes == 3
    attend.decode(layer, plan.decode, query[:3], kv_cache, output[:3])
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
    assert plan.num_decodes == 3
    expected = _expected(common, query, kv_cache)

    def run(step: cuda_plan.CudaPlan) -> Tensor:
        assert step.decode is not None
        # A graph reads the block table where it was when recorded; vLLM writes it there.
        table = common.block_table_tensor[: step.num_decodes]
        q = query[: step.num_decodes]
        return attend.decode(layer, replace(step.decode, block_table=table), q, kv_cache)

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
    assert buffers.seq_lens[:3].tolist() == [9, 17, 30]
    assert buffers.slots[:3].tolist() == [2, -1, 0]
    (seed,) = plan.seeds
    assert (seed.first, seed.last) == (5, 8)


def test_sinks_of_a_layer_are_in_its_answers(batch: tuple[Common, Tensor, Tensor]) -> None:
    common, query, kv_cache = batch
    layer = _layer()
    layer.impl.sinks = torch.tensor([0.5, -3.0, 2.0, 4.0], dtype=torch.bfloat16)
    rows = attend.Rows(common.block_table_tensor[:3], common.seq_lens[:3])
    got = attend.decode(layer, rows, query[:3], kv_cache)
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
    attend.decode(layer, rows, query[:1], kv_cache)
    stored = layer.impl.mac.ring.ring_query[1, :, 0].flatten(0, 1)
    assert torch.equal(stored, query[0])
    rotary = mac_attn.RotaryEmbedding(torch.tensor([1.0, 0.1]))
    layer = _layer(rotary)
    attend.decode(layer, rows, query[:1], kv_cache)
    stored = layer.impl.mac.ring.ring_query[1, :, 0].flatten(0, 1)
    expected = mac_attn.unrotate(query[:1], common.seq_lens[:1] - 1, rotary)
    torch.testing.assert_close(stored, expected[0])
