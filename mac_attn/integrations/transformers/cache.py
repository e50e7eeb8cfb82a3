"""`MacCache`: the KV cache of a transformers model together with its reuse rings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

import mac_attn
from mac_attn._checks import check_int, check_type

from .float8 import FLOAT8
from .kinds import layer_kinds
from .layer import MacLayer
from .rotation import (
    PROBE_TOKENS,
    Link,
    Rotation,
    check_rotations,
    find_rotations,
    probe_queries,
)
from .shared import WITH_RINGS, Mode, Shared
from .support import Refusal, check_model

logger = logging.getLogger(__name__)

_DEFAULT_CONFIG = mac_attn.ReuseConfig()
Rotary = mac_attn.RotaryEmbedding | Sequence[mac_attn.RotaryEmbedding | None] | None


class MacCache(Cache):
    """A preallocated KV cache whose decode steps reuse attention, for transformers models.

    Works with every model whose attention goes through transformers' attention interface and is
    plain causal attention, in any of its layers; docs/transformers.md lists them. Left-padded
    batches, beam search, assisted decoding, chunked prefill and continuing a conversation work as
    with transformers' own caches. For inference: it keeps no gradients, and a backward pass raises.

    Args:
        model: the model, or a wrapper of it, with attention implementation "mac". With a `config`
            it is run once, on 16 tokens, to see how each layer rotates queries.
        max_length: tokens per request that the cache can hold, padding included.
        batch_size: requests per batch (times beams or returned sequences). None takes it from the
            first forward, and anew after `reset()`.
        config: what to reuse when, one for all layers or one for each (`Calibration.configs`); None
            means exact decode attention.
        kv_dtype: torch.float8_e4m3fn keeps keys and values as float8, in layers with full
            attention, at half the memory and reads of bfloat16; None, in the model's dtype. Each KV
            head has a scale for its keys and one for its values, set by the first tokens of a batch
            so that 16 times their largest number still fits; what exceeds that becomes the largest
            number. Prefill attends to a copy in the model's dtype.
        rotary: how queries are rotated, one for all layers or one for each, with None for a layer
            that does not rotate. None takes it from the model, and follows it if its frequencies
            change while the cache is empty (`model.to(dtype)` rounds them).

    Attributes:
        mode: what a decode step runs: "reuse", "draft" (which reuses, too, and leaves nothing to
            reuse), "verify" (which reuses nothing and leaves something; `Lossless` has these two),
            "exact" (`mac_attn.decode` without reuse), "sdpa" (as transformers calls it) or
            "packed-sdpa" (SDPA with the query heads of a KV head as rows of one matrix), all on the
            same cache. It may be switched at any time, to compare; the reuse rings do not see steps
            taken in one of the last three modes and start anew after them.

    Raises:
        ValueError: an argument does not fit; transformers gives the model no SDPA; a layer keeps
            something else than keys and values; the model has an encoder, and a `config`; or a
            layer rotates its queries in a way that is not known, or that changes with the length.
        TypeError: an argument is of the wrong type.
    """

    layers: list[MacLayer]  # type: ignore[assignment] # lists of the base class are invariant

    def __init__(
        self,
        model: nn.Module,
        *,
        max_length: int,
        batch_size: int | None = None,
        config: mac_attn.ReuseConfig | Sequence[mac_attn.ReuseConfig] | None = _DEFAULT_CONFIG,
        rotary: Rotary = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        check_type("model", model, nn.Module)
        # The model itself, or what is inside a wrapper (torch.compile, PEFT).
        inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
        if inner is None:
            raise Refusal(f"model is a {type(model).__name__} without a transformers model in it")
        model = inner
        check_int("max_length", max_length, low=1)
        if batch_size is not None:
            check_int("batch_size", batch_size, low=1)
        if kv_dtype not in (None, FLOAT8):
            raise Refusal(f"kv_dtype is {kv_dtype}, must be None or {FLOAT8}")
        check_model(model)
        kinds = layer_kinds(model.config.get_text_config(decoder=True))
        configs = _per_layer("config", config, mac_attn.ReuseConfig, len(kinds))
        rotaries = _per_layer("rotary", rotary, mac_attn.RotaryEmbedding, len(kinds))

        # Not the config: a deep copy of the cache must go on watching the same model.
        self._model = Link(model)
        self._rotations: dict[int, Rotation | None] = {}
        strangers: list[str | None] = [None] * len(kinds)
        if config is not None or kv_dtype is not None:
            if getattr(model.config, "is_encoder_decoder", False):
                raise Refusal(
                    "encoder-decoder models are not served with a `config` or `kv_dtype`; use "
                    "EncoderDecoderCache(MacCache(model, max_length=..., config=None), "
                    "DynamicCache()), which is exact decode attention, or transformers' own cache"
                )
            probe = MacCache(model, max_length=PROBE_TOKENS, config=None)
        if config is not None and rotary is not None:
            check_rotations(model, probe, rotaries)
        elif config is not None:
            self._rotations = find_rotations(model, probe)
        elif kv_dtype is not None:
            probe_queries(model, probe)
        if kv_dtype is not None or (config is not None and rotary is None):
            strangers = [layer.stranger for layer in probe.layers]
        if config is not None and rotary is None:
            # What the probe did not see is never decoded here; see _warn_of_strangers.
            configs = [c if i in self._rotations else None for i, c in enumerate(configs)]
            rotaries = [r and r.embedding for r in map(self._rotations.get, range(len(kinds)))]
        mode: Mode = "exact" if config is None else "reuse"
        self._reuses = config is not None
        self._shared = Shared(max_length, batch_size, mode, kv_dtype is not None)
        layers = [
            MacLayer(self._shared, index, *kind, *each)
            for index, (kind, *each) in enumerate(zip(kinds, configs, rotaries, strict=True))
        ]
        for layer, stranger in zip(layers, strangers, strict=True):
            layer.stranger = stranger
        self._keepers = [layer for layer in layers if layer.kind != "none"]  # of keys and values
        self._shared.sharing = {x.index: x.rings for x in layers if x.kind == "none"}
        self._warned: set[str] = set()
        self._warn_of_strangers()
        super().__init__(layers=layers)  # type: ignore[arg-type] # as above

    def __repr__(self) -> str:
        first = self._keepers[0]
        stored = "empty"
        if first.is_initialized:
            stored = f"{first.batch_size} x {first.length} tokens in {first.key_store.dtype}"
        reusing = sum(layer.rings.config is not None for layer in self.layers)
        return (
            f"MacCache({len(self.layers)} layers, {reusing} that reuse, "
            f"max_length={self._shared.max_length}, mode={self.mode!r}): {stored}"
        )

    @property
    def mode(self) -> Mode:
        return self._shared.mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        modes = get_args(Mode)
        if mode not in modes:
            raise Refusal(f"mode is {mode!r}, must be one of {modes}")
        if mode in WITH_RINGS and not self._reuses:
            raise Refusal(f"mode {mode!r} needs a MacCache made with a `config`")
        self._shared.mode = mode

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values `[B, Hkv, T, D]` of a layer; views of all, `[B, Hkv, n, D]`.

        Raises:
            ValueError: the model's attention implementation is not "mac", the batch has another
                size than the cache, or `max_length` is exceeded.
        """
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if layer is self._keepers[0]:
            self._begin()
        try:
            if layer is None or layer.kind == "none":
                raise Refusal(
                    f"layer {layer_idx} has keys and values, but not in the model that the "
                    "MacCache was made for; make another MacCache"
                )
            if layer.length != self._shared.length:
                raise Refusal(
                    f"layer {layer_idx} was given keys and values twice in one forward, which a "
                    "MacCache cannot tell from two tokens; use transformers' own cache"
                )
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except Refusal:
            self._roll_back()
            raise
        # The attention function gets no cache, only these tensors, so they bring theirs along. An
        # attribute marks exactly this object: a model that changes the keys on the way (a copy, a
        # cast, repeated heads) loses it and falls back to SDPA, which is right for whatever it
        # made. A table by storage address would claim those too, and could outlive the storage.
        keys.mac_source = values.mac_source = self, layer  # type: ignore[attr-defined]
        return keys, values

    def _begin(self) -> None:
        """A forward begins: ValueError if the model, or the cache, is not fit for it."""
        model = self._model()
        if model is not None:
            implementation = model.config.get_text_config(decoder=True)._attn_implementation
            if implementation != "mac":
                raise Refusal(
                    f"the model's attention implementation is {implementation!r}, which would only "
                    "store in a MacCache; call model.set_attn_implementation('mac') first"
                )
        lengths = {layer.length for layer in self._keepers}
        if len(lengths) > 1:
            raise Refusal(
                "the layers of this MacCache have different lengths: a forward was interrupted "
                "(call reset() and prefill again), or the model gives a layer keys and values "
                "twice in one forward (use transformers' own cache; for the decoder of an "
                "encoder-decoder model wrap the MacCache in an EncoderDecoderCache)"
            )
        (self._shared.length,) = lengths
        if self._shared.length:
            self._warn_of_strangers()
        self._follow_rotations()

    def _roll_back(self) -> None:
        """Make it as if the current forward had not begun."""
        for layer in self._keepers:
            layer.shorten(self._shared.length)

    def _warn_of_strangers(self) -> None:
        """Say once which layers were attended without mac_attn in the forward that has ended."""
        reasons: dict[str, list[int]] = {}
        for layer in self._keepers:
            if layer.stranger is not None:
                if layer.is_float8:
                    raise Refusal(
                        f"layer {layer.index} cannot have kv_dtype=torch.float8_e4m3fn, as "
                        f"{layer.stranger}; leave it out"
                    )
                reasons.setdefault(layer.stranger, []).append(layer.index)
        for reason, indices in reasons.items():
            if reason not in self._warned:
                self._warned.add(reason)
                logger.warning(
                    "%s of %d layers are left to SDPA, and save nothing: %s (layers %s)",
                    len(indices),
                    len(self._keepers),
                    reason,
                    ", ".join(map(str, indices)),
                )

    def _follow_rotations(self) -> None:
        """Take over frequencies of the model that have changed, or ValueError: it is too late."""
        # Layers share their rotations.
        rotations = {id(r): r for r in self._rotations.values() if r is not None}
        changed = {key: r for key, r in rotations.items() if r.changed()}
        if changed and self._shared.length:
            raise Refusal(
                "the model's rotary frequencies have changed (model.to(dtype) rounds them) "
                "while this MacCache held tokens; call reset() and prefill again"
            )
        for rotation in changed.values():
            rotation.follow()
        for index, its in self._rotations.items():
            if its is not None and id(its) in changed:
                self.layers[index].rings.rotary = its.embedding
                self.layers[index].rings.reuse = None

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Any:
        """ValueError: convolutions, recurrences and indexers keep more than keys and values."""
        raise Refusal(
            "a layer keeps a convolution, a recurrence or an indexer, and a MacCache only keys and "
            "values; use transformers' own cache"
        )

    update_recurrent_state = update_indexer = update_conv_state

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
            raise Refusal("no statistics: the MacCache has no `config` or was never used")
        per_slot = torch.stack([layer.per_slot for layer in stats]).sum(0)
        # Every layer has made the same steps, but not all need have the same heads.
        heads = zip(*((layer.num_qo_heads, layer.num_kv_heads) for layer in stats), strict=True)
        mean = [sum(counts) / len(stats) for counts in heads]
        return mac_attn.ReuseStats(per_slot, *mean)  # which need not be whole

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns in use, left padding included."""
        return self._keeper(layer_idx).length

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int) -> tuple[int, int]:
        """(length, offset) of the keys that the next `update` of `query_length` tokens returns."""
        return self._keeper(layer_idx).get_mask_sizes(query_length)

    def _keeper(self, layer_idx: int) -> MacLayer:
        """The layer, or for one that keeps nothing, the first one that does."""
        layer = self.layers[layer_idx]
        return layer if layer.kind != "none" else self._keepers[0]

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
        for layer in self._keepers:
            layer.copy_rows(src, dst)
        self._select_padding(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every request `repeats` times, as for several continuations of one prompt."""
        self._select_rows([row for row in range(self._batch()) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the requests `indices`, in that order."""
        self._select_rows(torch.arange(self._batch())[indices.cpu()].tolist())

    def _batch(self) -> int:
        """Requests in the cache; 0 before its first use."""
        first = self._keepers[0]
        return first.batch_size if first.is_initialized else 0

    def _select_rows(self, rows: list[int]) -> None:
        if self._shared.batch_size is not None:
            self._shared.batch_size = len(rows)
        for layer in self._keepers:
            layer.select_rows(rows)
        self._select_padding(rows)

    def _select_padding(self, rows: list[int]) -> None:
        padding = self._shared.layout.padding
        self._shared.layout.set_padding([padding[row] for row in rows] if padding else [])


def _per_layer(name: str, value: Any, kind: type, layers: int) -> list[Any]:
    """One of `kind` for every layer, from one for all or a list of them; None stands for none."""
    if value is None or isinstance(value, kind):
        return [value] * layers
    if not isinstance(value, Sequence):
        check_type(name, value, kind)
    if len(value) != layers:
        raise Refusal(
            f"{name} has {len(value)} entries, must be one for all layers or a list of {layers}, "
            "one for each layer"
        )
    for one in value:
        if one is not None or name == "config":
            check_type(name, one, kind)
    return list(value)
