"""Why a server or a layer is left to vLLM's own attention; None where it is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType

import mac_attn

from ..serving.limits import device_reason, heads_reason

_FLOAT8 = ("fp8", "fp8_e4m3")  # vLLM's names of float8_e4m3fn; it keeps them as bytes


def num_drafts(vllm_config: Any) -> int:
    """How many tokens of a request a step verifies at most; 0 without speculative decoding."""
    speculative = vllm_config.speculative_config
    return 0 if speculative is None else int(speculative.num_speculative_tokens)


def query_tokens(vllm_config: Any) -> int:
    """Up to how many tokens of a request a step goes through `mac_attn.decode`."""
    return min(1 + num_drafts(vllm_config), mac_attn.MAX_QUERY_TOKENS)


def engine_reason(vllm_config: Any) -> str | None:
    """What keeps the plugin from serving any layer under this configuration."""
    parallel = vllm_config.parallel_config
    model, speculative = vllm_config.model_config, vllm_config.speculative_config
    reasons = {
        # How many drafts of each request are verified is known on the GPU alone.
        "adaptive verification of drafts": speculative is not None
        and speculative.enable_adaptive_verification,
        # It drafts nothing, but takes the model's states out as the KV cache of a layer of its own.
        "speculative decoding by extract_hidden_states": speculative is not None
        and speculative.method == "extract_hidden_states",
        "decode or prefill context parallelism": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "KV transfer": vllm_config.kv_transfer_config is not None,
        "dual batch overlap": parallel.enable_dbo,
        "fast prefill of shared KV layers": vllm_config.cache_config.kv_sharing_fast_prefill,
        "multi-head latent attention": model.use_mla,
        "a model that does not generate": model.runner_type != "generate",
        "bidirectional attention to parts of the prompt": model.is_mm_prefix_lm,
    }
    device = device_reason(vllm_config.device_config.device_type)
    return device or next((reason for reason, holds in reasons.items() if holds), None)


def layer_reason(layer: Any, dtype: torch.dtype, device: torch.device) -> str | None:
    """What keeps one attention layer with vLLM's backend, its rotary embedding aside.

    Args:
        layer: the `Attention` module, whose impl is one of this package's.
        dtype: the model's.
        device: where it runs.
    """
    impl = layer.impl
    windows = (
        impl.sliding_window if isinstance(impl.sliding_window, tuple) else (impl.sliding_window,)
    )
    reasons = {
        f"layers of class {type(layer).__name__}": type(layer) is not Attention,
        f"{layer.attn_type} attention": layer.attn_type != AttentionType.DECODER,
        "sliding-window attention": any(window != -1 for window in windows),
        "ALiBi": impl.alibi_slopes is not None,
        f"KV cache of type {layer.kv_cache_dtype}": layer.kv_cache_torch_dtype != dtype
        and layer.kv_cache_dtype not in _FLOAT8,
        "values of another size than keys": layer.head_size_v != layer.head_size,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    float8 = layer.kv_cache_dtype in _FLOAT8
    return reason or heads_reason(layer.head_size, dtype, device.type, float8)


def backend_reason(layer: Any, by_name: bool) -> str:
    """What keeps a layer without a backend of this package with vLLM's, and the way out.

    Args:
        layer: the `Attention` module.
        by_name: whether this package's is CUSTOM, else in the place of FLASH_ATTN.
    """
    way = "--attention-backend FLASH_ATTN"
    if by_name:
        way = """--attention-config.backend_per_kind '{"full_attention": "CUSTOM"}'"""
    name = layer.attn_backend.get_name()
    default = ", its default on compute capability 10" if name == "FLASHINFER" else ""
    return f"vLLM's backend {name}{default}; on a GPU {way} has them served"


def sharing_kv(layers: Mapping[str, Any]) -> list[set[str]]:
    """The groups of layers that share a KV cache, by name: who writes it, and who reads it too."""
    groups: dict[str, set[str]] = {}
    for name, layer in layers.items():
        target: str | None = getattr(layer, "kv_sharing_target_layer_name", None)
        if target is not None:
            groups.setdefault(target, {target}).add(name)
    return list(groups.values())
