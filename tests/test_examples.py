"""examples/: they run as their first lines say, and their own model is a Llama."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mac_attn

GENERATE = Path(__file__).parent.parent / "examples" / "generate.py"
PACKAGE = Path(mac_attn.__file__).parent.parent


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("generate_example", GENERATE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def repeating(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, 100, (64,), generator=generator).repeat(64)
    return [text[i : i + length] for i, length in enumerate(lengths)]


def test_it_runs_as_a_program() -> None:
    said = subprocess.run(
        [sys.executable, str(GENERATE), "--new-tokens", "32"],
        env={**os.environ, "PYTHONPATH": str(PACKAGE)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert re.search(r"^exact: [\d.]+ ms a step$", said, re.MULTILINE)
    assert re.search(r"^62 steps: .* of KV heads hit, .*% of the KV read$", said, re.MULTILINE)


def test_reuse_hits_and_reads_less(example: Any) -> None:
    torch.manual_seed(0)
    model = example.Llama(example.Config())
    model.use_reuse(mac_attn.ReuseConfig(), num_slots=2)
    prompts = repeating(3000, 2900)
    first, _ = example.generate(model, prompts, 64)
    for layer in model.layers:
        stats = layer.self_attn.reuse.stats()
        assert stats.steps == 126  # the first token of each comes of the prefill
        assert stats.hit_rate > 0.5 and stats.kv_read_share < 0.6
    again, _ = example.generate(model, prompts, 64)  # other requests, in the same slots
    assert torch.equal(first, again)


def test_its_model_is_that_of_transformers(example: Any, tmp_path: Path) -> None:
    """Also that pages, lengths and slots belong to their requests: alone they get the same."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=True,
        initializer_range=0.3,  # large, so that a wrong attention changes the tokens
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = example.load(tmp_path)
    prompts = repeating(40, 33, 16)
    expected = [
        theirs.generate(prompt[None], max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        for prompt in prompts
    ]
    never = mac_attn.ReuseConfig(min_context=0, band=8, threshold=0.0)
    for options in (None, never):
        ours.use_reuse(options, num_slots=3)
        tokens, _ = example.generate(ours, prompts, 12)
        assert torch.equal(tokens, torch.stack(expected))
    assert ours.layers[0].self_attn.reuse.stats().kv_head_hits == 0


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "qwen2"},
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},  # as transformers 4 writes it
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
)
def test_another_kind_of_model_is_refused(
    example: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4} | options
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="must be a llama with plain rotary embeddings"):
        example.load(tmp_path)
