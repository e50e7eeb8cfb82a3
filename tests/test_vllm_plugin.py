"""The parts of the vLLM plugin that need no vLLM: options, slots, requests, rotations, counters."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm_batches import common_metadata

import mac_attn
from mac_attn.calibrate import Calibration
from mac_attn.integrations import vllm as package
from mac_attn.integrations.serving.budget import Plan
from mac_attn.integrations.serving.engine import BaseEngine
from mac_attn.integrations.serving.rotary import is_rotated, rotary_of
from mac_attn.integrations.serving.slots import Row
from mac_attn.integrations.vllm import metrics, requests
from mac_attn.integrations.vllm.options import Options


def calibration_of(layers: int, heads: int) -> Calibration:
    config = mac_attn.ReuseConfig(threshold=[0.1] * heads)
    return Calibration((config,) * layers, target_error=0.03, error=0.02, kv_read_share=0.5)


class TestOptions:
    def test_off_unless_asked_for(self) -> None:
        assert Options.from_env({}) is None
        assert Options.from_env({"MAC_ATTN_VLLM": "0"}) is None
        assert Options.from_env({"MAC_ATTN_VLLM": "1"}) == Options()
        assert Options.from_env({"MAC_ATTN_VLLM": "custom"}) == Options(by_name=True)

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
        assert options.layer_config(7, 8, 0, 1) == mac_attn.ReuseConfig(threshold=0.1, band=64)
        assert (options.num_slots, options.seed, options.log_seconds) == (3, 0, 0.5)
        share = Options.from_env({"MAC_ATTN_VLLM": "1", "MAC_ATTN_VLLM_SHARE": "0.25"})
        assert share is not None
        assert (share.num_slots, share.share) == (None, 0.25)
        with pytest.raises(ValueError, match="SLOTS and MAC_ATTN_VLLM_SHARE are both set"):
            both = {"MAC_ATTN_VLLM_SLOTS": "3", "MAC_ATTN_VLLM_SHARE": "0.25"}
            Options.from_env({"MAC_ATTN_VLLM": "1", **both})

    def test_thresholds_per_head_are_those_of_the_rank(self) -> None:
        options = Options(config=mac_attn.ReuseConfig(threshold=[0.1 * i for i in range(16)]))
        for rank in range(2):
            own = options.layer_config(0, 8, rank, 2)
            assert own.threshold == tuple(0.1 * i for i in range(8 * rank, 8 * rank + 8))
        same = mac_attn.ReuseConfig(threshold=0.3)
        assert Options(config=same).layer_config(0, 8, 1, 2) == same

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
            ("MAC_ATTN_VLLM_SHARE", "0"),
            ("MAC_ATTN_VLLM_SHARE", "1.5"),
            ("MAC_ATTN_VLLM_SEED", "-1"),
            ("MAC_ATTN_VLLM_LOG_SECONDS", "inf"),
        ],
    )
    def test_a_wrong_value_names_its_variable(self, name: str, value: str) -> None:
        with pytest.raises(ValueError, match=f"^{name} is "):
            Options.from_env({"MAC_ATTN_VLLM": "1", name: value})

    @pytest.mark.parametrize("text", ["{", "{}", "[]", '{"layers": [{}]}', "\x80", None])
    def test_a_broken_calibration_names_its_variable(
        self, text: str | None, tmp_path: Path
    ) -> None:
        path = tmp_path / "calibration.json"
        if text is None:  # one of options that there are no more
            calibration_of(1, 8).save(path)
            path.write_text(path.read_text().replace("entries", "entrees"))
        else:
            path.write_bytes(text.encode("latin-1"))
        name = "MAC_ATTN_VLLM_CALIBRATION"
        with pytest.raises(ValueError, match=f"^{name} is '.*is not a calibration"):
            Options.from_env({"MAC_ATTN_VLLM": "1", name: str(path)})

    def test_registering_does_nothing_when_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MAC_ATTN_VLLM", raising=False)
        package.register()


class SomeEngine(BaseEngine):
    """An engine on one of two ranks, with layers of 4 query heads there; None is left."""

    engine, logger, rank = "Some", logging.getLogger(__name__), (1, 2)

    def most_rows(self) -> int:
        return 1

    def _plan(self, key: int, layer: str | None) -> Plan:
        if layer is None:
            raise ValueError("layers without a name")
        return self._plan_of(key, TestRotary.Attention(), (4, 2, 16), torch.float32)

    def _memory(self, layers: list[Plan]) -> tuple[int, int]:
        return 2**20, 1

    def _serve(self, layer: str, ring: mac_attn.ReuseCache) -> None:
        assert ring.cfg.threshold == (0.1,) * 4


class TestLayerOptions:
    NAME = "MAC_ATTN_VLLM_CALIBRATION"

    def engine(self, tmp_path: Path, layers: int, heads: int) -> SomeEngine:
        path = tmp_path / "calibration.json"
        calibration_of(layers, heads).save(path)
        options = Options.from_env({"MAC_ATTN_VLLM": "1", self.NAME: str(path)})
        assert options is not None
        path.unlink()  # it is read once
        return SomeEngine(options, "cpu", 64)

    def test_of_this_model(self, tmp_path: Path) -> None:
        engine = self.engine(tmp_path, layers=2, heads=8)
        engine.attach({0: "a", 1: "b", 2: None})
        assert set(engine.rings) == {0, 1}

    @pytest.mark.parametrize(
        ("layers", "heads", "what"),
        [
            (1, 8, "layer 1, of 8 query heads: layer is 1, must be from 0 to 0"),
            (2, 16, "layer 0, of 8 query heads: threshold has 16 numbers"),
            (2, 4, "layer 0, of 8 query heads: threshold has 4 numbers"),
        ],
    )
    def test_of_another_model(self, layers: int, heads: int, what: str, tmp_path: Path) -> None:
        engine = self.engine(tmp_path, layers, heads)
        with pytest.raises(ValueError, match=f"^{self.NAME} is not for {what}"):
            engine.attach({0: "a", 1: "b"})

    def test_of_the_config(self) -> None:
        env = {"MAC_ATTN_VLLM": "1", "MAC_ATTN_VLLM_CONFIG": '{"threshold": [0.1, 0.2]}'}
        options = Options.from_env(env)
        assert options is not None
        with pytest.raises(ValueError, match=r"^MAC_ATTN_VLLM_CONFIG is not for layer 0.* 2 num"):
            SomeEngine(options, "cpu", 64).attach({0: "a"})


class TestRequests:
    def test_version_1_knows_a_request_from_one_of_the_same_name(self) -> None:
        old, new = object(), object()
        batch = SimpleNamespace(req_ids=["a"], num_tokens_no_spec=[12])
        runner = SimpleNamespace(input_batch=batch, requests={"a": old})
        common = common_metadata([1], [12])
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
        """Whatever the model's state puts into the metadata: that of hybrid models has no rows."""
        seen: list[list[Row | None]] = []

        def prepare_attn(batch: Any, mode: str, *, for_capture: bool = False) -> str:
            seen.append(requests.rows_of(runner, common_metadata([8, 1, 0], [20, 1, 0])))
            if mode == "fails":
                raise RuntimeError(mode)
            return mode

        states = SimpleNamespace(
            req_id_to_index={"a": 3, "b": 0},
            prefill_len=SimpleNamespace(np={0: 9, 3: 40}),
        )
        state = SimpleNamespace(prepare_attn=prepare_attn)
        runner = SimpleNamespace(req_states=states, model_state=state)
        requests.watch_batches(runner)
        batch = SimpleNamespace(req_ids=["a", "over"])
        assert state.prepare_attn(batch, "full", for_capture=True) == "full"
        assert seen.pop() == [Row("a", 12, 20, 40), None, None]
        with pytest.raises(RuntimeError, match="fails"):
            state.prepare_attn(batch, "fails")
        # Between batches, as for layers that draft; and for a dummy batch of vLLM's.
        assert requests.rows_of(runner, common_metadata([8], [20])) == [None]
        state.prepare_attn(SimpleNamespace(req_ids=["req_0_of_nobody", "req_1"]), "full")
        assert seen.pop() == [None, None, None]
        assert requests.is_alive(runner)("a")
        assert not requests.is_alive(runner)("over")


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

    class Attention(nn.Module):
        """A layer as the engines' models write them."""

        def __init__(self, **switches: Any) -> None:
            super().__init__()
            self.rotary_emb = self.nope = self.sliding_window = self.v1 = None
            vars(self).update(switches)

        def forward(self, positions: Tensor, q: Tensor) -> Tensor:
            if positions is None:
                return q
            return q if self.nope else self.turn(positions, q)

        def turn(self, positions: Tensor, q: Tensor) -> Tensor:
            if self.v1 or self.sliding_window:
                q = self.rotary_emb(positions, q)
            elif positions.ndim == 2 and not self.nope:
                pass
            return q

    class Otherwise(Attention):
        def turn(self, positions: Tensor, q: Tensor) -> Tensor:
            if self.nope or self.not_there:
                q = q + 1
            elif positions.ndim == 1:
                q, _ = self.rotary_emb.forward_native(positions, q, None)
            return q

    class Fused(Attention):
        def turn(self, positions: Tensor, q: Tensor) -> Tensor:
            if self.nope:
                self.rotary_emb.prepare(positions)
            return torch.ops.fused.rope(positions, q)

    def test_layers_without_rotation(self) -> None:
        assert is_rotated(self.Attention(v1=True))
        assert is_rotated(self.Attention(sliding_window=16))
        assert not is_rotated(self.Attention())
        assert not is_rotated(self.Attention(v1=False, nope=True))
        assert is_rotated(self.Otherwise())
        assert is_rotated(self.Otherwise(not_there=False))
        assert not is_rotated(self.Otherwise(nope=True))
        assert is_rotated(self.Fused())

    def test_a_layer_without_its_source_is_refused(self) -> None:
        kind = type("Made", (nn.Module,), {"forward": eval("lambda self: self.rotary_emb()")})
        with pytest.raises(ValueError, match="no source of"):
            is_rotated(kind())


