"""gpt-oss and its like in transformers: attention sinks with a MacCache, beside their own eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from all_models import tiny_causal_model  # noqa: E402
from tiny_models import ALWAYS, NEVER, ROUNDING, SMALL, left_padded, prompts, run  # noqa: E402

from mac_attn import ReuseConfig  # noqa: E402
from mac_attn.integrations.transformers import MacCache, sinks  # noqa: E402
from mac_attn.integrations.transformers.support import Refusal  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_grad")

CPU = torch.device("cpu")


def tiny_gpt_oss() -> Any:
    """A layer with a window of 16 and a full one, with sinks that take a good part of the sum."""
    model = tiny_causal_model("gpt_oss")
    model.set_attn_implementation("mac")
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.sinks.copy_(torch.tensor([1.0, 3.0, -2.0, 4.0]).roll(i))
    return model


PARTS = (20, 40)  # of the prompts; a part of 16 tokens or fewer is a step of decode


def own(model: Any, ids: Tensor, **options: Any) -> Tensor:
    model.set_attn_implementation("eager")
    logits = run(model, ids, transformers.DynamicCache(config=model.config), PARTS, **options)
    model.set_attn_implementation("mac")
    return logits


@pytest.mark.parametrize("config", [None, NEVER], ids=["exact", "zero-threshold"])
def test_equals_eager(config: ReuseConfig | None) -> None:
    model, ids = tiny_gpt_oss(), prompts(CPU, 2, 60)
    want = own(model, ids)
    cache = MacCache(model, max_length=64, config=config)
    torch.testing.assert_close(run(model, ids, cache, PARTS), want, **ROUNDING)
    for layer in model.model.layers:  # without sinks it is another model
        layer.self_attn.sinks.fill_(-torch.inf)
    assert (own(model, ids) - want).abs().max() > 0.1


def test_left_padding_and_modes() -> None:
    model = tiny_gpt_oss()
    ids, mask = left_padded(prompts(CPU, 2, 60), [0, 11])
    want = own(model, ids, attention_mask=mask)
    for mode in ("reuse", "exact", "sdpa", "packed-sdpa"):
        cache = MacCache(model, max_length=64, config=NEVER)
        cache.mode = mode  # type: ignore[assignment]
        got = run(model, ids, cache, PARTS, attention_mask=mask)
        torch.testing.assert_close(got[0], want[0], **ROUNDING)
        torch.testing.assert_close(got[1, 11:], want[1, 11:], **ROUNDING)


def test_queries_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_gpt_oss(), prompts(CPU, 1, 60)
    want = own(model, ids)
    whole = model(input_ids=ids).logits  # without a MacCache
    monkeypatch.setattr(sinks, "_MOST_LOGITS", 7 * 4 * 60)
    pieces = model(input_ids=ids).logits
    torch.testing.assert_close(whole, want, **ROUNDING)
    torch.testing.assert_close(pieces, whole, **ROUNDING)


def test_hits_on_queries_that_repeat() -> None:
    """Only the full layer has rings; the other is left to plain attention with its sinks."""
    model = tiny_gpt_oss()
    cache = MacCache(model, max_length=64, config=ReuseConfig(**SMALL, threshold=1e-3))
    run(model, torch.full((1, 56), 7), cache, PARTS)
    rates = [stats and stats.hit_rate for stats in cache.layer_stats()]
    assert sorted(rates, key=str) == [1.0, None]
    cache = MacCache(model, max_length=64, config=ALWAYS)
    got, want = run(model, prompts(CPU, 1, 60), cache, PARTS), own(model, prompts(CPU, 1, 60))
    assert cache.stats().hit_rate == 1 and got.isfinite().all()
    assert (got - want).abs().max() > 0.01  # hits are an approximation, so these were


def test_with_a_float8_cache() -> None:
    model, ids = tiny_gpt_oss(), prompts(CPU, 1, 60)
    cache = MacCache(model, max_length=64, config=NEVER, kv_dtype=torch.float8_e4m3fn)
    got, want = run(model, ids, cache, PARTS), own(model, ids)
    assert (got - want).norm() < 0.2 * want.norm() and not torch.equal(got, want)


@pytest.mark.parametrize("s_aux", [torch.ones(3), torch.ones(2, 4), torch.ones(1, 4, 1, 1), 1.0])
def test_other_sinks_are_refused(s_aux: Any) -> None:
    with pytest.raises(Refusal, match=r"`s_aux` is .*, must be a tensor \[4\]"):
        sinks.check_sinks(s_aux, 4)


@pytest.mark.parametrize("name", ["deepseek_v4", "hy_v4", "inkling2_text"])
def test_models_with_more_than_sinks_are_refused(name: str) -> None:
    model = tiny_causal_model(name)
    with pytest.raises(ValueError, match="_supports_sdpa = False"):
        MacCache(model, max_length=64)


def test_dropout_is_refused() -> None:
    model = tiny_causal_model("gpt_oss").train()
    model.set_attn_implementation("mac")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="dropout is 0.1"):
        model(input_ids=prompts(CPU, 1, 8))
