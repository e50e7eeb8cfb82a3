"""The attention function that a transformers model calls when its implementation is "mac"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .layer import MacLayer
from .timer import measured

# What other models hand to their attention and SDPA would ignore or mac_attn cannot do.
_UNSUPPORTED = ("position_bias", "s_aux", "softcap", "cache")


def mac_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: `mac_attn.decode` for single new tokens in a MacCache, else SDPA.

    Args:
        module: the model's attention module.
        query: [B, Hq, T, D] post-RoPE.
        key: [B, Hkv, n, D], what `MacCache.update` returned (any other tensor means SDPA).
        value: [B, Hkv, n, D].
        attention_mask: bool or additive float [B, 1, T, n], or None for plain causal attention.
        scaling: factor of the logits; None is 1 / sqrt(D).
        sliding_window: not None marks a layer with local attention, which is left to SDPA.
        **kwargs: handed on to SDPA.
    Returns:
        ([B, T, Hq, D], None): there are no attention weights to return.
    Raises:
        ValueError: a mask other than causal with left padding, training mode, or an argument that
            changes the attention in a way mac_attn does not know.
    """
    layer: MacLayer | None = getattr(key, "mac_layer", None)
    is_local = sliding_window is not None or (layer is not None and not layer.is_full_attention)
    if layer is not None:
        try:
            _check_supported(module, kwargs)
            if not is_local:
                layer.observe(attention_mask, query)
        except ValueError:
            layer.length -= query.shape[2]  # as if the refused call had not been made
            raise

    def sdpa() -> tuple[Tensor, None]:
        with measured(query.device):
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, **kwargs
            )

    if layer is None or is_local:
        return sdpa()
    mode = layer.shared.mode
    if query.shape[2] > 1:
        output = sdpa()
        if mode == "reuse":
            layer.seed(query, scaling)
        return output
    if mode == "sdpa":
        return sdpa()
    with measured(query.device):
        if mode == "packed-sdpa":
            return _packed_sdpa(query, key, value, attention_mask, scaling), None
        return layer.decode(query, scaling), None


def _check_supported(module: nn.Module, kwargs: dict[str, Any]) -> None:
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"MacCache does not support attention with `{name}`; use a DynamicCache"
            )
    if module.training and torch.is_grad_enabled():
        raise ValueError("MacCache is for inference: call model.eval() or use torch.no_grad()")


def _packed_sdpa(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None
) -> Tensor:
    """SDPA of single new queries, the query heads of a KV head as rows of one matrix.

    The same result as SDPA with `enable_gqa`, which transformers calls for an unpadded batch, but
    much faster on a CPU in bfloat16: the stronger baseline. `[B, Hq, 1, D]` to `[B, 1, Hq, D]`.
    """
    rows = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])
    out = scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling)
    return out.flatten(1, 2)[:, None]