class TestMetrics:
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(metrics.FOLDER, str(tmp_path))

    def test_a_worker_counts_and_others_read(self) -> None:
        worker = metrics.WorkerCounters.create(1, 2, (8, 2), layers=3, num_slots=4)
        worker.counters[1, 0] = torch.tensor([10, 20, 5, 40, 300, 1000, 70, 9])
        (read,) = metrics.WorkerCounters.read_all()
        assert (read.engine, read.rank) == (1, 2)
        assert read.stats().steps == 10
        assert read.stats().hit_rate == 0.5
        assert read.stats().kv_read_share == 0.3

    def test_ranks_are_added_up(self) -> None:
        pytest.importorskip("prometheus_client")
        for rank, hits in enumerate((8, 4)):
            worker = metrics.WorkerCounters.create(0, rank, (4, 1), layers=1, num_slots=1)
            worker.counters[0, 0] = torch.tensor([3, 3, hits // 4, hits, 60, 100, 8, 2])
            worker.turned_away.fill_(7)  # the same requests on both
        samples = {
            sample.name: sample.value
            for metric in metrics.Collector().collect()
            for sample in metric.samples
        }
        assert samples["mac_attn:query_heads_total"] == 24
        assert samples["mac_attn:requests_turned_away_total"] == 7
        assert samples["mac_attn:hit_rate"] == 0.5
        assert samples["mac_attn:kv_read_share"] == 0.6

    @staticmethod
    def elsewhere(*arguments: int) -> subprocess.Popen[str]:
        """Another process that has counters of its own, until its input is closed."""
        code = """
import sys
from mac_attn.integrations.vllm.metrics import WorkerCounters
engine, rank, layers, steps = map(int, sys.argv[1:])
worker = WorkerCounters.create(engine, rank, (4, 1), layers, num_slots=1)
worker.counters[:, 0, 0] = steps
worker.turned_away.fill_(steps)
print(flush=True)
sys.stdin.read()
"""
        command = [sys.executable, "-c", code, *map(str, arguments)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, **pipes)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    def test_a_second_engine_has_counters_of_its_own(self) -> None:
        """Of the same index and rank, and of fewer layers: the first one counts on."""

        def steps() -> list[int]:
            return sorted(worker.stats().steps for worker in metrics.WorkerCounters.read_all())

        worker = metrics.WorkerCounters.create(0, 0, (32, 8), layers=32, num_slots=64)
        with self.elsewhere(0, 0, 2, 3) as other:
            worker.counters.fill_(1)  # a bus error once, where the other had cut the file short
            assert steps() == [2 * 3, 32 * 64]
        other.wait()
        assert steps() == [32 * 64]

    def test_engines_of_the_same_index_are_added_up(self) -> None:
        pytest.importorskip("prometheus_client")
        worker = metrics.WorkerCounters.create(0, 0, (4, 1), layers=1, num_slots=1)
        worker.turned_away.fill_(5)
        with self.elsewhere(0, 0, 2, 3):
            found = {metric.name: metric.samples for metric in metrics.Collector().collect()}
        (turned_away,) = found["mac_attn:requests_turned_away"]
        assert turned_away.value == 5 + 3

    def test_an_engine_made_again_in_the_same_process_starts_anew(self) -> None:
        old = metrics.WorkerCounters.create(0, 0, (32, 8), layers=32, num_slots=64)
        new = metrics.WorkerCounters.create(0, 0, (4, 1), layers=1, num_slots=1)
        old.counters.fill_(1)
        new.counters.fill_(2)
        (read,) = metrics.WorkerCounters.read_all()
        assert read.stats().steps == 2

    def test_an_engine_outlives_who_made_the_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As one that a process leaves behind, which then starts another."""
        monkeypatch.setenv(metrics.FOLDER, str(tmp_path / "removed"))
        assert metrics.WorkerCounters.read_all() == []
        metrics.WorkerCounters.create(0, 0, (4, 1), layers=1, num_slots=1)
        assert len(metrics.WorkerCounters.read_all()) == 1
