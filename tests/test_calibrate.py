"""mac_attn.calibrate: captures, replays, the choice of thresholds, its file."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from all_models import tiny_causal_model
from tiny_models import prompts, tiny_model

import mac_attn
from mac_attn import ReuseConfig
from mac_attn.calibrate import (
    Calibration,
    Capture,
    Replayed,
    Replayer,
    calibrate,
    calibrate_capture,
    capture,
    choose,
)
from mac_attn.calibrate.capture import _exact
from mac_attn.integrations.transformers import MacCache

CPU = torch.device("cpu")
CONFIG = ReuseConfig(
    entries=16, window=16, band=8, anchors=4, threshold=0.9, max_drift=None, min_context=20
)
STEPS, SEEDED, LENGTH = 24, 16, 72


@pytest.fixture(scope="module")
def captured() -> Capture:
    torch.manual_seed(0)
    return capture(tiny_model(CPU), prompts(CPU, 1, LENGTH), steps=STEPS, seeded=SEEDED)


def test_capture_is_what_attention_saw(captured: Capture) -> None:
    assert captured.q.shape == captured.q_match.shape == (2, STEPS + SEEDED, 4, 16)
    assert captured.k.shape == captured.v.shape == (2, LENGTH, 2, 16)
    assert captured.exact.shape == (2, STEPS, 4, 16)
    # Plain causal attention of the last queries, in double.
    q = captured.q[:, -STEPS:].double().transpose(1, 2)
    k, v = (t.double().transpose(1, 2).repeat_interleave(2, 1) for t in (captured.k, captured.v))
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[-STEPS:]
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=captured.sm_scale
    )
    # float32 against float64, over values around 1.
    torch.testing.assert_close(captured.exact.double(), out.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_capture_survives_its_file(captured: Capture, tmp_path: Path) -> None:
    captured.save(tmp_path / "c.pt")
    loaded = Capture.load(tmp_path / "c.pt")
    assert torch.equal(loaded.q_match, captured.q_match) and loaded.sm_scale == captured.sm_scale


@pytest.mark.parametrize("granularity", ["group", "head"])
def test_replay_is_decode(captured: Capture, granularity: str) -> None:
    anchors = 4 if granularity == "group" else 0
    config = replace(CONFIG, granularity=granularity, anchors=anchors, threshold=1.1)
    replayed = Replayer(captured)(config)
    assert 0.1 < replayed.hit_rate < 0.95
    check_is_decode(replayed, captured, config)


def check_is_decode(replayed: Replayed, captured: Capture, config: ReuseConfig) -> None:
    seeded, begin = captured.q.shape[1] - captured.steps, captured.num_tokens - captured.steps
    for layer in range(captured.num_layers):
        reuse = mac_attn.ReuseCache(
            config,
            num_slots=1,
            num_qo_heads=captured.num_qo_heads,
            num_kv_heads=captured.num_kv_heads,
            head_dim=captured.head_dim,
            dtype=torch.float32,
        )
        kv, table = mac_attn.dense_as_pages(
            captured.k[layer : layer + 1], captured.v[layer : layer + 1]
        )
        slot = torch.zeros(1, dtype=torch.int32)
        lens = torch.tensor([begin], dtype=torch.int32)
        options = {"slots": slot, "sm_scale": captured.sm_scale}
        queries = captured.q[layer : layer + 1], captured.q_match[layer : layer + 1]
        mac_attn.seed(
            reuse,
            queries[0][:, :seeded],
            kv,
            table,
            lens,
            q_match=queries[1][:, :seeded],
            **options,
        )
        errors = []
        for step in range(captured.steps):
            q, q_match = (t[:, seeded + step] for t in queries)
            out = mac_attn.decode(
                q, kv, table, lens + step + 1, reuse=reuse, q_match=q_match, **options
            )
            exact = captured.exact[layer, step]
            errors.append((out[0] - exact).norm(dim=-1) / exact.norm(dim=-1))
        # The same ops in another batch: partial sums may be cut elsewhere.
        torch.testing.assert_close(
            replayed.error[:, layer], torch.stack(errors), rtol=1e-3, atol=1e-5
        )
        stats = reuse.stats()
        assert stats.query_head_hits == int((replayed.source[:, layer] >= 0).sum())
        assert stats.kv_tokens_read == int(replayed.tokens[:, layer].sum())
        full = stats.kv_head_steps - stats.kv_head_hits
        assert full == int(replayed.full_reads()[:, layer].sum())


def test_replay_measures_the_spread_of_keys_anew() -> None:
    """At 1,024 tokens; a spread that is not known makes the threshold a cautious one."""
    torch.manual_seed(0)
    length, steps, seeded, dim = 1032, 16, 16, 64
    q = torch.randn(1, 1, 4, dim) + 0.55 * torch.randn(1, steps + seeded, 4, dim)
    k, v = 0.5 * torch.randn(1, length, 2, dim), torch.randn(1, length, 2, dim)
    exact = _exact(q[:, seeded:], k, v, dim**-0.5)
    captured = Capture((0,), 1, q, q, k, v, exact, dim**-0.5)
    config = ReuseConfig(threshold=0.65, anchors=16, min_context=512)
    replayed = Replayer(captured)(config)
    assert (replayed.source[-4:] >= 0).any()
    check_is_decode(replayed, captured, config)


def test_replay_with_a_config_for_each_layer(captured: Capture) -> None:
    replayer = Replayer(captured)
    strict, loose = replace(CONFIG, threshold=0.9), replace(CONFIG, threshold=1.4)
    mixed = replayer([loose, strict])
    assert torch.equal(mixed.source[:, 0], replayer(loose).source[:, 0])
    assert torch.equal(mixed.source[:, 1], replayer(strict).source[:, 1])
    torch.testing.assert_close(
        mixed.error[:, 1], replayer(strict).error[:, 1], rtol=1e-3, atol=1e-5
    )
    with pytest.raises(ValueError, match="must have 1 or 2"):
        replayer([loose])


def test_choose_finds_the_cheapest() -> None:
    torch.manual_seed(1)
    # More error for fewer reads, by convex curves, so that the hull holds every choice.
    reads = torch.tensor([1.0, 0.7, 0.45, 0.3]).double()
    slope = 0.02 + torch.rand(1, 1, 2, 2).double() * 0.3
    error = (slope * (1 - reads)[None, :, None, None] ** 2).expand(1, 4, 2, 2)
    read = reads[None, :, None, None].expand_as(error)
    target = float(error[:, -1].mean()) / 2
    anchors, thresholds = choose(error, read, target)
    assert anchors == [0, 0]

    def total(choice: tuple[int, ...], table: torch.Tensor) -> float:
        return sum(float(table[0, c, i // 2, i % 2]) for i, c in enumerate(choice)) / 4

    found = tuple(i for layer in thresholds for i in layer)
    assert total(found, error) <= target
    best = min(
        total(choice, read)
        for choice in itertools.product(range(4), repeat=4)
        if total(choice, error) <= target
    )
    # Choices on the hull are apart by at most one step of one head: 0.3 of the reads, a quarter.
    assert total(found, read) <= best + 0.3 / 4


@pytest.mark.parametrize("target", [0.05, 0.2])
def test_calibration_meets_its_target(captured: Capture, target: float) -> None:
    thresholds, anchors = (0.0, 0.7, 0.9, 1.1, 1.3, 1.6), (2, 6)
    found = calibrate_capture(
        captured, target_error=target, base=CONFIG, thresholds=thresholds, anchors=anchors
    )
    assert found.error <= target * 1.001  # replayed in parts, so rounded elsewhere
    # No worse than the best single threshold that meets the target.
    replayer = Replayer(captured)
    runs = [replayer(replace(CONFIG, threshold=t, anchors=a)) for t in thresholds for a in anchors]
    uniform = min(run.kv_read_share for run in runs if run.mean_error <= target)
    assert found.kv_read_share <= uniform + 0.02
    assert target < 0.1 or len({config.threshold for config in found.configs}) > 1


def test_calibrate_a_model_and_use_it(tmp_path: Path) -> None:
    model, ids = tiny_model(CPU), prompts(CPU, 1, LENGTH)
    found = calibrate(
        model,
        ids,
        target_error=0.2,
        base=CONFIG,
        thresholds=(0, 0.9, 1.2),
        anchors=(4,),
        steps=STEPS,
    )
    path = tmp_path / "calibration.json"
    found.save(path)
    loaded = Calibration.load(path)
    assert loaded == found
    assert ReuseConfig.from_calibration(path, 1) == found.configs[1]
    assert ReuseConfig.from_calibration(found, 0) == found.configs[0]
    cache = MacCache(model, max_length=LENGTH + 8, config=loaded.configs)
    model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert [layer.reuse.cfg for layer in cache.layers] == list(found.configs)
    assert cache.stats().steps == 2 * 7
    with pytest.raises(
        ValueError, match="config has 3 entries, must be one for all layers or a list of 2"
    ):
        MacCache(model, max_length=8, config=loaded.configs[:1] * 3)
    with pytest.raises(ValueError, match="layer is 2, must be from 0 to 1"):
        ReuseConfig.from_calibration(found, 2)


def test_heads_without_an_output() -> None:
    """A pruned KV head: what is exactly 0 has no error."""
    model = tiny_model(CPU)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[:16] = 0
    options = {"thresholds": (0, 0.9, 1.2), "anchors": (4,), "steps": STEPS}
    found = calibrate(model, prompts(CPU, 1, LENGTH), target_error=0.05, base=CONFIG, **options)
    assert 0 < found.error <= 0.05 * 1.001
    assert found.configs[0].threshold[:2] == (1.2, 1.2)  # there nothing can go wrong


def test_a_capture_that_is_not_finite_is_refused(captured: Capture) -> None:
    k = captured.k.clone()
    k[1, 3, 0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"captured has errors that are not finite in layers \[1\]"
    ):
        calibrate_capture(replace(captured, k=k), base=CONFIG, thresholds=(0, 0.9), anchors=(4,))


def test_refusals(captured: Capture, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="target_error is 0.001, must be at least"):
        calibrate_capture(
            captured, target_error=0.001, base=CONFIG, thresholds=(0.9, 1.2), anchors=(4,)
        )
    with pytest.raises(ValueError, match="must have 'group' and 'relative'"):
        calibrate_capture(captured, base=ReuseConfig.paper())
    with pytest.raises(ValueError, match="at least min_context"):
        calibrate(tiny_model(CPU), prompts(CPU, 1, 40))
    with pytest.raises(ValueError, match="more than steps"):
        capture(tiny_model(CPU), prompts(CPU, 1, 40), steps=30, seeded=10)
    path = tmp_path / "other.json"
    for content in ("{", "{}", json.dumps({"format": "another"})):
        path.write_text(content)
        with pytest.raises(ValueError, match="is not a calibration"):
            Calibration.load(path)
    path.write_text(json.dumps({"format": "mac_attn calibration 1", "layers": []}))
    with pytest.raises(ValueError, match="an earlier version made it"):
        Calibration.load(path)


MIXED = {  # the layers that reuse, of models whose layers differ
    "smollm3": (0, 1),
    "cohere2": (1,),
    "gemma3_text": (1,),
    "gemma3n_text": (1, 3),
    "gemma4_text": (1, 3),
    "gpt_neox": (0, 1),
    "llama4_text": (1,),
}


@pytest.mark.parametrize("name", MIXED)
def test_layers_that_differ(name: str) -> None:
    """A capture holds what the rings of a MacCache hold, of each layer by its own rotation."""
    model = tiny_causal_model(name, **{"no_rope_layers": [1, 0]} if name == "smollm3" else {})
    ids = prompts(CPU, 1, LENGTH)
    captured = capture(model, ids, steps=STEPS, seeded=SEEDED)
    assert captured.layer_index == MIXED[name]
    assert captured.num_model_layers == model.config.num_hidden_layers
    model.set_attn_implementation("mac")
    cache = MacCache(model, max_length=LENGTH, config=replace(CONFIG, anchors=0))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for layer, number in enumerate(captured.layer_index):
        rings = cache.layers[number].rings
        assert rings.keeper is not None
        keys = cache.layers[rings.keeper].keys
        assert keys is not None
        torch.testing.assert_close(captured.k[layer], keys[0].transpose(0, 1))
        assert rings.reuse is not None
        order = rings.reuse.ring_position[0, 0].argsort()
        queries = rings.reuse.ring_query[0][:, order].transpose(0, 1).flatten(1, 2)
        torch.testing.assert_close(captured.q_match[layer, -16:], queries, rtol=1e-4, atol=1e-4)


def test_calibrate_a_model_whose_layers_differ() -> None:
    model, ids = tiny_causal_model("gemma3n_text"), prompts(CPU, 1, LENGTH)
    options = {"thresholds": (0, 1.2), "anchors": (4,), "steps": STEPS}
    found = calibrate(model, ids, target_error=0.3, base=CONFIG, **options)
    assert [found.configs[0], found.configs[2]] == [CONFIG] * 2  # they never reuse
    model.set_attn_implementation("mac")
    cache = MacCache(model, max_length=LENGTH, config=found.configs)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert [layer.reuse and layer.reuse.cfg for layer in cache.layers] == [
        config if number in (1, 3) else None for number, config in enumerate(found.configs)
    ]


def test_layers_of_different_heads_are_refused() -> None:
    model = tiny_model(CPU)
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = 4
    attention = type(model.model.layers[1].self_attn)(config, layer_idx=1)
    model.model.layers[1].self_attn = attention
    ids = prompts(CPU, 1, LENGTH)
    with pytest.raises(ValueError, match=r"reuse, \[0, 1\], and called attention in \[0\]"):
        capture(model, ids, steps=STEPS, seeded=SEEDED)  # `config` does not follow the model's
    attention.config = model.config
    with pytest.raises(ValueError, match=r"different .*\[\(4, 2, 16, 16\), \(4, 4, 16, 16\)\]"):
        capture(model, ids, steps=STEPS, seeded=SEEDED)


def test_a_capture_of_another_version_is_refused(tmp_path: Path) -> None:
    torch.save({"q": torch.ones(1)}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="no capture of this version"):
        Capture.load(tmp_path / "c.pt")


def test_sinks_are_refused() -> None:
    model = tiny_causal_model("flint")
    with pytest.raises(ValueError, match="model has attention sinks"):
        capture(model, prompts(CPU, 1, LENGTH), steps=STEPS, seeded=SEEDED)
