"""The attention function that a transformers model calls when its implementation is "mac"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .cache import MacCache
from .float8 import FLOAT8
from .layer import MacLayer
from .rings import Rings
from .shared import WITH_RINGS, Mode
from .sinks import attention_with_sinks, check_sinks
from .support import Refusal, check_config, check_keywords, check_module
from .timer import measured


def mac_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: `mac_attn.decode` for a few new tokens in a MacCache, else SDPA.

    With sinks what is not decode is plain torch, see sinks.py.

    Args:
        module: the model's attention module.
        query: [B, Hq, T, D] post-RoPE.
        key: [B, Hkv, n, D]. What `MacCache.update` returned; any other tensor means SDPA.
        value: [B, Hkv, n, D], likewise.
        attention_mask: bool or additive float [B, 1, T, n], or None for plain causal attention.
        dropout, scaling, is_causal, position_bias: as for SDPA, in transformers' order; `scaling`
            is the factor of the logits, and None is 1 / sqrt(D).
        s_aux: [Hq] sinks, see `mac_attn.decode`, or None.
        **kwargs: `sliding_window` not None marks a layer with local attention, which is left to
            SDPA. Others must be None, or known to change nothing.
    Returns:
        ([B, T, Hq, D], None): there are no attention weights to return.
    Raises:
        ValueError: transformers gives the model no SDPA; a keyword that SDPA would swallow; fewer
            queries than keys and no mask. In a MacCache also a mask other than causal with left
            padding, dropout, a position bias, training mode, and heads that mac_attn does not do.
            The cache is then as it was before the forward.
    """
    cache: MacCache | None
    layer: MacLayer | None
    cache, layer = getattr(key, "mac_source", (None, None))
    rings: Rings | None = None if layer is None else layer.rings_of(module)
    try:
        check_module(module)
        check_keywords(kwargs)
        if layer is None and key.dtype == FLOAT8:
            raise Refusal(
                "the model changes keys between its cache and its attention, which keys of a "
                "MacCache with kv_dtype=torch.float8_e4m3fn do not bear; leave it out"
            )
        new, length = query.shape[2], key.shape[2]
        sinks = None if s_aux is None else check_sinks(s_aux, query.shape[1])
        if sinks is not None and (dropout or position_bias is not None):
            raise Refusal(
                f"dropout is {dropout} and position_bias is "
                f"{'None' if position_bias is None else 'given'}, which attention with sinks does "
                "not do: call model.eval(), or use attn_implementation='eager'"
            )
        if attention_mask is None and 1 < new < length and _is_causal(module, is_causal):
            # SDPA would let the first query see the first key alone, the second two, and so on.
            raise Refusal(
                f"attention_mask is None for {new} queries and {length} keys: the model must pass "
                "a mask that tells which tokens they may see"
            )
        mode: Mode | None = None
        if layer is not None and rings is not None:
            local = kwargs.get("sliding_window") is not None
            mode = rings.claim(layer, query, value, attention_mask, local=local)
        if mode is not None:
            _check_cached(module, dropout, position_bias, new, attention_mask, is_causal)
    except Refusal:
        if cache is not None:
            cache._roll_back()
        raise

    with measured(query.device):
        decodes = layer is not None and mode in (*WITH_RINGS, "exact") and layer.decodes(new)
        if layer is not None and layer.is_float8 and not decodes:
            key, value = layer.wide()  # a copy, for this call
        if layer is not None and rings is not None and mode is not None and decodes:
            output = rings.decode(layer, query, scaling, sinks, mode)
        elif sinks is not None:
            causal = _is_causal(module, is_causal)
            output = attention_with_sinks(
                query, key, value, attention_mask, sinks, scaling, causal=causal
            )
        elif mode == "packed-sdpa" and new == 1:
            output = _packed_sdpa(query, key, value, attention_mask, scaling)
        else:
            output, _ = sdpa_attention_forward(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                is_causal=is_causal,
                position_bias=position_bias,
                **kwargs,
            )
    if layer is not None and rings is not None and mode in ("reuse", "verify") and not decodes:
        rings.seed(layer, query, scaling)
    return output, None


def mac_mask(**kwargs: Any) -> Tensor | None:
    """The mask of SDPA, which "mac" takes too; None only where SDPA's own causal mask is meant.

    Raises:
        ValueError: transformers gives the model no SDPA.
    """
    config = kwargs.get("config")
    if config is not None:
        check_config(config)
    new, length = kwargs.get("q_length"), kwargs.get("kv_length")
    # Gemma 4 drops queries between its mask and the layers that share KV, and a mask that is not
    # there is not cut; with "sdpa", whose name it looks for, it does not drop them then.
    if new != 1 and (new != length or getattr(config, "num_kv_shared_layers", 0)):
        kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(**kwargs)


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _check_cached(
    module: nn.Module,
    dropout: float,
    position_bias: Tensor | None,
    new: int,
    attention_mask: Tensor | None,
    is_causal: bool | None,
) -> None:
    """What SDPA can do and attention in a MacCache cannot."""
    if module.training and torch.is_grad_enabled():
        raise Refusal("MacCache is for inference: call model.eval() or use torch.no_grad()")
    if dropout:
        raise Refusal(f"dropout is {dropout} with a MacCache, must be 0: call model.eval()")
    if position_bias is not None:
        raise Refusal(
            "position_bias: a MacCache needs attention without a bias; use transformers' own cache"
        )
    if new > 1 and attention_mask is None and not _is_causal(module, is_causal):
        raise Refusal("is_causal is False: a MacCache needs causal attention")


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
