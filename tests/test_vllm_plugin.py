"""The parts of the vLLM plugin that need no vLLM: options, slots, plans, rotations, counters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mac_attn
from mac_attn.integrations import vllm as package
from mac_attn.integrations.vllm import attend, cpu_plan, cuda_plan, metrics, requests
from mac_attn.integrations.vllm.options import Options
from mac_attn.integrations.vllm.rotary import is_rotated, rotary_of
from mac_attn.integrations.vllm.slots import Place, Row, SlotTable


class TestOptions:
    def test_off_unless_asked_for(self) -> None:
        assert Options.from_env({}) is None
        assert Options.from_env({"MAC_ATTN_VLLM": "0"}) is None
        assert Options.from_env({"MAC_ATTN_VLLM": "1"}) == Options()

    def test_values(self) -> None:
        options = Options.from_env(
            {
                "MAC_ATTN_VLLM": "1",
                "MAC_ATTN_VLLM_CONFIG": '{"threshold": 0.1, "band": 64}',
                "MAC_ATTN_VLLM_SLOTS": "3",
                "MAC_ATTN_VLLM_SEED": "0",
                "MAC_ATTN_VLLM_LOG_SECONDS": "0.5",
            }
        )
        assert options is not None
        assert options.layer_config(7) == mac_attn.ReuseConfig(threshold=0.1, band=64)
        assert (options.num_slots, options.seed, options.log_seconds) == (3, 0, 0.5)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("MAC_ATTN_VLLM", "yes please"),
            ("MAC_ATTN_VLLM_CONFIG", "threshold=0"),
            ("MAC_ATTN_VLLM_CONFIG", "[1]"),
            ("MAC_ATTN_VLLM_CONFIG", '{"threshhold": 0}'),
            ("MAC_ATTN_VLLM_CONFIG", '{"band": 0}'),
            ("MAC_ATTN_VLLM_CALIBRATION", "/nowhere.json"),
            ("MAC_ATTN_VLLM_SLOTS", "0"),
            ("MAC_ATTN_VLLM_SLOTS", "2.5"),
            ("MAC_ATTN_VLLM_SEED", "-1"),
            ("MAC_ATTN_VLLM_LOG_SECONDS", "inf"),
        ],
    )
    def test_a_wrong_value_names_its_variable(self, name: str, value: str) -> None:
        with pytest.raises(ValueError, match=f"^{name} is "):
            Options.from_env({"MAC_ATTN_VLLM": "1", name: value})

    def test_registering_does_nothing_when_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MAC_ATTN_VLLM", raising=False)
        package.register()


class TestSlots:
    @staticmethod
    def always(key: object) -> bool:
        return True

    def test_rows_move_and_slots_stay(self) -> None:
        table = SlotTable(2)
        a, b = Row("a", 9, 10, 10), Row("b", 4, 5, 5)
        first = table.place([a, b], [True, True], self.always)
        a, b = Row("a", 10, 11, 11), Row("b", 5, 6, 6)
        assert table.place([b, a], [True, True], self.always) == first[::-1]
        # And again, for another group of layers.
        assert table.place([b, a], [True, True], self.always, same_step=True) == first[::-1]

    def test_no_more_than_there_are(self) -> None:
        table = SlotTable(1)
        rows = [Row("a", 9, 10, 10), Row("b", 4, 5, 5)]
        places = table.place(rows, [True, True], self.always)
        assert places[0] is not None
        assert places[1] is None

    def test_who_is_over_leaves_before_who_is_away(self) -> None:
        table = SlotTable(2)
        (away,) = table.place([Row("away", 1, 2, 2)], [True], self.always)
        (over,) = table.place([Row("over", 1, 2, 2)], [True], self.always)
        new = [Row("new", 0, 1, 1)]
        (place,) = table.place(new, [True], lambda key: key != "over")
        assert away and over and place
        assert place.slot == over.slot
        assert place.number not in (away.number, over.number)

    @pytest.mark.parametrize("begin", [0, 9, 11])
    def test_another_number_after_a_gap(self, begin: int) -> None:
        table = SlotTable(1)
        (before,) = table.place([Row("a", 9, 10, 10)], [True], self.always)
        (after,) = table.place([Row("a", begin, begin + 1, 99)], [True], self.always)
        assert before and after
        assert after.slot == before.slot
        assert after.number != before.number

    @settings(max_examples=200, deadline=None)
    @given(st.data())
    def test_nobody_shares_a_number_and_no_number_has_a_gap(self, data: st.DataObject) -> None:
        """A scheduler that adds, ends, preempts and resumes at random."""
        table = SlotTable(data.draw(st.integers(1, 3)))
        alive: dict[str, int] = {}  # tokens computed
        seen: dict[int, tuple[str, int]] = {}  # who had a number, and up to where
        names = iter(range(1000))
        for _ in range(data.draw(st.integers(1, 25))):
            if data.draw(st.booleans()):
                alive[f"request {next(names)}"] = 0
            for name in data.draw(st.sets(st.sampled_from(sorted(alive) or ["none"]), max_size=2)):
                alive.pop(name, None)
            scheduled = data.draw(st.permutations(sorted(alive)))
            rows = []
            for name in scheduled[: data.draw(st.integers(0, 5))]:
                if data.draw(st.integers(0, 4)) == 0:
                    alive[name] = 0  # preempted before, computed anew
                end = alive[name] + data.draw(st.sampled_from([1, 1, 1, 7]))
                rows.append(Row(name, alive[name], end, end))
                alive[name] = end
            wants = [data.draw(st.booleans()) for _ in rows]
            places = table.place(rows, wants, alive.__contains__)
            used = [place.slot for place in places if place is not None]
            assert len(used) == len(set(used))
            for row, place in zip(rows, places, strict=True):
                if place is None:
                    continue
                if place.number in seen:
                    assert seen[place.number] == (row.key, row.begin)
                seen[place.number] = (str(row.key), row.end)


class TestRequests:
    def test_version_1_knows_a_request_from_one_of_the_same_name(self) -> None:
        old, new = object(), object()
        batch = SimpleNamespace(req_ids=["a"], num_tokens_no_spec=[12])
        runner = SimpleNamespace(input_batch=batch, requests={"a": old})
        common = _common([1], [12])
        (before,) = requests.rows_of(runner, common)
        runner.requests["a"] = new
        (after,) = requests.rows_of(runner, common)
        assert before and after
        assert before.key != after.key
        assert (after.begin, after.end, after.total) == (11, 12, 12)
        is_alive = requests.is_alive(runner)
        assert is_alive(after.key)
        assert not is_alive(before.key)

    def test_version_2_and_padding(self) -> None:
        states = SimpleNamespace(
            index_to_req_id={3: "a"},
            req_id_to_index={"a": 3},
            prefill_len=SimpleNamespace(np={3: 40}),
        )
        runner = SimpleNamespace(req_states=states)
        common = _common([8, 0], [20, 0])
        common.req_idx = torch.tensor([3, 5]).numpy()
        assert requests.rows_of(runner, common) == [Row("a", 12, 20, 40), None]
        assert requests.is_alive(runner)("a")
        assert not requests.is_alive(runner)("b")


class TestRotary:
    @dataclass
    class Module:
        """A rotary module as vLLM has them."""

        freq: Tensor
        scale: float = 1.0
        bend: float = 0.0
        is_neox_style: bool = True

        @property
        def rotary_dim(self) -> int:
            return 2 * len(self.freq)

        def _compute_cos_sin_cache(self) -> Tensor:
            angles = torch.arange(40_000.0)[:, None] * self.freq
            angles = angles + self.bend * (angles > 100)
            return torch.cat((angles.cos(), angles.sin()), dim=-1) * self.scale

    FREQ = 1.0 / 500_000 ** (torch.arange(0, 64, 2).float() / 64)

    @pytest.mark.parametrize("neox", [True, False])
    @pytest.mark.parametrize("scale", [1.0, 1.35])
    def test_the_frequencies_come_out_of_the_table(self, scale: float, neox: bool) -> None:
        rotary = rotary_of(self.Module(self.FREQ, scale, is_neox_style=neox), 32_768)
        torch.testing.assert_close(rotary.inv_freq, self.FREQ, rtol=2e-7, atol=0)
        assert rotary.interleaved is not neox
        assert math.isclose(rotary.scale, scale, rel_tol=1e-6)

    def test_what_is_no_rotation_is_refused(self) -> None:
        with pytest.raises(ValueError, match="not fixed"):
            rotary_of(self.Module(self.FREQ, bend=0.5), 32_768)
        with pytest.raises(ValueError, match="rotary embedding Linear"):
            rotary_of(nn.Linear(1, 1), 32_768)

    def test_layers_without_rotation(self) -> None:
        layer = nn.Module()
        assert is_rotated(layer)
        layer.nope = True
        assert not is_rotated(layer)
        layer.nope, layer.use_rope = False, False
        assert not is_rotated(layer)


class TestMetrics:
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(metrics.FOLDER, str(tmp_path))

    def test_a_worker_counts_and_others_read(self) -> None:
        worker = metrics.WorkerCounters.create(1, 2, (8, 2), layers=3, num_slots=4)
        worker.counters[1, 0] = torch.tensor([10, 20, 5, 40, 300, 1000])
        (read,) = metrics.WorkerCounters.read_all()
        assert (read.engine, read.rank) == (1, 2)
        assert read.stats().steps == 10
        assert read.stats().hit_rate == 0.5
        assert read.stats().kv_read_share == 0.3

    def test_ranks_are_added_up(self) -> None:
        pytest.importorskip("prometheus_client")
        for rank, hits in enumerate((8, 4)):
            worker = metrics.WorkerCounters.create(0, rank, (4, 1), layers=1, num_slots=1)
            worker.counters[0, 0] = torch.tensor([3, 3, hits // 4, hits, 60, 100])
        samples = {
            sample.name: sample.value
            for metric in metrics.Collector().collect()
            for sample in metric.samples
        }
        assert samples["mac_attn:query_heads_total"] == 24
        assert samples["mac_attn:hit_rate"] == 0.5
        assert samples["mac_attn:kv_read_share"] == 0.6


HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 16, 4


@dataclass
class Common:
    """What plans read of vLLM's CommonAttentionMetadata."""

    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    seq_lens_cpu_upper_bound: Tensor
    num_reqs: int
    num_actual_tokens: int
    block_table_tensor: Tensor
    slot_mapping: Tensor
    max_seq_len: int
    req_idx: Any = None

    def replace(self, **changes: Any) -> Common:
        return replace(self, **changes)


