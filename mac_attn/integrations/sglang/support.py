"""Why a server or a layer is left to SGLang's own attention; None where it is not."""

from __future__ import annotations

from typing import Any

from sglang.srt.arg_groups.model_override_base import resolved_view
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from torch import Tensor, nn

from ..serving.limits import device_reason, heads_reason


def runner_reason(runner: Any) -> str | None:
    """What keeps the backend from serving any layer of a model runner."""
    args = resolved_view(runner.server_args)
    reasons = {
        "a draft model": runner.is_draft_worker,
        "speculative decoding": args.speculative_algorithm is not None,
        "a model that does not generate": not runner.is_generation,
        "an encoder-decoder model": runner.model_config.is_encoder_decoder,
        "two-batch overlap": args.enable_two_batch_overlap,
        "multiplexed prefill and decode": args.enable_pdmux,
        "prefill and decode on different servers": args.disaggregation_mode != "null",
        "a diffusion language model": args.dllm_algorithm is not None,
        "context parallelism": args.dcp_size > 1 or args.attn_cp_size > 1,
        "hierarchical sparse attention": args.enable_hisparse,
        "torch.compile": args.enable_torch_compile,
        "a KV pool of virtual token numbers": runner.kv_index_translator.is_translating,
    }
    device = device_reason(str(runner.device))
    return device or next((reason for reason, holds in reasons.items() if holds), None)


def layer_reason(layer: Any, parent: nn.Module, runner: Any) -> str | None:
    """What keeps one attention layer with SGLang's backend, its rotary embedding aside.

    Args:
        layer: the `RadixAttention` module.
        parent: the module around it.
        runner: the model runner.
    """
    reasons = {
        f"layers of class {type(layer).__name__}": type(layer) is not RadixAttention,
        "cross attention": layer.is_cross_attention,
        f"{layer.attn_type.value} attention": layer.attn_type != AttentionType.DECODER,
        "sliding-window attention": layer.sliding_window_size not in (None, -1),
        "local (chunked) attention": layer.use_irope,
        f"logits capped by {layer.logit_capping_method}": bool(layer.logit_cap)
        and layer.logit_capping_method != "tanh",
        "a temperature by length": layer.xai_temperature_len > 0,
        "attention sinks": isinstance(getattr(parent, "sinks", None), Tensor),
        "values of another size than keys": layer.v_head_dim != layer.qk_head_dim,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    reason = reason or heads_reason(layer.qk_head_dim, runner.dtype, str(runner.device))
    return reason or _pool_reason(layer, runner)


def _pool_reason(layer: Any, runner: Any) -> str | None:
    """Whether the layer's keys lie as `mac_attn.decode` reads them: [tokens, heads, size]."""
    pool, page_size = runner.token_to_kv_pool, runner.page_size
    if runner.kv_cache_dtype != runner.dtype:
        return f"KV cache of type {runner.kv_cache_dtype}"
    shape = (layer.tp_k_head_num, layer.qk_head_dim)
    for buffer in (pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)):
        plain = buffer.ndim == 3 and tuple(buffer.shape[1:]) == shape and buffer.is_contiguous()
        if not plain or buffer.dtype != runner.dtype or len(buffer) % page_size:
            return f"the layout of {type(pool).__name__}"
    return None
