"""The transformers integration: a MacCache generates what transformers' own cache generates."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from tiny_models import (  # noqa: E402
    ALWAYS,
    FAMILIES,
    NEVER,
    NEW,
    PAD,
    ROUNDING,
    SAMPLED,
    SMALL,
    Model,
    assert_same,
    generate,
    left_padded,
    next_logits,
    prompts,
    tiny_model,
)

import mac_attn  # noqa: E402
from mac_attn import ReuseCache, ReuseConfig  # noqa: E402
from mac_attn.integrations.transformers import MacCache  # noqa: E402

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.float32]


@pytest.mark.parametrize("config", [None, NEVER], ids=["exact", "zero-threshold"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generates_what_sdpa_generates(
    device: torch.device, family: str, config: ReuseConfig | None
) -> None:
    model, ids = tiny_model(device, family), prompts(device)
    cache = MacCache(model, max_length=64, config=config)
    assert_same(generate(model, ids, cache), generate(model, ids))
    assert cache.get_seq_length() == 40 + NEW - 1  # the last token is never fed back
    if config is not None:
        stats = cache.stats()
        assert stats.steps == 2 * 2 * (NEW - 1)  # layers, requests, steps after the prefill
        assert stats.hit_rate == 0
        assert stats.kv_read_share == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_reuses_from_the_first_step(device: torch.device, family: str) -> None:
    model, ids = tiny_model(device, family), prompts(device)
    cache = MacCache(model, max_length=64, config=ALWAYS)
    output = generate(model, ids, cache)
    assert torch.stack(output.logits).isfinite().all()
    stats = cache.stats()
    assert stats.hit_rate == 1  # thanks to the seeded prompt queries the first step hits as well
    assert stats.kv_read_share < 1
    layers = cache.layer_stats()
    assert len(layers) == 2
    assert sum(layer.steps for layer in layers if layer) == stats.steps


def test_hits_attend_samples(device: torch.device) -> None:
    model, ids = tiny_model(device), prompts(device, 2, 100)
    cache = MacCache(model, max_length=128, config=SAMPLED)
    output = generate(model, ids, cache)
    assert torch.stack(output.logits).isfinite().all()
    stats = cache.stats()
    assert stats.hit_rate > 0.8
    assert 0 < stats.anchors_read <= 4 * stats.kv_head_hits
    seeds = {layer.reuse.layer for layer in cache.layers}
    assert seeds == {0, 1}  # each layer draws on its own


def test_a_repetitive_text_hits_sometimes(device: torch.device) -> None:
    model = tiny_model(device)
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


def ring_queries(reuse: ReuseCache, row: int) -> tuple[list[int], Tensor]:
    """Positions of a ring's entries, ascending, and their queries `[T, Hq, D]`."""
    assert (reuse.ring_stored[row] >= reuse.cfg.entries).all()  # it is full
    order = reuse.ring_position[row].argsort(dim=1)
    heads = torch.arange(reuse.num_kv_heads, device=order.device)[:, None]
    positions = reuse.ring_position[row].gather(1, order)
    assert (positions == positions[0]).all()  # of every KV head
    return positions[0].tolist(), reuse.ring_query[row, heads, order].transpose(0, 1).flatten(1, 2)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rings_hold_the_pre_rope_queries(device: torch.device, family: str, padded: bool) -> None:
    model, ids = tiny_model(device, family), prompts(device)
    padding = [0, 25] if padded else [0, 0]  # 15 tokens are left: fewer than the ring's 32 entries
    ids, mask = left_padded(ids, padding)
    cache = MacCache(model, max_length=64, config=replace(NEVER, anchors=0, entries=16))
    sequences = generate(model, ids, cache, attention_mask=mask).sequences
    expected = first_layer_queries(model, sequences)
    end = cache.get_seq_length()
    for row, columns in enumerate(padding):
        n = end - columns
        assert int(cache.layers[0].reuse.slot_end[row]) == n
        positions, queries = ring_queries(cache.layers[0].reuse, row)
        assert positions == list(range(n - 16, n))
        # Rotating a query there and back rounds twice in float32.
        torch.testing.assert_close(
            queries, expected[row, columns + n - 16 : columns + n], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("config", [None, ALWAYS], ids=["exact", "reuse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch_is_its_requests(
    device: torch.device, family: str, config: ReuseConfig | None
) -> None:
    model, rows = tiny_model(device, family), prompts(device, 3, 64)
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
def test_generates_left_padded_batches(device: torch.device, config: ReuseConfig | None) -> None:
    model, rows = tiny_model(device), prompts(device, 3)
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
def test_beam_search(device: torch.device, config: ReuseConfig | None, padded: bool) -> None:
    model, ids = tiny_model(device), prompts(device)
    ids, mask = left_padded(ids, [0, 9] if padded else [0, 0])
    options = {"num_beams": 3, "attention_mask": mask}
    cache = MacCache(model, max_length=64, config=config)
    assert torch.equal(
        generate(model, ids, cache, **options).sequences, generate(model, ids, **options).sequences
    )
    if config is not None:
        assert cache.stats().steps == 2 * 6 * (NEW - 1)


@pytest.mark.parametrize("chunk", [7, 16, 20])
@pytest.mark.parametrize("padded", [False, True])
def test_chunked_prefill(device: torch.device, chunk: int, padded: bool) -> None:
    model, ids = tiny_model(device), prompts(device)
    ids, mask = left_padded(ids, [0, 9] if padded else [0, 0])  # 9: a first chunk of padding alone
    options = {"attention_mask": mask}
    # A ring that the steps after a prompt of small chunks fill.
    config = replace(NEVER, anchors=0, entries=32 if chunk == 20 else 16)
    chunked = MacCache(model, max_length=64, config=config)
    assert_same(
        generate(model, ids, chunked, prefill_chunk_size=chunk, **options),
        generate(model, ids, **options),
    )
    whole = MacCache(model, max_length=64, config=config)
    generate(model, ids, whole, **options)
    got, expected = chunked.layers[1].reuse, whole.layers[1].reuse
    assert torch.equal(got.slot_end, expected.slot_end)
    for row in range(2):
        (positions, queries), (want, others) = (ring_queries(x, row) for x in (got, expected))
        # Of a chunk of few tokens, which is a step of several, only the first is stored.
        common = [c for c in positions if c in want]
        assert common[-NEW + 1 :] == want[-NEW + 1 :] and (chunk < 20 or len(common) == len(want))
        # Layer 1 sees hidden states that have been rounded along two different ways.
        queries, others = (
            x[[at.index(c) for c in common]] for x, at in ((queries, positions), (others, want))
        )
        torch.testing.assert_close(queries, others, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", [None, NEVER], ids=["exact", "zero-threshold"])
def test_prompt_lookup_decoding(device: torch.device, config: ReuseConfig | None) -> None:
    model, ids = tiny_model(device), prompts(device, 1, 5).repeat(1, 8)
    cache = MacCache(model, max_length=80, config=config)
    lookup = generate(model, ids, cache, prompt_lookup_num_tokens=4)
    assert torch.equal(lookup.sequences, generate(model, ids).sequences)
    assert cache.get_seq_length() < lookup.sequences.shape[1]  # rejected drafts have been cropped


def test_steps_of_prompt_lookup_reuse(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of several tokens as those of one: here all hit, of every token."""
    steps: Counter[int] = Counter()
    hits: Counter[int] = Counter()
    decode = mac_attn.decode

    def counted(q: Tensor, *args: Any, reuse: ReuseCache, **options: Any) -> Any:
        before = reuse.stats()
        out = decode(q, *args, reuse=reuse, **options)
        tokens = 1 if q.dim() == 3 else q.shape[1]
        steps[tokens] += reuse.stats().kv_head_steps - before.kv_head_steps
        hits[tokens] += reuse.stats().kv_head_hits - before.kv_head_hits
        return out

    model, ids = tiny_model(device), prompts(device, 1, 5).repeat(1, 8)
    cache = MacCache(model, max_length=80, config=ALWAYS)
    monkeypatch.setattr(mac_attn, "decode", counted)
    generate(model, ids, cache, prompt_lookup_num_tokens=4)
    assert max(steps) > 1
    assert hits == steps
    # Each counts its tokens: of 2 layers the 2 KV heads.
    assert all(count % (4 * tokens) == 0 for tokens, count in steps.items())


def test_continues_a_conversation(device: torch.device) -> None:
    model, ids = tiny_model(device), prompts(device)
    cache = MacCache(model, max_length=128, config=NEVER)
    first = generate(model, ids, cache).sequences
    ids = torch.cat([first, prompts(device, 2, 10)], dim=1)
    assert_same(generate(model, ids, cache), generate(model, ids))


def test_mac_without_a_mac_cache_compiles_as_one_graph() -> None:
    device = torch.device("cpu")
    model, ids = tiny_model(device), prompts(device)
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, **ROUNDING)


def test_mac_without_a_mac_cache_is_sdpa(device: torch.device) -> None:
    model, ids = tiny_model(device), prompts(device)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    options["suppress_tokens"] = [PAD]
    expected = generate(model, ids).sequences
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **options), expected)


@pytest.mark.parametrize("config", [None, ALWAYS], ids=["exact", "reuse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(
    device: torch.device, dtype: torch.dtype, config: ReuseConfig | None
) -> None:
    model, ids, more = tiny_model(device, dtype=dtype), prompts(device), prompts(device, 2, 12)
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
    device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(
        device, "qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1
    )
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    ids, mask = left_padded(prompts(device), [0, 9])
    with caplog.at_level(logging.WARNING, logger="mac_attn"):
        cache = MacCache(model, max_length=64, config=NEVER)
        got = generate(model, ids, cache, attention_mask=mask)
    assert_same(got, generate(model, ids, attention_mask=mask))
    assert [r.getMessage() for r in caplog.records if r.name.startswith("mac_attn")] == [
        "1 of 2 layers are left to SDPA, and save nothing: they have sliding-window or chunked "
        "attention (layers 1)"
    ]
    stats = cache.layer_stats()
    assert stats[0] is not None
    assert stats[1] is None
