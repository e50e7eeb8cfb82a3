"""Models for the tests with vLLM and SGLang, and requests for those with SGLang."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch


def random_model(folder: Path, name: str = "llama", **options: Any) -> Path:
    """A random model of 8 query and 4 KV heads of 32, saved."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(name, **sizes | options)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def request(prompt: list[int], length: int, rid: str, **more: Any) -> dict[str, Any]:
    """A request as sglang_scheduler.py takes them."""
    return {"prompt": prompt, "length": length, "rid": rid, "turn": 0, "cancel": None, **more}


def traffic(count: int = 12) -> list[dict[str, Any]]:
    """Mixed lengths; every third shares a prefix, every fifth is cancelled after four tokens."""
    draw = random.Random(0)
    prefix = [draw.randrange(512) for _ in range(150)]
    requests = []
    for i in range(count):
        prompt = [draw.randrange(512) for _ in range(draw.choice((20, 90, 200, 300)))]
        prompt = prefix + prompt[:50] if i % 3 == 0 else prompt
        cancel = 4 if i % 5 == 4 else None
        length = draw.choice((10, 30, 40))
        requests.append(request(prompt, length, f"request {i}", turn=2 * i, cancel=cancel))
    return requests
