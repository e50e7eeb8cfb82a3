"""MiMo-V2 in transformers, whose values are shorter than its keys, with a MacCache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from all_models import tiny_causal_model  # noqa: E402
from tiny_models import (  # noqa: E402
    ALWAYS,
    NEVER,
    ROUNDING,
    SMALL,
    assert_same,
    generate,
    left_padded,
    prompts,
    run,
)

from mac_attn import ReuseConfig  # noqa: E402
from mac_attn.calibrate import Replayer, capture  # noqa: E402
from mac_attn.integrations.transformers import MacCache  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_grad")

CPU = torch.device("cpu")
PARTS = (20, 40)  # of the prompts


def tiny_mimo(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Any:
    """A full layer of two KV heads, one of four with a window of 16 and sinks; keys of 24."""
    if "mimo_v2_flash" not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no MiMo-V2")
    model = tiny_causal_model("mimo_v2_flash", head_dim=24, v_head_dim=16).to(device, dtype)
    model.set_attn_implementation("mac")
    return model


@pytest.mark.parametrize("config", [None, NEVER], ids=["exact", "zero-threshold"])
def test_generates_what_its_own_cache_does(config: ReuseConfig | None) -> None:
    model, ids = tiny_mimo(), prompts(CPU)
    cache = MacCache(model, max_length=80, config=config)
    assert_same(generate(model, ids, cache), generate(model, ids))
    full = cache.layers[0]
    assert full.key_store.shape[2:] == (2, 24) and full.value_store.shape[2:] == (2, 16)


@pytest.mark.parametrize("mode", ["reuse", "exact", "sdpa", "packed-sdpa"])
def test_left_padding_and_modes(mode: Any) -> None:
    model = tiny_mimo()
    ids, mask = left_padded(prompts(CPU, 2, 60), [0, 11])
    model.set_attn_implementation("eager")
    own = transformers.DynamicCache(config=model.config)
    want = run(model, ids, own, PARTS, attention_mask=mask)
    model.set_attn_implementation("mac")
    cache = MacCache(model, max_length=64, config=NEVER)
    cache.mode = mode
    got = run(model, ids, cache, PARTS, attention_mask=mask)
    torch.testing.assert_close(got[0], want[0], **ROUNDING)
    torch.testing.assert_close(got[1, 11:], want[1, 11:], **ROUNDING)


def test_hits_on_queries_that_repeat() -> None:
    """In the full layer, whose rings have the size of its values; a hit is an approximation."""
    model = tiny_mimo()
    cache = MacCache(model, max_length=64, config=ReuseConfig(**SMALL, threshold=1e-3))
    run(model, torch.full((1, 56), 7), cache, PARTS)
    assert [stats and stats.hit_rate for stats in cache.layer_stats()] == [1.0, None]
    reuse = cache.layers[0].reuse
    assert reuse is not None and (reuse.head_dim, reuse.head_dim_v) == (24, 16)
    ids = prompts(CPU, 1, 60)
    always, never = (MacCache(model, max_length=64, config=config) for config in (ALWAYS, NEVER))
    got, want = run(model, ids, always, PARTS), run(model, ids, never, PARTS)
    assert always.stats().hit_rate == 1 and got.isfinite().all()
    assert (got - want).abs().max() > 0.01


def test_beam_search_and_float8() -> None:
    """Requests change places, so slots do; and the numbers of a float8 store are as many."""
    model, ids = tiny_mimo(), prompts(CPU)
    beams = {"num_beams": 3, "max_new_tokens": 12, "min_new_tokens": 12}
    cache = MacCache(model, max_length=80, batch_size=6, config=NEVER)
    got, want = generate(model, ids, cache, **beams), generate(model, ids, **beams)
    assert torch.equal(got.sequences, want.sequences)
    ids = prompts(CPU, 1, 60)
    wide, narrow = (
        MacCache(model, max_length=64, config=NEVER, kv_dtype=kind)
        for kind in (None, torch.float8_e4m3fn)
    )
    got, want = run(model, ids, narrow, PARTS), run(model, ids, wide, PARTS)
    assert (got - want).norm() < 0.2 * want.norm() and not torch.equal(got, want)


def test_calibrates_its_full_layers() -> None:
    model, ids = tiny_mimo(), prompts(CPU, 1, 72)
    captured = capture(model, ids, steps=24, seeded=16)
    assert captured.layer_index == (0,) and captured.num_model_layers == 2
    assert captured.k.shape == (1, 72, 2, 24) and captured.v.shape == (1, 72, 2, 16)
    assert captured.exact.shape == (1, 24, 4, 16)
    never, always = (Replayer(captured)(config) for config in (NEVER, ALWAYS))
    assert never.hit_rate == 0 and always.hit_rate == 1
    assert never.error.max() < 1e-5 < always.error.mean()  # sums of float32 in another order