def _common(query_lens: list[int], seq_lens: list[int]) -> Common:
    """A batch whose requests have blocks of their own, 8 each."""
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    table = torch.arange(8 * len(lens), dtype=torch.int32).view(-1, 8).flip(1)
    positions = [
        torch.arange(n - length, n) for n, length in zip(seq_lens, query_lens, strict=True)
    ]
    slot_mapping = [
        table[row][p // BLOCK].long() * BLOCK + p % BLOCK for row, p in enumerate(positions)
    ]
    return Common(
        starts,
        starts,
        lens,
        lens,
        len(lens),
        int(starts[-1]),
        table,
        torch.cat(slot_mapping),
        max(seq_lens),
    )


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


def _impl(rotated: bool = False) -> SimpleNamespace:
    config = mac_attn.ReuseConfig(window=8, band=4, anchors=2, min_context=8, threshold=0)
    ring = mac_attn.ReuseCache(
        config,
        num_slots=3,
        num_qo_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=torch.float32,
    )
    served = attend.Served(None, ring, rotated)  # type: ignore[arg-type]
    return SimpleNamespace(mac=served, scale=DIM**-0.5, logits_soft_cap=0, head_size=DIM)


@pytest.fixture
def batch() -> Iterator[tuple[Common, Tensor, Tensor]]:
    """Three rows of decode, one of prefill; queries of all tokens; vLLM's pages."""
    common = _common([1, 1, 1, 5], [9, 17, 30, 12])
    yield common, torch.randn(8, HEADS, DIM), torch.randn(32, KV_HEADS, BLOCK, 2 * DIM)


ROWS: list[Row | None] = [
    Row("a", 8, 9, 9),
    Row("b", 16, 17, 17),
    Row("c", 29, 30, 30),
    Row("d", 7, 12, 12),
]
PLACES = [Place(2, 7), None, Place(0, 9), Place(1, 4)]


def _expected(common: Common, query: Tensor, kv_cache: Tensor) -> Tensor:
    """Attention of the rows of decode, with every row by itself."""
    pages = kv_cache.split(DIM, dim=-1)
    table, lens = common.block_table_tensor[:3], common.seq_lens[:3]
    out = mac_attn.decode(query[:3], pages, table, lens, kv_layout="HND")
    assert isinstance(out, Tensor)
    return out


def _build(seen: list[Common]) -> Callable[[Any], str]:
    def build(part: Common) -> str:
        seen.append(part)
        return "metadata"

    return build


def test_a_step_on_the_cpu(batch: tuple[Common, Tensor, Tensor]) -> None:
    common, query, kv_cache = batch
    impl, seen = _impl(), list[Common]()
    engine = FakeEngine(ROWS, PLACES, seed=3)
    plan = cpu_plan.plan_step(engine, True, common, BLOCK, _build(seen))  # type: ignore[arg-type]
    output = torch.full_like(query, torch.nan)
    for which, rows in plan.decode:
        output[which] = attend.decode(impl, rows, query[which], kv_cache)
    torch.testing.assert_close(output[:3], _expected(common, query, kv_cache))
    ring = impl.mac.ring
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

    attend.seed(impl, plan.seeds, query, kv_cache)
    assert ring.slot_end[1] == 12
    assert ring.slot_begin[1] == 9
    assert ring.slot_request[1] == 4


@pytest.mark.parametrize("padding", [0, 2])
def test_a_step_on_a_gpu(batch: tuple[Common, Tensor, Tensor], padding: int) -> None:
    """The two calls with lengths of 0 add up; what a graph was recorded with serves every step."""
    _, query, kv_cache = batch
    lens = [9, 17, 30, *[0] * padding]
    common = _common([1, 1, 1, *[0] * padding], lens)
    impl, buffers = _impl(), cuda_plan.Buffers(8, torch.device("cpu"))
    recorded = cuda_plan.plan_capture(_common([1] * len(lens), [1] * len(lens)), buffers)
    rows = [*ROWS[:3], *[None] * padding]
    places = [*PLACES[:3], *[None] * padding]
    engine = FakeEngine(rows, places)
    plan = cuda_plan.plan_step(engine, True, common, buffers, _build([]))  # type: ignore[arg-type]
    assert plan.prefill is None
    assert plan.num_decodes == 3
    expected = _expected(common, query, kv_cache)

    def run(step: cuda_plan.CudaPlan) -> Tensor:
        assert step.with_ring is not None
        assert step.exact is not None
        # A graph reads the block table where it was when recorded; vLLM writes it there.
        table = common.block_table_tensor[: step.num_decodes]
        q = query[: step.num_decodes]
        with_ring = attend.decode(impl, replace(step.with_ring, block_table=table), q, kv_cache)
        exact = attend.decode(impl, replace(step.exact, block_table=table), q, kv_cache)
        return with_ring + exact

    torch.testing.assert_close(run(plan), expected)
    replayed = run(recorded)
    torch.testing.assert_close(replayed[:3], expected)
    assert not replayed[3:].any()
    assert impl.mac.ring.slot_request.tolist() == [9, -1, 7]


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
    assert buffers.ring_lens[:3].tolist() == [9, 0, 30]
    assert buffers.exact_lens[:3].tolist() == [0, 17, 0]
    (seed,) = plan.seeds
    assert (seed.first, seed.last) == (5, 8)


def test_queries_that_are_not_rotated_are_matched_as_they_are(
    batch: tuple[Common, Tensor, Tensor],
) -> None:
    common, query, kv_cache = batch
    impl = _impl(rotated=False)
    rows = attend.Rows(
        common.block_table_tensor[:1],
        common.seq_lens[:1],
        torch.tensor([1], dtype=torch.int32),
        torch.tensor([5]),
    )
    attend.decode(impl, rows, query[:1], kv_cache)
    stored = impl.mac.ring.ring_query[1, :, 8 % 8].flatten(0, 1)
    assert torch.equal(stored, query[0])
    impl = _impl(rotated=True)
    with pytest.raises(ValueError, match="rotary"):  # and this ring knows no rotation
        attend.decode(impl, rows, query[:1], kv_cache)
