"""The transformers integration: a MacCache generates what transformers' own cache generates."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from mac_attn import ReuseConfig  # noqa: E402
from mac_attn.integrations.transformers import AttentionTimer, MacCache  # noqa: E402

VOCAB, EOS, PAD = 101, 100, 0
NEW = 24
# Small enough that prompts of 40 tokens have something to reuse.
SMALL = {"window": 32, "band": 8, "anchors": 4, "min_context": 0}
NEVER = ReuseConfig(**SMALL, threshold=0.0)
ALWAYS = ReuseConfig(**SMALL, threshold=1e6)

# Kernels that differ in the order of summation differ by a few units of 2^-24, which two layers
# with these large weights grow to 5e-5 of logits around 2.4. One token more or less changes 0.1.
ROUNDING = {"rtol": 0, "atol": 5e-4}

FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}

Model = Any
MakeModel = Callable[..., Model]


@pytest.fixture
def make_model(device: torch.device) -> MakeModel:
    def make(family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Model:
        config_class, model_class = FAMILIES[family]
        config = config_class(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=PAD,
            # Large weights: logits that differ, so that a wrong attention changes the tokens.
            initializer_range=0.3,
            **options,
        )
        model = model_class(config).to(device, dtype).eval()
        model.set_attn_implementation("mac")
        return model

    return make


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def prompts(device: torch.device, batch: int = 2, length: int = 40) -> Tensor:
    """Random tokens, none twice in a row of the batch.

    The queries of a repeated token are equal in the first layer but for the rounding of the
    rotation, which would then decide which of them is reused.
    """
    rows = [torch.randperm(EOS - 1, device=device)[:length] + 1 for _ in range(batch)]
    return torch.stack(rows)


def left_padded(rows: Tensor, padding: list[int]) -> tuple[Tensor, Tensor]:
    """The rows with their first tokens replaced by padding, and the mask that says so."""
    mask = torch.arange(rows.shape[1]) >= torch.tensor(padding)[:, None]
    mask = mask.to(rows.device)
    return torch.where(mask, rows, PAD), mask.long()


def generate(model: Model, ids: Tensor, cache: MacCache | None = None, **options: Any) -> Any:
    """Greedy generation with the cache, or with SDPA and transformers' own cache."""
    implementation = "sdpa" if cache is None else "mac"
    model.set_attn_implementation(implementation)
    options.setdefault("attention_mask", torch.ones_like(ids))
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **options}
    # The embedding of padding is zero, and so is its query: its threshold is 0, and it never hits.
    options["suppress_tokens"] = [PAD]
    if cache is not None:
        options["past_key_values"] = cache
    output = model.generate(ids, output_logits=True, return_dict_in_generate=True, **options)
    model.set_attn_implementation("mac")
    return output


def assert_same(got: Any, expected: Any) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), **ROUNDING)


def next_logits(model: Model, cache: MacCache, tokens: Tensor, **options: Any) -> Tensor:
    """Logits `[steps, B, vocab]` of feeding tokens `[B, steps]` one by one."""
    steps = [
        model(token[:, None], past_key_values=cache, **options).logits[:, -1]
        for token in tokens.unbind(1)
    ]
    return torch.stack(steps)


