"""A MacCache in other people's hands: what they write, save, convert, differentiate and mistype."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from tiny_models import (  # noqa: E402
    ALWAYS,
    NEVER,
    ROUNDING,
    assert_same,
    generate,
    left_padded,
    next_logits,
    prompts,
    tiny_model,
)
from transformers.cache_utils import DynamicCache  # noqa: E402

from mac_attn import RotaryEmbedding, unrotate  # noqa: E402
from mac_attn.integrations.transformers import MacCache  # noqa: E402
from mac_attn.integrations.transformers.rotation import cache_name  # noqa: E402

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.float32]

CPU = torch.device("cpu")


def filled(model: Any, ids: Tensor, config: Any = ALWAYS, **options: Any) -> MacCache:
    cache = MacCache(model, max_length=80, config=config)
    model(ids, **{cache_name(model.forward): cache}, **options)
    return cache


# Keys and values


def test_what_is_handed_out_holds_valid_tokens(device: torch.device) -> None:
    model, ids = tiny_model(device), prompts(device)
    cache = MacCache(model, max_length=80, config=None)
    assert cache.layers[0].keys is None and cache.layers[0].values is None
    model(ids, past_key_values=cache)
    plain = DynamicCache()
    model(ids, past_key_values=plain)
    cache.crop(-3)
    plain.crop(-3)
    for layer, expected in zip(cache.layers, plain.layers, strict=True):
        torch.testing.assert_close(layer.keys, expected.keys, **ROUNDING)
        torch.testing.assert_close(layer.values, expected.values, **ROUNDING)


@pytest.mark.parametrize("name", ["keys", "values"])
def test_assigning_is_refused(device: torch.device, name: str) -> None:
    cache = filled(tiny_model(device), prompts(device))
    with pytest.raises(ValueError, match=f"`{name}` of a MacCache cannot be assigned.*crop"):
        setattr(cache.layers[0], name, getattr(cache.layers[0], name)[:, :, :10])
    assert cache.layers[0].keys.shape[2] == 40


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", ["keys", "values"])
def test_writing_empties_the_rings(device: torch.device, name: str, inference: bool) -> None:
    model, ids, more = tiny_model(device), prompts(device), prompts(device, 2, 4)
    with torch.inference_mode(inference):
        cache = filled(model, ids)
        twin = copy.deepcopy(cache)
        for layer in (*cache.layers, *twin.layers):
            getattr(layer, name)[:, :, 5] += 1.0
        got = next_logits(model, cache, more[:, :1])
        assert cache.stats().hit_rate == 0  # exact, over the keys and values as they now are
        twin.mode = "sdpa"
        torch.testing.assert_close(got, next_logits(model, twin, more[:, :1]), **ROUNDING)
        next_logits(model, cache, more[:, 1:])
    assert cache.stats().hit_rate > 0


# Autocast, and changes of dtype


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("config", [None, NEVER, ALWAYS], ids=["exact", "never", "always"])
def test_under_autocast(config: Any, family: str) -> None:
    model, ids, more = tiny_model(CPU, family), prompts(CPU), prompts(CPU, 2, 6)
    whole = model(torch.cat([ids, more], dim=1)).logits[:, 40:].transpose(0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        cache = filled(model, ids, config)
        got = next_logits(model, cache, more)
        rounded = model(torch.cat([ids, more], dim=1)).logits[:, 40:].transpose(0, 1)
    assert got.isfinite().all()
    if config is ALWAYS:
        assert cache.stats().hit_rate == 1
    else:  # rounded no more than SDPA is
        assert (got - whole).norm() < 1.5 * (rounded - whole).norm()


def test_follows_a_model_that_is_converted(device: torch.device) -> None:
    """model.to(dtype) rounds the frequencies, and the queries are then turned by other angles."""
    model, ids = tiny_model(device), prompts(device)
    cache = MacCache(model, max_length=80, config=ALWAYS)
    before = cache.layers[0].rings.rotary
    model.to(torch.bfloat16)
    model(ids, past_key_values=cache)
    now = RotaryEmbedding.from_transformers(model)
    assert before is not None and not torch.equal(before.inv_freq, now.inv_freq)
    for layer in cache.layers:
        assert layer.reuse is not None and layer.reuse.rotary is not None
        assert torch.equal(layer.reuse.rotary.inv_freq, now.inv_freq)
    cache.reset()
    model.to(torch.float32)  # rounded they stay
    assert torch.equal(RotaryEmbedding.from_transformers(model).inv_freq, now.inv_freq)
    model(ids, past_key_values=cache)
    assert cache.layers[0].key_store.dtype == torch.float32


def test_frequencies_that_change_too_late_are_refused(device: torch.device) -> None:
    model, ids = tiny_model(device), prompts(device)
    cache = filled(model, ids)
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 1.5
    with pytest.raises(ValueError, match="rotary frequencies have changed.*reset"):
        model(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="rotary frequencies have changed.*reset"):
        model(ids[:, :1], past_key_values=cache)  # still
    cache.reset()
    model(ids, past_key_values=cache)
    rotary = cache.layers[1].rings.rotary
    assert rotary is not None
    assert torch.equal(rotary.inv_freq, model.model.rotary_emb.inv_freq)


def test_another_dtype_needs_a_reset(device: torch.device) -> None:
    model, ids = tiny_model(device, dtype=torch.bfloat16), prompts(device)
    cache = MacCache(model, max_length=80, config=None)
    model(ids, past_key_values=cache)
    model.to(torch.float32)
    with pytest.raises(ValueError, match=r"float32 on .* holds 40 tokens in torch.bfloat16"):
        model(ids[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == 40
    cache.reset()
    assert_same(generate(model, ids, cache), generate(model, ids))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_key_value_heads": 4}, "keys of layer 0 have 4 heads of 16.* has 2 of 16"),
        ({"head_dim": 32}, "keys of layer 0 have 2 heads of 32.* has 2 of 16"),
        ({"num_hidden_layers": 3}, "layer 2 has keys and values, but not in the model"),
    ],
)
def test_a_model_of_another_size_is_refused(options: dict[str, Any], reason: str) -> None:
    ids = prompts(CPU)
    cache = filled(tiny_model(CPU), ids)
    cache.reset()
    config = copy.deepcopy(tiny_model(CPU).config)
    for name, value in options.items():
        setattr(config, name, value)
    config.layer_types = None
    other = transformers.LlamaForCausalLM(config).eval()
    with pytest.raises(ValueError, match=reason):
        other(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0


# The usual 8 are reached, too: transformers' decorators are compiled anew for each function.
@torch._dynamo.config.patch(recompile_limit=2)
def test_a_wrapped_model() -> None:
    """As torch.compile, PEFT and others leave it."""
    model, ids = tiny_model(CPU), prompts(CPU)
    compiled = torch.compile(model, backend="eager")
    cache, expected = MacCache(compiled, max_length=80, config=ALWAYS), filled(model, ids)
    compiled(ids, past_key_values=cache)
    tokens = prompts(CPU, 2, 4)
    got = next_logits(compiled, cache, tokens)
    torch.testing.assert_close(got, next_logits(model, expected, tokens), **ROUNDING)
    assert cache.stats().hit_rate == 1
    with pytest.raises(ValueError, match="Linear without a transformers model"):
        MacCache(torch.nn.Linear(2, 2), max_length=80)


def test_a_static_cache_is_as_with_sdpa() -> None:
    model, ids = tiny_model(CPU), prompts(CPU)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    options |= {"cache_implementation": "static", "disable_compile": True}
    got = model.generate(ids, **options)
    model.set_attn_implementation("sdpa")
    assert torch.equal(got, model.generate(ids, **options))


# Copies, pickles


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
@pytest.mark.parametrize("padded", [False, True])
def test_saved_and_loaded(device: torch.device, how: str, padded: bool) -> None:
    model, more = tiny_model(device), prompts(device, 2, 8)
    ids, mask = left_padded(prompts(device), [0, 9] if padded else [0, 0])
    cache = filled(model, ids, attention_mask=mask)
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps(cache))
    else:
        file = io.BytesIO()
        torch.save(cache, file)
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    for token in more.split(1, dim=1):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        got, expected = (
            model(token, attention_mask=mask, past_key_values=one).logits for one in (loaded, cache)
        )
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert loaded.stats().hit_rate == 1


# Gradients


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("config", [None, ALWAYS], ids=["exact", "reuse"])
def test_a_backward_pass_is_refused(config: Any, steps: int) -> None:
    model, ids = tiny_model(CPU), prompts(CPU)
    with torch.enable_grad():
        cache = MacCache(model, max_length=80, config=config)
        logits = model(ids, past_key_values=cache).logits
        for _ in range(steps):
            logits = model(ids[:, :1], past_key_values=cache).logits
        with pytest.raises(ValueError, match="keeps no gradients.*use_cache=False"):
            logits.sum().backward()
        model(ids, use_cache=False).logits.sum().backward()  # without it: as ever


# Arguments and messages


@pytest.mark.parametrize("name", ["max_length", "batch_size"])
@pytest.mark.parametrize(
    ("value", "error"), [(64.0, TypeError), (True, TypeError), ("64", TypeError), (0, ValueError)]
)
def test_sizes_are_ints(name: str, value: Any, error: type[Exception]) -> None:
    options = {"max_length": 64} | {name: value}
    with pytest.raises(error, match=name):
        MacCache(tiny_model(CPU), **options)


@pytest.mark.parametrize("tokens", [0, -1, -39, -40, -41, -1000, 1, 39, 40, 1000])
@pytest.mark.parametrize("used", [True, False])
def test_crop_has_the_edges_of_a_dynamic_cache(tokens: int, used: bool) -> None:
    model, ids = tiny_model(CPU), prompts(CPU)
    cache, plain = MacCache(model, max_length=80, config=ALWAYS), DynamicCache(config=model.config)
    if used:
        for one in (cache, plain):
            model(ids, past_key_values=one)
    try:
        plain.crop(tokens)
    except ValueError:
        with pytest.raises(ValueError):
            cache.crop(tokens)
    else:
        cache.crop(tokens)
    assert cache.get_seq_length() == plain.get_seq_length()
    assert cache.layers[1].length == plain.get_seq_length(1)


@pytest.mark.parametrize("tokens", [1.5, -1.5, None, True, torch.tensor(-1)])
def test_crop_takes_an_int(tokens: Any) -> None:
    cache = filled(tiny_model(CPU), prompts(CPU))
    with pytest.raises(TypeError, match="tokens_to_remove is"):
        cache.crop(tokens)
    assert cache.get_seq_length() == 40


def test_repr() -> None:
    model = tiny_model(CPU)
    cache = MacCache(model, max_length=80)
    assert repr(cache) == ("MacCache(2 layers, 2 that reuse, max_length=80, mode='reuse'): empty")
    model(prompts(CPU), past_key_values=cache)
    assert repr(cache).endswith(": 2 x 40 tokens in torch.float32")
    assert repr(cache.layers[1]) == "MacLayer(full, [2, 2, 40, 16] torch.float32, reuse=True)"


@pytest.mark.parametrize("name", sorted({"past_key_values", cache_name(tiny_model(CPU).forward)}))
def test_both_names_of_the_cache(name: str) -> None:
    model, ids = tiny_model(CPU), prompts(CPU)
    cache = MacCache(model, max_length=80, config=NEVER)
    options = {"max_new_tokens": 8, "do_sample": False, name: cache}
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert cache.get_seq_length() == tokens.shape[1] - 1
    assert cache.stats().steps > 0


def test_configs_for_layers() -> None:
    model = tiny_model(CPU)
    with pytest.raises(ValueError, match="config has 1 entries, must be one for all layers or a"):
        MacCache(model, max_length=64, config=[NEVER])
    with pytest.raises(ValueError, match="rotary has 3 entries.* list of 2, one for each layer"):
        MacCache(model, max_length=64, rotary=[None] * 3)
    with pytest.raises(TypeError, match="config is None"):
        MacCache(model, max_length=64, config=[NEVER, None])
    with pytest.raises(TypeError, match="rotary is of type float"):
        MacCache(model, max_length=64, rotary=1.0)
    with pytest.raises(TypeError, match="model is of type LlamaConfig"):
        MacCache(model.config, max_length=64)


@pytest.mark.parametrize("head_dim", [20, 272])
@pytest.mark.parametrize("config", [None, ALWAYS], ids=["exact", "reuse"])
def test_head_sizes_are_refused_before_the_prefill(head_dim: int, config: Any) -> None:
    options = copy.deepcopy(tiny_model(CPU).config)
    options.head_dim = head_dim
    model = transformers.LlamaForCausalLM(options).eval()
    model.set_attn_implementation("mac")
    reason = rf"head_dim {head_dim}, must be a multiple of 8 up to 256, or 512\n.*use attn_impl"
    with pytest.raises(ValueError, match=reason):
        cache = MacCache(model, max_length=64, config=config)  # the probe, or else the prefill
        try:
            model(prompts(CPU), past_key_values=cache)
        finally:
            assert {layer.length for layer in cache.layers} == {0}


def test_a_refused_step_takes_back_the_whole_forward(device: torch.device) -> None:
    """The first layer, which is local, had taken the token when the second refused its mask."""
    model = tiny_model(
        device, "qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1
    )
    model.config.layer_types = model.config.layer_types[::-1]
    model = transformers.Qwen2ForCausalLM(model.config).to(device).eval()
    model.set_attn_implementation("mac")
    ids = prompts(device)
    cache = filled(model, ids)
    mask = torch.ones(2, 41, dtype=torch.long, device=device)
    mask[0, 20] = 0
    with pytest.raises(ValueError, match="left-padded prompts"):
        model(ids[:, :1], attention_mask=mask, past_key_values=cache)
    assert {layer.length for layer in cache.layers} == {40}
    assert next_logits(model, cache, ids[:, :2]).isfinite().all()
    assert cache.stats().steps == 4


def test_what_is_left_to_sdpa_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(
        CPU, "qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1
    )
    with caplog.at_level(logging.WARNING, logger="mac_attn"):
        cache = MacCache(model, max_length=80, config=None)
        generate(model, prompts(CPU), cache)
        cache.reset()
        generate(model, prompts(CPU), cache)
    said = [r.getMessage() for r in caplog.records if r.name.startswith("mac_attn")]
    assert len(said) == 1 and "left to SDPA" in said[0]


def test_queries_turned_back_are_those_before_the_rotation() -> None:
    """NanoChat rotates backwards and normalises after it."""
    from all_models import tiny_causal_model

    model = tiny_causal_model("nanochat")
    model.set_attn_implementation("mac")
    cache = MacCache(model, max_length=80)
    rotary = cache.layers[0].rings.rotary
    assert rotary is not None
    cos, sin = model.model.rotary_emb(torch.zeros(1, 6, 64), torch.arange(6)[None])
    from transformers.models.nanochat.modeling_nanochat import apply_rotary_pos_emb

    query = torch.randn(1, 4, 6, 16)
    turned, _ = apply_rotary_pos_emb(query, query, cos, sin)
    back = unrotate(turned[0].transpose(0, 1), torch.arange(6), rotary)
    torch.testing.assert_close(back, query[0].transpose(0, 1))
