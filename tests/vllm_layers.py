"""vLLM's layers for the plugin's tests, without a model. It needs vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers  # noqa: F401  (before vLLM's backends, whose imports are a circle else)
from vllm.model_executor.layers.attention import Attention


def attention_layer(**changes: Any) -> Any:
    """An attention layer of float32 that is served."""
    layer = object.__new__(Attention)
    torch.nn.Module.__init__(layer)
    impl = {"sliding_window": -1, "alibi_slopes": None, "sinks": None}
    values = {
        "attn_type": "decoder",
        "kv_cache_dtype": "auto",
        "kv_cache_torch_dtype": torch.float32,
        "head_size": 64,
        "head_size_v": 64,
        "num_heads": 8,
        "num_kv_heads": 2,
    }
    for name, value in changes.items():
        (impl if name in impl else values)[name] = value
    for name, value in values.items():
        setattr(layer, name, value)
    layer.impl = SimpleNamespace(**impl)
    return layer
