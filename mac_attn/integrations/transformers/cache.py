"""`MacCache`: the KV cache of a transformers model together with its reuse rings."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

import mac_attn
from mac_attn._checks import check_type

from .layer import MacLayer, Mode, Shared

logger = logging.getLogger(__name__)

_DEFAULT_CONFIG = mac_attn.ReuseConfig()
_SLIDING, _FULL = "sliding_attention", "full_attention"


class MacCache(Cache):
    """A preallocated KV cache whose decode steps reuse attention, for `past_key_values`.

    Works with every transformers model whose attention goes through the attention interface and is
    plain causal (grouped-query) attention with rotary embedding: Llama, Qwen2, Qwen3, Mistral and
    their like. Left-padded batches, beam search, assisted decoding, chunked prefill and continuing
    a conversation work as with transformers' own caches. For inference: it keeps no gradients.

    Args:
        model: the model, with `attn_implementation="mac"` when it is called.
        max_length: tokens per request that the cache can hold, padding included.
        batch_size: requests per batch (times beams or returned sequences). None takes it from the
            first forward, and anew after `reset()`.
        config: what to reuse when, one for all layers or one for each (`Calibration.configs`); None
            means exact decode attention.
        rotary: the model's rotary embedding. None takes it from the model, which tells all but
            whether it pairs dimensions interleaved (GPT-J, Cohere, GLM).

    Attributes:
        mode: what a decode step runs: "reuse", "exact" (`mac_attn.decode` without reuse), "sdpa"
            (as transformers calls it) or "packed-sdpa" (SDPA with the query heads of a KV head as
            rows of one matrix), all on the same cache. It may be switched at any time, to compare;
            the reuse rings do not see steps taken in another mode and start anew after them.

    Raises:
        ValueError: an argument does not fit, a layer has attention of another kind than full or
            sliding-window, or the model's rotary embedding changes with the length.
    """

    layers: list[MacLayer]  # type: ignore[assignment] # lists of the base class are invariant

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_length: int,
        batch_size: int | None = None,
        config: mac_attn.ReuseConfig | Sequence[mac_attn.ReuseConfig] | None = _DEFAULT_CONFIG,
        rotary: mac_attn.RotaryEmbedding | None = None,
    ) -> None:
        for name, value in (("max_length", max_length), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, must be at least 1")
        text_config = model.config.get_text_config(decoder=True)
        layer_types = _layer_types(text_config)
        if unknown := set(layer_types) - {_FULL, _SLIDING}:
            raise ValueError(
                f"MacCache supports layers of type {_FULL!r} and {_SLIDING!r}; this model also has "
                f"{sorted(unknown)}"
            )
        if _SLIDING in layer_types:
            logger.warning(
                "%d of %d layers use sliding-window attention; they are left to SDPA",
                layer_types.count(_SLIDING),
                len(layer_types),
            )
        configs = _layer_configs(config, len(layer_types))
        if config is not None and rotary is None:
            rotary = mac_attn.RotaryEmbedding.from_transformers(model)
        mode: Mode = "exact" if config is None else "reuse"
        self._shared = Shared(max_length, batch_size, rotary, mode)
        group_size = text_config.num_attention_heads // text_config.num_key_value_heads
        super().__init__(
            layers=[
                MacLayer(self._shared, group_size, kind == _FULL, layer_config)
                for kind, layer_config in zip(layer_types, configs, strict=True)
            ]
        )
        # Not the config: a deep copy of the cache must go on watching the same model.
        self._model = weakref.ref(model)

    @property
    def mode(self) -> Mode:
        return self._shared.mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        modes = get_args(Mode)
        if mode not in modes:
            raise ValueError(f"mode is {mode!r}, must be one of {modes}")
        if mode == "reuse" and self.layers[0].config is None:
            raise ValueError("mode 'reuse' needs a MacCache made with a `config`")
        self._shared.mode = mode

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values `[B, Hkv, T, D]` of a layer; views of all, `[B, Hkv, n, D]`.

        Raises:
            ValueError: the model's attention implementation is not "mac", the batch has another
                size than the cache, or `max_length` is exceeded.
        """
        model = self._model()
        if model is not None:
            implementation = model.config.get_text_config(decoder=True)._attn_implementation
            if implementation != "mac":
                raise ValueError(
                    f"the model's attention implementation is {implementation!r}, which would only "
                    "store in a MacCache; call model.set_attn_implementation('mac') first"
                )
        if layer_idx == 0 and self.layers[-1].length != self.layers[0].length:
            raise ValueError(
                "a forward was interrupted and left the layers of this MacCache with different "
                "lengths; call reset() and prefill again"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def layer_stats(self) -> list[mac_attn.ReuseStats | None]:
        """What reuse has saved in each layer; None for a layer that never reuses."""
        return [None if layer.reuse is None else layer.reuse.stats() for layer in self.layers]

    def stats(self) -> mac_attn.ReuseStats:
        """What reuse has saved in all layers together; its `steps` count every layer's.

        Raises:
            ValueError: no layer reuses: the cache was made with `config=None`, or never used.
        """
        stats = [layer for layer in self.layer_stats() if layer is not None]
        if not stats:
            raise ValueError("no statistics: the MacCache has no `config` or was never used")
        per_slot = torch.stack([layer.per_slot for layer in stats]).sum(0)
        return mac_attn.ReuseStats(per_slot, stats[0].num_qo_heads, stats[0].num_kv_heads)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens per request that the cache can hold, the same for every layer."""
        return self._shared.max_length

    get_max_cache_shape = get_max_length  # its name in early releases of transformers 5

    def reset(self) -> None:
        """Empty the cache for another batch."""
        super().reset()
        self._shared.layout.set_padding([])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue request `beam_idx[b]` as request b (beam search); only copies rows that move."""
        rows = beam_idx.tolist()
        moved = [(src, dst) for dst, src in enumerate(rows) if src != dst]
        if not moved:
            return
        src, dst = (list(side) for side in zip(*moved, strict=True))
        for layer in self.layers:
            layer.copy_rows(src, dst)
        self._select_padding(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every request `repeats` times, as for several continuations of one prompt."""
        self._select_rows([row for row in range(self._batch()) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the requests `indices`, in that order."""
        batch = list(range(self._batch()))
        self._select_rows([batch[i] for i in indices.tolist()])

    def _batch(self) -> int:
        """Requests in the cache; 0 before its first use."""
        return self.layers[0].batch_size if self.layers[0].is_initialized else 0

    def _select_rows(self, rows: list[int]) -> None:
        if self._shared.batch_size is not None:
            self._shared.batch_size = len(rows)
        for layer in self.layers:
            layer.select_rows(rows)
        self._select_padding(rows)

    def _select_padding(self, rows: list[int]) -> None:
        padding = self._shared.layout.padding
        self._shared.layout.set_padding([padding[row] for row in rows] if padding else [])


def _layer_configs(
    config: mac_attn.ReuseConfig | Sequence[mac_attn.ReuseConfig] | None, layers: int
) -> list[mac_attn.ReuseConfig | None]:
    if config is None or isinstance(config, mac_attn.ReuseConfig):
        return [config] * layers
    if len(config) != layers:
        raise ValueError(
            f"config has {len(config)} entries, must have 1 or {layers}, the number of layers"
        )
    for one in config:
        check_type("config", one, mac_attn.ReuseConfig)
    return list(config)


def _layer_types(config: PretrainedConfig) -> list[str]:
    """The kind of attention of every layer, in the words of transformers' `layer_types`."""
    if (layer_types := getattr(config, "layer_types", None)) is not None:
        return list(layer_types)
    is_sliding = getattr(config, "sliding_window", None) is not None
    return [_SLIDING if is_sliding else _FULL] * config.num_hidden_layers
