"""MacCache as a cache: what its methods do to the history, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

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

from mac_attn import ReuseConfig  # noqa: E402
from mac_attn.integrations.transformers import AttentionTimer, MacCache  # noqa: E402

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.float32]


def test_reordered_rows_continue_their_sources(device: torch.device) -> None:
    model, tokens = tiny_model(device), prompts(device, 3, 52)
    ids, more = tokens[:, :40], tokens[:, 40:]
    rows = torch.tensor([2, 0, 0], device=device)
    cache = MacCache(model, max_length=64, config=ALWAYS)
    model(ids, past_key_values=cache)
    cache.reorder_cache(rows)
    sources = MacCache(model, max_length=64, config=ALWAYS)
    model(ids[rows], past_key_values=sources)
    more = more[rows]  # tokens that are new to the source as well
    torch.testing.assert_close(
        next_logits(model, cache, more), next_logits(model, sources, more), **ROUNDING
    )
    assert cache.stats().hit_rate == 1


def test_batch_changes_size(device: torch.device) -> None:
    model, tokens = tiny_model(device), prompts(device, 2, 52)
    rows = [1, 0, 1]  # of the batch repeated to [0, 0, 1, 1]: its rows 2, 1 and 3
    more = tokens[rows, 40:]
    ids, mask = left_padded(tokens[:, :40], [5, 0])
    cache = MacCache(model, max_length=64, config=ALWAYS)
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([True, True, True, True]))
    cache.batch_select_indices(torch.tensor([2, 1, -1]))
    expected = MacCache(model, max_length=64, config=ALWAYS)
    model(ids[rows], attention_mask=mask[rows], past_key_values=expected)
    for token in more.split(1, dim=1):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        torch.testing.assert_close(
            model(token, attention_mask=mask[rows], past_key_values=cache).logits,
            model(token, attention_mask=mask[rows], past_key_values=expected).logits,
            **ROUNDING,
        )
    assert cache.stats().hit_rate == 1


@pytest.mark.parametrize("config", [None, NEVER], ids=["exact", "zero-threshold"])
def test_crop_forgets(device: torch.device, config: ReuseConfig | None) -> None:
    model, ids = tiny_model(device), prompts(device, 2, 60)
    cache = MacCache(model, max_length=64, config=config)
    model(ids[:, :40], past_key_values=cache)
    next_logits(model, cache, prompts(device, 2, 12))  # other tokens, which are then rejected
    cache.crop(0)
    assert cache.get_seq_length() == 52
    cache.crop(-12)
    assert cache.get_seq_length() == 40
    got = next_logits(model, cache, ids[:, 40:])
    expected = model(ids).logits[:, 40:].transpose(0, 1)
    torch.testing.assert_close(got, expected, **ROUNDING)


def test_cropped_entries_are_not_reused(device: torch.device) -> None:
    model, ids = tiny_model(device), prompts(device, 1, 40)
    cache = MacCache(model, max_length=64, config=ALWAYS)
    model(ids, past_key_values=cache)
    before = copy.deepcopy(cache)
    next_logits(model, cache, prompts(device, 1, 1))
    cache.crop(-1)
    more = prompts(device, 1, 1)
    # The rejected token was a hit, which stores no entry.
    reuse = cache.layers[0].reuse
    assert int(reuse.slot_end[0]) == 40
    assert (reuse.ring_position < 40).all()
    assert torch.equal(before.layers[0].reuse.ring_position, reuse.ring_position)
    assert next_logits(model, cache, more).isfinite().all()
    assert cache.stats().hit_rate == 1


def test_reset_takes_another_batch(device: torch.device) -> None:
    model = tiny_model(device)
    cache = MacCache(model, max_length=64, config=NEVER)
    for batch, padding in ((2, [3, 0]), (3, [0, 0, 0]), (3, [0, 4, 1])):
        ids, mask = left_padded(prompts(device, batch), padding)
        assert_same(
            generate(model, ids, cache, attention_mask=mask),
            generate(model, ids, attention_mask=mask),
        )
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.stats().steps == 0


def test_a_copy_is_independent(device: torch.device) -> None:
    model, ids, more = tiny_model(device), prompts(device), prompts(device, 2, 12)
    cache = MacCache(model, max_length=64, config=ALWAYS)
    model(ids, past_key_values=cache)
    twin = copy.deepcopy(cache)
    logits = next_logits(model, twin, more)
    assert cache.get_seq_length() == 40
    assert cache.stats().steps == 0
    torch.testing.assert_close(next_logits(model, cache, more), logits, rtol=0, atol=0)


@pytest.mark.parametrize("padded", [False, True])
def test_modes_agree_and_a_gap_in_the_history_is_safe(device: torch.device, padded: bool) -> None:
    model, token = tiny_model(device), prompts(device, 2, 1)
    ids, mask = left_padded(prompts(device), [0, 9] if padded else [0, 0])
    cache = MacCache(model, max_length=64, config=ALWAYS)
    model(ids, attention_mask=mask, past_key_values=cache)
    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    logits = []
    for mode in ("exact", "sdpa", "packed-sdpa"):
        cache.mode = mode
        logits.append(model(token, attention_mask=mask, past_key_values=cache).logits)
        cache.crop(-1)
    torch.testing.assert_close(logits[0], logits[1], **ROUNDING)
    torch.testing.assert_close(logits[0], logits[2], **ROUNDING)
    cache.mode = "sdpa"
    model(token, attention_mask=mask, past_key_values=cache)
    cache.mode = "reuse"  # the rings have missed a token: they must count as empty
    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    model(token, attention_mask=mask, past_key_values=cache)
    assert cache.stats().steps == 4
    assert cache.stats().hit_rate == 0


def test_works_across_inference_mode(device: torch.device) -> None:
    model, ids, more = tiny_model(device), prompts(device), prompts(device, 2, 6)
    cache = MacCache(model, max_length=64, config=ALWAYS)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        next_logits(model, cache, more[:, :3])
    with torch.enable_grad():  # a forgotten no_grad must not fail, nor keep a graph
        logits = next_logits(model, cache, more[:, 3:])
    assert logits.isfinite().all()
    assert not cache.layers[0].key_store.requires_grad
    cache.crop(-2)
    assert cache.stats().hit_rate == 1


def test_timer_sees_attention_only_while_entered(device: torch.device) -> None:
    model, ids = tiny_model(device), prompts(device)
    cache = MacCache(model, max_length=64)
    with AttentionTimer() as timer:
        model(ids, past_key_values=cache)
        assert timer.lap() > 0
        assert timer.lap() == 0
    next_logits(model, cache, prompts(device, 2, 1))
    assert timer.lap() == 0


def test_a_full_cache_says_so(device: torch.device) -> None:
    model, ids = tiny_model(device), prompts(device)
    cache = MacCache(model, max_length=41)
    assert cache.get_max_length() == cache.get_max_cache_shape() == 41
    model(ids, past_key_values=cache)
    model(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match=r"41 tokens and 1 more exceed its max_length 41"):
        model(ids[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == 41


def test_another_implementation_is_refused(device: torch.device) -> None:
    model, ids = tiny_model(device), prompts(device)
    cache = MacCache(model, max_length=64)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"implementation is 'sdpa'.*set_attn_implementation"):
        model(ids, past_key_values=cache)


def test_another_batch_size_is_refused(device: torch.device) -> None:
    model, ids = tiny_model(device), prompts(device)
    for cache in (MacCache(model, max_length=64), MacCache(model, max_length=64, batch_size=2)):
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="holds 2 requests, the model was given 3"):
            model(prompts(device, 3, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="holds 3 requests, the model was given 2"):
        model(ids, past_key_values=MacCache(model, max_length=64, batch_size=3))


@pytest.mark.parametrize("kind", ["right", "hole", "bidirectional", "bias"])
def test_other_masks_are_refused(device: torch.device, kind: str) -> None:
    model, ids = tiny_model(device), prompts(device)
    mask = torch.ones_like(ids)
    if kind == "right":
        mask[0, 30:] = 0
    elif kind == "hole":
        mask[1, 7] = 0
    elif kind == "bidirectional":
        mask = torch.ones(2, 1, 40, 40, dtype=torch.bool, device=device)
    else:
        mask = torch.zeros(2, 1, 40, 40, device=device).masked_fill(
            torch.ones(40, 40, dtype=torch.bool, device=device).triu(1), -torch.inf
        )
        mask[0, 0, 20, 3] = -1.0
    cache = MacCache(model, max_length=64)
    with pytest.raises(ValueError, match="left-padded prompts"):
        model(ids, attention_mask=mask, past_key_values=cache)
    # The refused call has left no trace.
    assert cache.get_seq_length() == 0
    cache.mode = "exact"
    model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 40


def test_an_additive_causal_mask_is_fine(device: torch.device) -> None:
    model, ids = tiny_model(device), prompts(device)
    visible = torch.ones(40, 40, dtype=torch.bool, device=device).tril()
    mask = torch.zeros(2, 1, 40, 40, device=device)
    mask = mask.masked_fill(~visible, torch.finfo(torch.float32).min)
    cache = MacCache(model, max_length=64)
    got = model(ids, attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(got, model(ids).logits, **ROUNDING)


def test_changed_padding_is_refused(device: torch.device) -> None:
    model = tiny_model(device)
    ids, mask = left_padded(prompts(device), [0, 9])
    cache = MacCache(model, max_length=64)
    model(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match=r"padding per request is \[0, 0\].*came with \[0, 9\]"):
        model(ids[:, :1], past_key_values=cache)


def test_an_interrupted_forward_is_noticed(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model(device), prompts(device)
    cache = MacCache(model, max_length=128)

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[0].mlp, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="interrupted"):
        model(ids, past_key_values=cache)
    cache.reset()
    model(ids, past_key_values=cache)


def test_arguments_are_checked(device: torch.device) -> None:
    model = tiny_model(device)
    with pytest.raises(ValueError, match="max_length is 0, must be from 1"):
        MacCache(model, max_length=0)
    with pytest.raises(ValueError, match="batch_size is 0, must be from 1"):
        MacCache(model, max_length=8, batch_size=0)
    exact = MacCache(model, max_length=8, config=None)
    with pytest.raises(ValueError, match="mode is 'fast', must be one of"):
        exact.mode = "fast"
    with pytest.raises(ValueError, match="mode 'reuse' needs a MacCache made with a `config`"):
        exact.mode = "reuse"
    with pytest.raises(ValueError, match="no statistics"):
        exact.stats()


def test_training_is_refused(device: torch.device) -> None:
    model = tiny_model(device).train()
    cache = MacCache(model, max_length=64)
    with torch.enable_grad(), pytest.raises(ValueError, match="for inference"):
        model(prompts(device), past_key_values=cache)


def test_rotary_embeddings_that_change_are_refused(device: torch.device) -> None:
    MacCache(tiny_model(device), max_length=64)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_model(device, rope_parameters=rope)
    with pytest.raises(ValueError, match="dynamic"):
        MacCache(model, max_length=64)
    MacCache(model, max_length=64, config=None)  # exact attention needs no rotation


def test_other_kinds_of_attention_are_refused(device: torch.device) -> None:
    model = tiny_model(device)
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match=r"layers of type \['linear_attention'\]"):
        MacCache(model, max_length=64)
