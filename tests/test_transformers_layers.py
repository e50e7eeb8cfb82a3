"""Models whose layers differ: each is served by its own rotation, heads, window and keys."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from all_models import tiny_causal_model  # noqa: E402
from tiny_models import (  # noqa: E402
    ALWAYS,
    NEVER,
    NEW,
    SMALL,
    Model,
    assert_same,
    generate,
    left_padded,
    prompts,
    run,
)

from mac_attn import ReuseConfig  # noqa: E402
from mac_attn.integrations.transformers import MacCache  # noqa: E402
from mac_attn.integrations.transformers.kinds import layer_kinds  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_grad")

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Turn:
    """A layer that rotates `dim` dimensions by theta ** (-2i / base)."""

    theta: float
    dim: int = 16
    interleaved: bool = False
    base: int = 16
    slower: float = 1.0  # all frequencies, by this factor
    turning: int | None = None  # pairs that turn; the frequencies of the others are 0

    def frequencies(self) -> Tensor:
        i = torch.arange(self.dim // 2)
        turning = self.dim // 2 if self.turning is None else self.turning
        return (self.theta ** (-2 * i / self.base) / self.slower).where(i < turning, 0.0)


LOCAL, STILL = "local", "does not rotate"
Layers = list[Turn | str]
TWICE = ["sliding_attention", "full_attention"] * 2


def theta(value: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": value} | more


# Options of the config, and what each layer then does.
MODELS: dict[str, tuple[str, dict[str, Any], Layers]] = {
    "SmolLM3": (
        "smollm3",
        {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0], "rope_parameters": theta(2e6)},
        [Turn(2e6), STILL] * 2,
    ),
    "Llama 4": (
        "llama4_text",
        # Queries of layers that do not rotate grow at every 20th position, behind the probe's.
        {
            "num_hidden_layers": 4,
            "layer_types": ["chunked_attention", "full_attention"] * 2,
            "no_rope_layers": [1, 0, 1, 0],
            "attention_chunk_size": 16,
            "floor_scale": 20,
            "attn_scale": 0.1,
        },
        [LOCAL, STILL] * 2,
    ),
    "Llama 4, all of whose layers are full": (
        "llama4_text",
        {
            "layer_types": ["full_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "rope_parameters": theta(5e5),
        },
        [Turn(5e5, interleaved=True), STILL],
    ),
    "Cohere 2": ("cohere2", {"num_hidden_layers": 4, "layer_types": TWICE}, [LOCAL, STILL] * 2),
    "EXAONE 4": ("exaone4", {"num_hidden_layers": 4, "layer_types": TWICE}, [LOCAL, STILL] * 2),
    "EXAONE 4 without windows": (
        "exaone4",
        {
            "sliding_window": None,
            "layer_types": ["full_attention"] * 2,
            "rope_parameters": theta(1e6),
        },
        [Turn(1e6)] * 2,
    ),
    "Gemma 3": (
        "gemma3_text",
        {
            "num_hidden_layers": 4,
            "layer_types": TWICE,
            "rope_parameters": {
                "sliding_attention": theta(1e4),
                "full_attention": theta(1e6) | {"rope_type": "linear", "factor": 8.0},
            },
        },
        [LOCAL, Turn(1e6, slower=8.0)] * 2,
    ),
    # Its last two layers attend to the keys of the first two.
    "Gemma 3n": ("gemma3n_text", {}, [LOCAL, Turn(1e6)] * 2),
    # Full layers have heads of 32 instead of 16, one KV head instead of 2, and turn a quarter.
    "Gemma 4": (
        "gemma4_text",
        {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 2,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "rope_parameters": {
                "sliding_attention": theta(1e4),
                "full_attention": theta(1e6)
                | {"rope_type": "proportional", "partial_rotary_factor": 0.25},
            },
        },
        [LOCAL, Turn(1e6, dim=32, base=32, turning=4)] * 3,
    ),
    "gpt-oss": (
        "gpt_oss",
        {"num_hidden_layers": 4, "layer_types": TWICE, "rope_parameters": theta(150000.0)},
        [LOCAL, Turn(150000.0)] * 2,
    ),
    "GPT-NeoX": (
        "gpt_neox",
        {"rope_parameters": theta(1e4, partial_rotary_factor=0.25)},
        [Turn(1e4, dim=4, base=4)] * 2,
    ),
}


@pytest.fixture(params=MODELS)
def served(request: pytest.FixtureRequest) -> tuple[Model, Layers]:
    name, options, layers = MODELS[request.param]
    torch.manual_seed(0)
    model = tiny_causal_model(name, **options)
    model.set_attn_implementation("mac")
    return model, layers


def test_each_layer_rotates_in_its_own_way(served: tuple[Model, Layers]) -> None:
    model, layers = served
    cache = MacCache(model, max_length=64)
    for layer, expected in zip(cache.layers, layers, strict=True):
        assert (layer.rings.config is None) == (expected == LOCAL)
        if isinstance(expected, str):
            assert layer.rings.rotary is None
        else:
            assert layer.rings.rotary is not None
            assert layer.rings.rotary.interleaved == expected.interleaved
            torch.testing.assert_close(layer.rings.rotary.inv_freq, expected.frequencies())


@pytest.mark.parametrize("config", [None, NEVER], ids=["exact", "zero-threshold"])
def test_generates_what_its_own_cache_generates(
    served: tuple[Model, Layers], config: ReuseConfig | None
) -> None:
    model, layers = served
    model.generation_config.eos_token_id = None
    rows = prompts(CPU, 2, 44)
    for padding in ([0, 0], [0, 9]):
        ids, mask = left_padded(rows, padding)
        cache = MacCache(model, max_length=80, config=config)
        assert_same(
            generate(model, ids, cache, attention_mask=mask),
            generate(model, ids, attention_mask=mask),
        )
        if config is not None:
            stats = cache.stats()
            assert stats.hit_rate == 0 and stats.kv_read_share == 1
            assert stats.steps >= 2 * (NEW - 1) * sum(layer != LOCAL for layer in layers)


def test_every_full_layer_hits_on_queries_that_repeat(served: tuple[Model, Layers]) -> None:
    model, layers = served
    # Alike, not equal: what a layer before has attended to changes with the position.
    cache = MacCache(model, max_length=64, config=ReuseConfig(**SMALL, threshold=0.3))
    run(model, torch.full((1, 56), 7), cache)
    rates = [stats and stats.hit_rate for stats in cache.layer_stats()]
    assert rates == [None if layer == LOCAL else 1.0 for layer in layers]


def test_layers_that_share_keys_have_rings_of_their_own() -> None:
    """Also where tokens are forgotten, requests move, or the batch changes."""
    torch.manual_seed(0)
    model = tiny_causal_model("gemma3n_text")
    model.generation_config.eos_token_id = None
    model.set_attn_implementation("mac")
    ids = prompts(CPU)
    cache = MacCache(model, max_length=80, config=NEVER)
    want = generate(model, ids, num_beams=3).sequences
    assert torch.equal(generate(model, ids, cache, num_beams=3).sequences, want)
    assert cache.get_seq_length(3) == cache.get_seq_length()
    writer, reader = cache.layers[1].reuse, cache.layers[3].reuse
    assert writer is not None and reader is not None
    assert torch.equal(writer.slot_end, reader.slot_end)
    assert (writer.ring_position == reader.ring_position).any()
    assert not torch.equal(writer.ring_query, reader.ring_query)

    cache.crop(-3)
    assert torch.equal(writer.slot_end, reader.slot_end)
    cache.batch_select_indices(torch.tensor([4, 0]))
    writer, reader = cache.layers[1].reuse, cache.layers[3].reuse
    assert writer is not None and reader is not None
    assert writer.num_slots == reader.num_slots == 2
    assert torch.equal(writer.slot_end, reader.slot_end) and (reader.slot_end > 40).all()
    cache = copy.deepcopy(cache)
    assert cache.layers[3].rings.keeper == 1
    cache.layers[1].keys[:, :, 5] += 1  # an edit: nothing may be reused
    model(prompts(CPU, 2, 1), past_key_values=cache)
    rings = cache.layers[3].reuse
    assert rings is not None and (rings.ring_stored <= 1).all()
    cache.reset()
    assert (rings.ring_stored == 0).all()


@pytest.fixture
def no_gc() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_gc")
def test_a_dropped_cache_is_freed_at_once() -> None:
    """Nothing of it refers back to it: its memory does not wait for Python to look for cycles."""
    model = tiny_causal_model("gemma3n_text")  # some layers attend to the keys of others
    model.set_attn_implementation("mac")
    cache = MacCache(model, max_length=80, config=NEVER)
    generate(model, prompts(CPU), cache)
    twin = copy.deepcopy(cache)
    model(prompts(CPU, 2, 1), past_key_values=twin)
    parts = [weakref.ref(cache), weakref.ref(twin)]
    parts += [weakref.ref(x) for c in (cache, twin) for x in (*c.layers, c.layers[1].key_store)]
    del cache, twin
    assert not [part() for part in parts if part() is not None]


def test_hits_change_something(served: tuple[Model, Layers]) -> None:
    model, layers = served
    ids = prompts(CPU, 2, 60)
    logits = []
    for config in (ALWAYS, None):
        cache = MacCache(model, max_length=64, config=config)
        logits.append(run(model, ids, cache))
        if config is not None:
            assert cache.stats().hit_rate == 1
            reusing = [stats for stats in cache.layer_stats() if stats is not None]
            assert len(reusing) == sum(layer != LOCAL for layer in layers)
    assert logits[0].isfinite().all()
    assert (logits[0] - logits[1]).abs().max() > 0.01


def test_the_window_of_each_layer_is_its_own() -> None:
    config = transformers.MistralConfig(num_hidden_layers=3, sliding_window=None)
    if not hasattr(config, "per_layer_config"):
        pytest.skip("layers cannot have options of their own in this release of transformers")
    config.per_layer_config = {0: {"sliding_window": 8}, 2: {"sliding_window": 16}}
    assert layer_kinds(config) == [("local", 8), ("full", None), ("local", 16)]