@pytest.mark.parametrize("config", [None, NEVER], ids=["exact", "zero-threshold"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generates_what_sdpa_generates(
    make_model: MakeModel, device: torch.device, family: str, config: ReuseConfig | None
) -> None:
    model, ids = make_model(family), prompts(device)
    cache = MacCache(model, max_length=64, config=config)
    assert_same(generate(model, ids, cache), generate(model, ids))
    assert cache.get_seq_length() == 40 + NEW - 1  # the last token is never fed back
    if config is not None:
        stats = cache.stats()
        assert stats.steps == 2 * 2 * (NEW - 1)  # layers, requests, steps after the prefill
        assert stats.hit_rate == 0
        assert stats.kv_read_share == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_reuses_from_the_first_step(
    make_model: MakeModel, device: torch.device, family: str
) -> None:
    model, ids = make_model(family), prompts(device)
    cache = MacCache(model, max_length=64, config=ALWAYS)
    output = generate(model, ids, cache)
    assert torch.stack(output.logits).isfinite().all()
    stats = cache.stats()
    assert stats.hit_rate == 1  # thanks to the seeded prompt queries the first step hits as well
    assert stats.kv_read_share < 1
    layers = cache.layer_stats()
    assert len(layers) == 2
    assert sum(layer.steps for layer in layers if layer) == stats.steps


def test_a_repetitive_text_hits_sometimes(make_model: MakeModel, device: torch.device) -> None:
    model = make_model()
    ids = prompts(device, 1, 8).repeat(1, 8)
    cache = MacCache(model, max_length=128, config=ReuseConfig(**SMALL, threshold=0.2))
    output = generate(model, ids, cache)
    assert torch.stack(output.logits).isfinite().all()
    assert 0 < cache.stats().hit_rate < 1
    assert 0 < cache.stats().kv_read_share < 1


def first_layer_queries(model: Model, ids: Tensor) -> Tensor:
    """Pre-RoPE queries of layer 0, `[B, T, Hq, D]`: what the rings should hold."""
    layer = model.model.layers[0]
    queries = layer.self_attn.q_proj(layer.input_layernorm(model.model.embed_tokens(ids)))
    queries = queries.unflatten(-1, (4, 16))
    norm = getattr(layer.self_attn, "q_norm", None)
    return queries if norm is None else norm(queries)


def ring_queries(cache: MacCache, row: int, positions: Tensor) -> Tensor:
    """Queries `[T, Hq, D]` in the ring of layer 0 for these positions."""
    reuse = cache.layers[0].reuse
    at = positions % reuse.cfg.window
    assert torch.equal(reuse.ring_position[row, at].long(), positions)
    return reuse.ring_query[row, :, at].transpose(0, 1).flatten(1, 2)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rings_hold_the_pre_rope_queries(
    make_model: MakeModel, device: torch.device, family: str, padded: bool
) -> None:
    model, ids = make_model(family), prompts(device)
    padding = [0, 25] if padded else [0, 0]  # 15 tokens are left: fewer than the window of 32
    ids, mask = left_padded(ids, padding)
    cache = MacCache(model, max_length=64, config=NEVER)
    sequences = generate(model, ids, cache, attention_mask=mask).sequences
    expected = first_layer_queries(model, sequences)
    end = cache.get_seq_length()
    for row, columns in enumerate(padding):
        n = end - columns
        assert int(cache.layers[0].reuse.slot_end[row]) == n
        assert int(cache.layers[0].reuse.slot_begin[row]) == max(0, 40 - 32 - columns)
        positions = torch.arange(max(0, n - 32), n, device=device)
        # Rotating a query there and back rounds twice in float32.
        torch.testing.assert_close(
            ring_queries(cache, row, positions),
            expected[row, columns + positions],
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize("config", [None, ALWAYS], ids=["exact", "reuse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch_is_its_requests(
    make_model: MakeModel, device: torch.device, family: str, config: ReuseConfig | None
) -> None:
    model, rows = make_model(family), prompts(device, 3, 64)
    padding = [0, 7, 25]
    ids, mask = left_padded(rows, padding)
    cache = MacCache(model, max_length=64, config=config)
    logits = [model(ids[:, :40], attention_mask=mask[:, :40], past_key_values=cache).logits]
    for end in range(41, 65):
        token = ids[:, end - 1 : end]
        logits.append(model(token, attention_mask=mask[:, :end], past_key_values=cache).logits)
    logits = torch.cat(logits, dim=1)
    for row, columns in enumerate(padding):
        alone = MacCache(model, max_length=64, config=config)
        single = rows[row : row + 1, columns:]
        first = model(single[:, : 40 - columns], past_key_values=alone).logits[0]
        rest = next_logits(model, alone, single[:, 40 - columns :])[:, 0]
        torch.testing.assert_close(logits[row, columns:], torch.cat([first, rest]), **ROUNDING)
        if config is not None:
            assert alone.stats().hit_rate == 1
    if config is not None:
        assert cache.stats().hit_rate == 1


@pytest.mark.parametrize("config", [None, NEVER], ids=["exact", "zero-threshold"])
def test_generates_left_padded_batches(
    make_model: MakeModel, device: torch.device, config: ReuseConfig | None
) -> None:
    model, rows = make_model(), prompts(device, 3)
    padding = [0, 7, 25]
    ids, mask = left_padded(rows, padding)
    cache = MacCache(model, max_length=64, config=config)
    batch = generate(model, ids, cache, attention_mask=mask)
    assert_same(batch, generate(model, ids, attention_mask=mask))
    for row, columns in enumerate(padding):
        alone = generate(model, rows[row : row + 1, columns:]).sequences[0]
        assert torch.equal(batch.sequences[row, columns:], alone)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("config", [None, NEVER], ids=["exact", "zero-threshold"])
def test_beam_search(
    make_model: MakeModel, device: torch.device, config: ReuseConfig | None, padded: bool
) -> None:
    model, ids = make_model(), prompts(device)
    ids, mask = left_padded(ids, [0, 9] if padded else [0, 0])
    options = {"num_beams": 3, "attention_mask": mask}
    cache = MacCache(model, max_length=64, config=config)
    assert torch.equal(
        generate(model, ids, cache, **options).sequences, generate(model, ids, **options).sequences
    )
    if config is not None:
        assert cache.stats().steps == 2 * 6 * (NEW - 1)


def test_reordered_rows_continue_their_sources(make_model: MakeModel, device: torch.device) -> None:
    model, tokens = make_model(), prompts(device, 3, 52)
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


def test_batch_changes_size(make_model: MakeModel, device: torch.device) -> None:
    model, tokens = make_model(), prompts(device, 2, 52)
    rows = [1, 0, 1]  # of the batch repeated to [0, 0, 1, 1]: its rows 2, 1 and 3
    more = tokens[rows, 40:]
    ids, mask = left_padded(tokens[:, :40], [5, 0])
    cache = MacCache(model, max_length=64, config=ALWAYS)
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.batch_repeat_interleave(2)
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
def test_crop_forgets(
    make_model: MakeModel, device: torch.device, config: ReuseConfig | None
) -> None:
    model, ids = make_model(), prompts(device, 2, 60)
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
    with pytest.raises(ValueError, match="tokens_to_remove is -61, must be at least -60"):
        cache.crop(-61)


def test_cropped_entries_are_not_reused(make_model: MakeModel, device: torch.device) -> None:
    model, ids = make_model(), prompts(device, 1, 40)
    cache = MacCache(model, max_length=64, config=ALWAYS)
    model(ids, past_key_values=cache)
    before = copy.deepcopy(cache)
    next_logits(model, cache, prompts(device, 1, 1))
    cache.crop(-1)
    more = prompts(device, 1, 1)
    # Only the oldest entry is lost to the rejected token, and a hit takes the most similar query.
    reuse = cache.layers[0].reuse
    assert int(reuse.slot_end[0]) == 40
    assert (reuse.ring_position < 40).all()
    assert (before.layers[0].reuse.ring_position != reuse.ring_position).sum() == 1
    assert next_logits(model, cache, more).isfinite().all()
    assert cache.stats().hit_rate == 1


@pytest.mark.parametrize("chunk", [7, 16, 33])
@pytest.mark.parametrize("padded", [False, True])
def test_chunked_prefill(
    make_model: MakeModel, device: torch.device, chunk: int, padded: bool
) -> None:
    model, ids = make_model(), prompts(device)
    ids, mask = left_padded(ids, [0, 9] if padded else [0, 0])  # 9: a first chunk of padding alone
    options = {"attention_mask": mask}
    chunked = MacCache(model, max_length=64, config=NEVER)
    assert_same(
        generate(model, ids, chunked, prefill_chunk_size=chunk, **options),
        generate(model, ids, **options),
    )
    whole = MacCache(model, max_length=64, config=NEVER)
    generate(model, ids, whole, **options)
    got, expected = chunked.layers[1].reuse, whole.layers[1].reuse
    assert torch.equal(got.slot_end, expected.slot_end)
    assert (got.slot_begin <= expected.slot_begin).all()  # an unbroken history reaches further back
    assert torch.equal(got.ring_position, expected.ring_position)
    # Layer 1 sees hidden states that have been rounded along two different ways.
    torch.testing.assert_close(got.ring_query, expected.ring_query, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", [None, NEVER], ids=["exact", "zero-threshold"])
def test_prompt_lookup_decoding(
    make_model: MakeModel, device: torch.device, config: ReuseConfig | None
) -> None:
    model, ids = make_model(), prompts(device, 1, 5).repeat(1, 8)
    cache = MacCache(model, max_length=80, config=config)
    lookup = generate(model, ids, cache, prompt_lookup_num_tokens=4)
    assert torch.equal(lookup.sequences, generate(model, ids).sequences)
    assert cache.get_seq_length() < lookup.sequences.shape[1]  # rejected drafts have been cropped


def test_continues_a_conversation(make_model: MakeModel, device: torch.device) -> None:
    model, ids = make_model(), prompts(device)
    cache = MacCache(model, max_length=128, config=NEVER)
    first = generate(model, ids, cache).sequences
    ids = torch.cat([first, prompts(device, 2, 10)], dim=1)
    assert_same(generate(model, ids, cache), generate(model, ids))


def test_reset_takes_another_batch(make_model: MakeModel, device: torch.device) -> None:
    model = make_model()
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


def test_a_copy_is_independent(make_model: MakeModel, device: torch.device) -> None:
    model, ids, more = make_model(), prompts(device), prompts(device, 2, 12)
    cache = MacCache(model, max_length=64, config=ALWAYS)
    model(ids, past_key_values=cache)
    twin = copy.deepcopy(cache)
    logits = next_logits(model, twin, more)
    assert cache.get_seq_length() == 40
    assert cache.stats().steps == 0
    torch.testing.assert_close(next_logits(model, cache, more), logits, rtol=0, atol=0)


@pytest.mark.parametrize("padded", [False, True])
def test_modes_agree_and_a_gap_in_the_history_is_safe(
    make_model: MakeModel, device: torch.device, padded: bool
) -> None:
    model, token = make_model(), prompts(device, 2, 1)
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


def test_mac_without_a_mac_cache_is_sdpa(make_model: MakeModel, device: torch.device) -> None:
    model, ids = make_model(), prompts(device)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    options["suppress_tokens"] = [PAD]
    expected = generate(model, ids).sequences
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **options), expected)


@pytest.mark.parametrize("config", [None, ALWAYS], ids=["exact", "reuse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(
    make_model: MakeModel, device: torch.device, dtype: torch.dtype, config: ReuseConfig | None
) -> None:
    model, ids, more = make_model(dtype=dtype), prompts(device), prompts(device, 2, 12)
    cache = MacCache(model, max_length=64, config=config)
    model(ids, past_key_values=cache)
    got = next_logits(model, cache, more)
    assert got.dtype == dtype
    assert got.isfinite().all()
    if config is None:
        model.set_attn_implementation("sdpa")
        whole = model(torch.cat([ids, more], dim=1)).logits[:, 40:].transpose(0, 1)
        # Both round to 8 (bfloat16) or 11 bits after every operation of two layers.
        error = (got - whole).float().norm() / whole.float().norm()
        assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_sliding_window_layers_are_left_to_sdpa(
    make_model: MakeModel, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    ids, mask = left_padded(prompts(device), [0, 9])
    with caplog.at_level(logging.WARNING, logger="mac_attn"):
        cache = MacCache(model, max_length=64, config=NEVER)
        got = generate(model, ids, cache, attention_mask=mask)
    assert_same(got, generate(model, ids, attention_mask=mask))
    assert [r.getMessage() for r in caplog.records if r.name.startswith("mac_attn")] == [
        "1 of 2 layers use sliding-window attention; they are left to SDPA"
    ]
    stats = cache.layer_stats()
    assert stats[0] is not None
    assert stats[1] is None


def test_works_across_inference_mode(make_model: MakeModel, device: torch.device) -> None:
    model, ids, more = make_model(), prompts(device), prompts(device, 2, 6)
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


def test_timer_sees_attention_only_while_entered(
    make_model: MakeModel, device: torch.device
) -> None:
    model, ids = make_model(), prompts(device)
    cache = MacCache(model, max_length=64)
    with AttentionTimer() as timer:
        model(ids, past_key_values=cache)
        assert timer.lap() > 0
        assert timer.lap() == 0
    next_logits(model, cache, prompts(device, 2, 1))
    assert timer.lap() == 0


def test_a_full_cache_says_so(make_model: MakeModel, device: torch.device) -> None:
    model, ids = make_model(), prompts(device)
    cache = MacCache(model, max_length=41)
    assert cache.get_max_length() == cache.get_max_cache_shape() == 41
    model(ids, past_key_values=cache)
    model(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match=r"41 tokens and 1 more exceed its max_length 41"):
        model(ids[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == 41


def test_another_implementation_is_refused(make_model: MakeModel, device: torch.device) -> None:
    model, ids = make_model(), prompts(device)
    cache = MacCache(model, max_length=64)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"implementation is 'sdpa'.*set_attn_implementation"):
        model(ids, past_key_values=cache)


def test_another_batch_size_is_refused(make_model: MakeModel, device: torch.device) -> None:
    model, ids = make_model(), prompts(device)
    for cache in (MacCache(model, max_length=64), MacCache(model, max_length=64, batch_size=2)):
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="holds 2 requests, the model was given 3"):
            model(prompts(device, 3, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="holds 3 requests, the model was given 2"):
        model(ids, past_key_values=MacCache(model, max_length=64, batch_size=3))


@pytest.mark.parametrize("kind", ["right", "hole", "bidirectional", "bias"])
def test_other_masks_are_refused(make_model: MakeModel, device: torch.device, kind: str) -> None:
    model, ids = make_model(), prompts(device)
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


def test_an_additive_causal_mask_is_fine(make_model: MakeModel, device: torch.device) -> None:
    model, ids = make_model(), prompts(device)
    visible = torch.ones(40, 40, dtype=torch.bool, device=device).tril()
    mask = torch.zeros(2, 1, 40, 40, device=device)
    mask = mask.masked_fill(~visible, torch.finfo(torch.float32).min)
    cache = MacCache(model, max_length=64)
    got = model(ids, attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(got, model(ids).logits, **ROUNDING)


def test_changed_padding_is_refused(make_model: MakeModel, device: torch.device) -> None:
    model = make_model()
    ids, mask = left_padded(prompts(device), [0, 9])
    cache = MacCache(model, max_length=64)
    model(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match=r"padding per request is \[0, 0\].*came with \[0, 9\]"):
        model(ids[:, :1], past_key_values=cache)


def test_an_interrupted_forward_is_noticed(
    make_model: MakeModel, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = make_model(), prompts(device)
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


def test_arguments_are_checked(make_model: MakeModel) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="max_length is 0, must be at least 1"):
        MacCache(model, max_length=0)
    with pytest.raises(ValueError, match="batch_size is 0, must be at least 1"):
        MacCache(model, max_length=8, batch_size=0)
    exact = MacCache(model, max_length=8, config=None)
    with pytest.raises(ValueError, match="mode is 'fast', must be one of"):
        exact.mode = "fast"
    with pytest.raises(ValueError, match="mode 'reuse' needs a MacCache made with a `config`"):
        exact.mode = "reuse"
    with pytest.raises(ValueError, match="no statistics"):
        exact.stats()


def test_training_is_refused(make_model: MakeModel, device: torch.device) -> None:
    model = make_model().train()
    with torch.enable_grad(), pytest.raises(ValueError, match="for inference"):
        model(prompts(device), past_key_values=MacCache(model, max_length=64))


def test_rotary_embeddings_that_change_are_refused(make_model: MakeModel) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = make_model(rope_parameters=rope)
    with pytest.raises(ValueError, match="dynamic"):
        MacCache(model, max_length=64)
    MacCache(model, max_length=64, config=None)  # exact attention needs no rotation


def test_other_kinds_of_attention_are_refused(make_model: MakeModel) -> None:
    model = make_model()
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ValueError, match=r"also has \['chunked_attention'\]"):
        MacCache(model, max_length=64)
