"""Tiny random transformers models, prompts for them and ways to run them, for the tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from mac_attn import ReuseConfig  # noqa: E402
from mac_attn.integrations.transformers import MacCache  # noqa: E402
from mac_attn.integrations.transformers.rotation import cache_name  # noqa: E402

VOCAB, EOS, PAD = 101, 100, 0
NEW = 24
# Small enough that prompts of 40 tokens have something to reuse; and the threshold alone decides.
SMALL: dict[str, Any] = {"entries": 32, "window": 32, "band": 8, "anchors": 4, "min_context": 0}
SMALL |= {"max_drift": None}
NEVER = ReuseConfig(**SMALL, threshold=0.0)
# With anchors a hit may not read more than half of the tokens: of so few it sometimes would.
ALWAYS = ReuseConfig(**SMALL | {"anchors": 0}, threshold=1e6)
SAMPLED = ReuseConfig(**SMALL, threshold=1e6)

# Kernels that differ in the order of summation differ by a few units of 2^-24, which two layers
# with these large weights grow to 5e-5 of logits around 2.4. One token more or less changes 0.1.
ROUNDING = {"rtol": 0, "atol": 5e-4}

FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}

Model = Any


def tiny_model(
    device: torch.device,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Model:
    """Two layers of 4 query and 2 KV heads, with attention "mac"; options go to the config."""
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
    """Greedy generation with the cache, or with SDPA or eager and transformers' own cache."""
    own = "sdpa" if type(model)._supports_sdpa else "eager"
    implementation = own if cache is None else "mac"
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


def run(
    model: Model, ids: Tensor, cache: Any, parts: Sequence[int] = (40,), **options: Any
) -> Tensor:
    """Logits of a prompt, whose parts end there, and of the single tokens behind it."""
    name, mask = cache_name(model.forward), options.pop("attention_mask", None)
    logits, begin = [], 0
    for end in (*parts, *range(parts[-1] + 1, ids.shape[1] + 1)):
        if mask is not None:
            options["attention_mask"] = mask[:, :end]
        logits.append(model(input_ids=ids[:, begin:end], **{name: cache}, **options).logits)
        begin = end
    return torch.cat(logits, dim=1)


def next_logits(model: Model, cache: MacCache, tokens: Tensor, **options: Any) -> Tensor:
    """Logits `[steps, B, vocab]` of feeding tokens `[B, steps]` one by one."""
    steps = [
        model(token[:, None], past_key_values=cache, **options).logits[:, -1]
        for token in tokens.unbind(1)
    ]
    return torch.stack(steps)
