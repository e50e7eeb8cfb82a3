"""MacCache with a float8 KV store, beside transformers' own cache with keys and values rounded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from all_models import tiny_causal_model  # noqa: E402
from tiny_models import (  # noqa: E402
    ALWAYS,
    NEVER,
    ROUNDING,
    SAMPLED,
    Model,
    assert_same,
    generate,
    left_padded,
    next_logits,
    prompts,
    run,
    tiny_model,
)

from mac_attn import ReuseConfig  # noqa: E402
from mac_attn.integrations.transformers import MacCache  # noqa: E402

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.float32]

FLOAT8 = torch.float8_e4m3fn


class RoundedCache(transformers.DynamicCache):
    """Keys and values rounded as a float8 cache rounds them, in the model's dtype.

    Of KV head h the largest number of the first tokens counts 28 units, as 448 is 16 times that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.units: dict[tuple[int, int], Tensor] = {}

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        rounded = []
        for i, x in enumerate((keys, values)):
            largest = x.abs().amax(dim=(0, 2, 3)).view(-1, 1, 1)
            unit = self.units.setdefault((layer_idx, i), largest.float() / 28)
            # Floats of 4 significant bits, and multiples of 2^-9 below 2^-6.
            numbers = (x.double() / unit).clamp(-448, 448)
            step = torch.exp2(numbers.abs().clamp(min=2**-6).log2().floor() - 3)
            rounded.append(((numbers / step).round() * step * unit).to(x.dtype))
        return super().update(*rounded, layer_idx, *args, **kwargs)


# A rounding error of the model's own may move a number of the cache to the next float8 one, which
# is 6% away: most logits agree as well as with other caches, and all in the main.
def assert_close(got: Tensor, want: Tensor) -> None:
    error = (got - want).abs()
    assert (error <= ROUNDING["atol"]).float().mean() > 0.98, error
    assert error.max() < 0.05, error.max()


def close_to_rounded(model: Model, cache: MacCache, ids: Tensor) -> None:
    got = run(model, ids, cache)
    model.set_attn_implementation("sdpa")
    want = run(model, ids, RoundedCache())
    exact = run(model, ids, transformers.DynamicCache())
    model.set_attn_implementation("mac")
    assert_close(got, want)
    assert (got - exact).abs().max() > 0.05  # float8 shows: the comparison is one


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("config", [None, NEVER], ids=["exact", "zero-threshold"])
def test_equals_a_cache_that_rounds(
    family: str, config: ReuseConfig | None, device: torch.device
) -> None:
    model = tiny_model(device, family)
    cache = MacCache(model, max_length=64, config=config, kv_dtype=FLOAT8)
    close_to_rounded(model, cache, prompts(device, 2, 56))
    layer = cache.layers[0]
    assert layer.key_store.dtype == layer.value_store.dtype == FLOAT8 == layer.keys.dtype
    assert [len(layer.scales.k), len(layer.scales.v)] == [2, 2]
    assert "float8" in repr(cache) and "float8" in repr(layer)


def test_layers_with_a_window_keep_the_models_dtype() -> None:
    model = tiny_causal_model("gemma3_text")
    model.set_attn_implementation("mac")
    cache = MacCache(model, max_length=64, config=NEVER, kv_dtype=FLOAT8)
    ids = prompts(torch.device("cpu"), 1, 56)
    run(model, ids, cache)
    kinds = {layer.kind: layer.key_store.dtype for layer in cache.layers}
    assert kinds == {"full": FLOAT8, "local": torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [ALWAYS, SAMPLED], ids=["hits", "samples"])
def test_reuses(dtype: torch.dtype, config: ReuseConfig, device: torch.device) -> None:
    model = tiny_model(device, dtype=dtype)
    cache = MacCache(model, max_length=512, config=config, kv_dtype=FLOAT8)
    ids = prompts(device, 1, 60).repeat(1, 4)
    generate(model, ids, cache, max_new_tokens=40, min_new_tokens=40)
    assert cache.stats().hit_rate > 0.5 and cache.stats().kv_read_share < 0.9


