"""The keys and values of one layer in a MacCache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

import mac_attn
from mac_attn._checks import check_int

from .float8 import FLOAT8, Scales
from .gradients import without_gradients
from .kinds import Kind
from .rings import Rings
from .shared import Shared
from .support import Refusal

# Why keys that have just been stored were not attended by mac_attn, should it stay like that.
_STRANGERS: dict[Kind, str] = {
    "full": "the model changes keys between its cache and its attention",
    "local": "they have sliding-window or chunked attention",
}


class MacLayer(CacheLayerMixin):
    """KV store of one layer, and the rings of all that attend to it; `MacCache` makes them.

    `key_store` and `value_store` are dense `[batch, max_length, Hkv, D]` (token-major: a paged NHD
    cache with one page per request), allocated by the first `update`; the rings by the first
    attention. `keys` and `values` are views of the tokens in use, `[batch, Hkv, n, D]`. They may be
    written, which empties the rings; another tensor cannot take their place.

    A layer of kind "none" has no store: its `rings` are for the keys of another one, if it attends.
    """

    key_store: Tensor
    value_store: Tensor
    scales: Scales  # of a float8 store, set by the first tokens

    is_compileable = False
    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        shared: Shared,
        index: int,
        kind: Kind,
        window: int | None,
        config: mac_attn.ReuseConfig | None,
        rotary: mac_attn.RotaryEmbedding | None,
    ) -> None:
        # Not super().__init__(), which would assign `keys` and `values`.
        self.shared = shared
        self.index = index
        self.kind = kind
        self.is_float8 = shared.float8 and kind == "full"
        self.window = window  # of a local layer, where the config tells
        self.rings = Rings(index, config, rotary, keeper=None if kind == "none" else index)
        self.readers = [self.rings]  # of all layers that attend to these keys
        self.length = 0
        self.is_initialized = False
        self.stranger: str | None = None  # why the last keys were attended without mac_attn
        self._is_local = False
        self._versions: tuple[int, int] | None = None

    def __repr__(self) -> str:
        stored = "empty"
        if self.is_initialized:
            batch, _, heads, dim = self.key_store.shape
            stored = f"[{batch}, {heads}, {self.length}, {dim}] {self.key_store.dtype}"
        return f"MacLayer({self.kind}, {stored}, reuse={self.reuse is not None})"

    def __getstate__(self) -> dict[str, Any]:
        self._notice_edits()
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.sign()

    @property
    def reuse(self) -> mac_attn.ReuseCache | None:
        """The layer's own rings."""
        return self.rings.reuse

    def rings_of(self, module: nn.Module) -> Rings:
        """The rings of the attention module that attends to these keys."""
        rings = self.shared.sharing.get(getattr(module, "layer_idx", self.index), self.rings)
        if rings.keeper is None:
            rings.keeper = self.index
            self.readers.append(rings)
        return rings if rings.keeper == self.index else self.rings

    @property
    def keys(self) -> Tensor | None:
        return self._view(self.key_store) if self.is_initialized else None

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._refuse_assignment("keys")

    @property
    def values(self) -> Tensor | None:
        return self._view(self.value_store) if self.is_initialized else None

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._refuse_assignment("values")

    def _view(self, store: Tensor) -> Tensor:
        return store[:, : self.length].transpose(1, 2)

    def _refuse_assignment(self, name: str) -> None:
        raise Refusal(
            f"`{name}` of a MacCache cannot be assigned, as its rings remember what attention to "
            "the tokens gave: crop() forgets the last tokens, writing into the tensor empties the "
            "rings, and for anything else use transformers' DynamicCache"
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch, heads, dtype and device of the first keys `[B, Hkv, T, D]`."""
        self.dtype = _dtype(key_states, value_states)
        self.device = key_states.device
        self.batch_size = self.shared.batch_size or key_states.shape[0]
        self._allocate(*(states.shape[1::2] for states in (key_states, value_states)))
        for rings in self.readers:
            rings.reuse = None
        self.is_initialized = True

    # A cache made under inference_mode would hold inference tensors, which nothing outside that
    # mode may update in place.
    @torch.inference_mode(False)
    def _allocate(self, *heads_and_dims: torch.Size) -> None:
        self.key_store, self.value_store = (
            torch.empty(
                (self.batch_size, self.shared.max_length, *size),
                dtype=FLOAT8 if self.is_float8 else self.dtype,
                device=self.device,
            )
            for size in heads_and_dims
        )
        self.slots = torch.arange(self.batch_size, dtype=torch.int32, device=self.device)
        self.sign()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values `[B, Hkv, T, D]` in place; views of all, `[B, Hkv, n, D]`."""
        self._check(key_states, value_states)
        batch, _, new, _ = key_states.shape
        another = self.shared.batch_size is None and batch != getattr(self, "batch_size", batch)
        another |= not self.is_initialized or self.dtype != _dtype(key_states, value_states)
        if self.length == 0 and (another or key_states.device != self.device):
            self.lazy_initialization(key_states, value_states)
        if batch != self.batch_size:
            raise Refusal(
                f"the MacCache holds {self.batch_size} requests, the model was given {batch}; "
                "pass MacCache(batch_size=batch * num_beams) or call reset() before another batch"
            )
        end = self.length + new
        if end > self.shared.max_length:
            raise Refusal(
                f"the MacCache is full: {self.length} tokens and {new} more exceed its max_length "
                f"{self.shared.max_length}; make it with a larger MacCache(max_length=...)"
            )
        self._notice_edits()
        new_states = key_states.detach().transpose(1, 2), value_states.detach().transpose(1, 2)
        if self.is_float8:
            if self.length == 0:
                self.scales = Scales.of(new_states)
            new_states = self.scales.narrow(new_states)
        self.key_store[:, self.length : end], self.value_store[:, self.length : end] = new_states
        self.sign()
        self.length = end
        for rings in self.readers:
            rings.claimed = False
        self.stranger = _STRANGERS[self.kind]
        return (
            without_gradients(self._view(self.key_store), key_states),
            without_gradients(self._view(self.value_store), value_states),
        )

    def decodes(self, new: int) -> bool:
        """Whether so many new tokens are a step of `mac_attn.decode`, not a part of a prompt."""
        few = new <= mac_attn.MAX_QUERY_TOKENS
        return new == 1 or (few and min(self.shared.layout.lengths(self.length)) > new)

    def wide(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Hkv, n, D]` in the model's dtype; of a float8 store copies."""
        k, v = self.key_store[:, : self.length], self.value_store[:, : self.length]
        if self.is_float8:
            k, v = self.scales.wide((k, v), self.dtype)
        return k.transpose(1, 2), v.transpose(1, 2)

    def _check(self, key_states: Tensor, value_states: Tensor) -> None:
        """ValueError unless these are keys and values of the model that the layer has seen."""
        if key_states.ndim != 4 or key_states.shape[:3:2] != value_states.shape[:3:2]:
            raise Refusal(
                "MacCache needs keys and values [batch, heads, tokens, dim] of the same tokens; "
                f"got {list(key_states.shape)} and {list(value_states.shape)}"
            )
        if not self.is_initialized:
            return
        for name, states, store in (
            ("keys", key_states, self.key_store),
            ("values", value_states, self.value_store),
        ):
            have, want = states.shape[1::2], store.shape[2:]
            if have != want:
                raise Refusal(
                    f"{name} of layer {self.index} have {have[0]} heads of {have[1]}, the MacCache "
                    f"was made for a model that has {want[0]} of {want[1]}; make another MacCache"
                )
        dtype, device = _dtype(key_states, value_states), key_states.device
        if self.length and (dtype, device) != (self.dtype, self.device):
            raise Refusal(
                f"keys and values are {dtype} on {device}, the MacCache holds {self.length} "
                f"tokens in {self.dtype} on {self.device}; call reset() first"
            )

    def sign(self) -> None:
        """Remember the stores as mac_attn has left them."""
        self._versions = None
        if self.is_initialized and not self.key_store.is_inference():
            self._versions = (self.key_store._version, self.value_store._version)

    def _notice_edits(self) -> None:
        """Empty the rings if somebody else has written into the stores since."""
        versions = self._versions
        self.sign()
        if versions not in (None, self._versions):
            for rings in self.readers:
                rings.reset()

    def check_local(self, mask: Tensor | None) -> None:
        """ValueError if the mask of a local layer is not local.

        Moshi leaves that to transformers' own cache, which forgets the keys outside the window.
        """
        if self.window is None or self.length <= self.window or self._is_local:
            return
        old = None if mask is None else mask[..., -1, : self.length - self.window]
        if old is None or bool((old if old.dtype == torch.bool else old == 0).any()):
            raise Refusal(
                f"layer {self.index} has a window of {self.window} tokens, but its mask shows it "
                "all of them, which needs a cache that forgets; use transformers' own"
            )
        self._is_local = True  # looked at once

    def paging(self) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """The cache, block table and lengths as `mac_attn.decode` takes them."""
        layout = self.shared.layout
        return (
            (layout.pages(self.key_store), layout.pages(self.value_store)),
            layout.block_table(self.device),
            layout.seq_lens(self.length, self.device),
        )

    @property
    def scaling(self) -> dict[str, Any]:
        """The scales as `mac_attn.decode` takes them."""
        return {"k_scale": self.scales.k, "v_scale": self.scales.v} if self.is_float8 else {}

    def get_seq_length(self) -> int:
        """Columns in use, left padding included."""
        return self.length

    def get_max_length(self) -> int:
        """Columns that the store can hold."""
        return self.shared.max_length

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """(length, offset) of the keys that the next `update` of `query_length` tokens returns.

        Early releases of transformers 5 pass the positions of those tokens instead of their number.
        """
        new = len(query_length) if isinstance(query_length, Tensor) else query_length
        return self.length + new, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget tokens as the DynamicCache of the installed transformers does.

        `-n` forgets the last n, or all where there are fewer. A positive number was the length to
        keep in early releases of transformers 5, and is a ValueError in later ones.
        """
        check_int("tokens_to_remove", tokens_to_remove, low=-(2**31))
        twin = DynamicLayer()
        if self.length:
            twin.update(*[torch.empty(1, 1, self.length, 1, device="meta")] * 2)
        twin.crop(tokens_to_remove)
        self.shorten(twin.get_seq_length())

    def shorten(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        if length < self.length:
            self.length = length
            lens = self.shared.layout.seq_lens(length, self.device)
            for rings in self.readers:
                rings.shorten(self.slots, lens)

    def reset(self) -> None:
        """Empty the layer; its memory is kept for a batch of the same size."""
        self.length = 0
        for rings in self.readers:
            rings.reset()

    def _bytes(self) -> tuple[Tensor, Tensor]:
        """The stores, float8 as bytes, which may be indexed on every device."""
        k, v = self.key_store, self.value_store
        return (k.view(torch.uint8), v.view(torch.uint8)) if self.is_float8 else (k, v)

    def copy_rows(self, src: list[int], dst: list[int]) -> None:
        """Overwrite the requests `dst[i]` with `src[i]`, all at once."""
        if not self.is_initialized:
            return
        self._notice_edits()
        for store in self._bytes():
            store[dst, : self.length] = store[src, : self.length]
        self.sign()
        for rings in self.readers:
            rings.copy_rows(src, dst)

    def select_rows(self, rows: list[int]) -> None:
        """Make the batch the requests `rows` of this one, in that order; its size may change.

        The statistics start anew.
        """
        if not self.is_initialized:
            return
        self._notice_edits()
        stores = self._bytes()
        self.batch_size = len(rows)
        self._allocate(*(store.shape[2:] for store in stores))
        for new, old in zip(self._bytes(), stores, strict=True):
            new[:, : self.length] = old[rows, : self.length]
        self.sign()
        for rings in self.readers:
            rings.select_rows(self, rows)


def _dtype(keys: Tensor, values: Tensor) -> torch.dtype:
    """What holds both: under autocast rotated keys are wider than values."""
    return torch.promote_types(keys.dtype, values.dtype)