def test_modes_agree(device: torch.device) -> None:
    model, ids = tiny_model(device), prompts(device, 2, 56)
    answers = []
    for mode in ("exact", "sdpa", "packed-sdpa"):
        cache = MacCache(model, max_length=64, config=NEVER, kv_dtype=FLOAT8)
        cache.mode = mode
        answers.append(run(model, ids, cache))
    assert_close(answers[1], answers[0])
    assert_close(answers[2], answers[0])


def test_padding_beams_and_another_batch(device: torch.device) -> None:
    model = tiny_model(device)
    cache = MacCache(model, max_length=96, config=NEVER, kv_dtype=FLOAT8)
    plain = MacCache(model, max_length=96, config=None, kv_dtype=FLOAT8)
    ids, mask = left_padded(prompts(device), [0, 9])
    scales = []
    for _ in range(2):  # after reset() the scales are those of the new batch
        got = generate(model, ids, cache, attention_mask=mask, num_beams=3)
        assert_same(got, generate(model, ids, plain, attention_mask=mask, num_beams=3))
        scales.append(copy.deepcopy(cache).layers[1].scales)
        cache.reset(), plain.reset()
        ids = prompts(device)
        mask = torch.ones_like(ids)
    assert not torch.equal(scales[0].k, scales[1].k)
    assert not torch.equal(scales[0].v, scales[1].v)


def test_chunked_prefill_and_rejected_tokens(device: torch.device) -> None:
    model, ids = tiny_model(device), prompts(device, 2, 60)
    cache = MacCache(model, max_length=64, config=NEVER, kv_dtype=FLOAT8)
    model(ids[:, :30], past_key_values=cache)
    model(ids[:, 30:50], past_key_values=cache)
    cache.crop(-10)
    got = next_logits(model, cache, ids[:, 40:])
    other = MacCache(model, max_length=64, config=NEVER, kv_dtype=FLOAT8)
    model(ids[:, :30], past_key_values=other)
    model(ids[:, 30:40], past_key_values=other)
    assert_close(got, next_logits(model, other, ids[:, 40:]))


def test_numbers_that_are_not_finite_show(device: torch.device) -> None:
    model, ids = tiny_model(device), prompts(device, 2, 48)
    cache = MacCache(model, max_length=64, config=None, kv_dtype=FLOAT8)
    model(ids[:, :40], past_key_values=cache)
    layer = cache.layers[0]
    keys = torch.randn(2, 2, 1, 16, device=device)
    values = torch.full_like(keys, torch.inf)
    layer.update(keys * 1e6, values)
    wide_keys, wide_values = layer.wide()
    scale = layer.scales.k[:, None]
    assert wide_values[:, :, -1].isnan().all() and not wide_values[:, :, :-1].isnan().any()
    torch.testing.assert_close(wide_keys[:, :, -1], keys[:, :, 0].sign() * 448 * scale)


@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.float8_e5m2, "fp8"])
def test_other_dtypes_are_refused(kv_dtype: Any) -> None:
    with pytest.raises(ValueError, match="kv_dtype is .*, must be None or torch.float8_e4m3fn"):
        MacCache(tiny_model(torch.device("cpu")), max_length=64, kv_dtype=kv_dtype)


@pytest.mark.parametrize("config", [None, NEVER], ids=["exact", "reuse"])
@pytest.mark.parametrize(("name", "what"), [("diffllama", "values"), ("jetmoe", "keys")])
def test_models_that_change_what_is_cached_are_refused(
    name: str, what: str, config: ReuseConfig | None
) -> None:
    model = tiny_causal_model(name)
    model.set_attn_implementation("mac")
    with pytest.raises(ValueError, match=f"layer 0 cannot have kv_dtype.*changes {what} between"):
        MacCache(model, max_length=64, config=config, kv_dtype=FLOAT8)


def test_keys_that_are_changed_later_are_refused() -> None:
    """By a hook that the model did not have when its cache was made."""
    model, ids = tiny_model(torch.device("cpu")), prompts(torch.device("cpu"), 1, 48)
    cache = MacCache(model, max_length=64, config=NEVER, kv_dtype=FLOAT8)
    update = MacCache.update

    class Cut(MacCache):
        def update(self, *args: Any, **kwargs: Any) -> Any:
            keys, values = update(self, *args, **kwargs)
            return keys.clone(), values.clone()

    cache.__class__ = Cut
    with pytest.raises(ValueError, match="changes keys between its cache and its attention"):
        model(ids, past_key_values=cache)
