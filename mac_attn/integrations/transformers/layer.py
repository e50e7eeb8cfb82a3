"""One attention layer of a MacCache: its KV store and its reuse rings."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

import mac_attn

from .layout import RequestLayout

Mode = Literal["reuse", "exact", "sdpa", "packed-sdpa"]


class Shared:
    """What the layers of one MacCache have in common."""

    def __init__(
        self,
        max_length: int,
        batch_size: int | None,
        rotary: mac_attn.RotaryEmbedding | None,
        mode: Mode,
    ) -> None:
        self.max_length = max_length
        self.batch_size = batch_size
        self.rotary = rotary
        self.mode: Mode = mode
        self.layout = RequestLayout(max_length)


class MacLayer(CacheLayerMixin):
    """KV store and reuse rings of one attention layer; `MacCache` makes them.

    `key_store` and `value_store` are dense `[batch, max_length, Hkv, D]` (token-major: a paged NHD
    cache with one page per request), allocated by the first `update`. `keys` and `values` are what
    transformers expects of a preallocated layer: all of them as `[batch, Hkv, max_length, D]`.
    """

    key_store: Tensor
    value_store: Tensor

    is_compileable = False
    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        shared: Shared,
        group_size: int,
        is_full_attention: bool,
        config: mac_attn.ReuseConfig | None,
    ) -> None:
        super().__init__()
        self.shared = shared
        self.group_size = group_size
        self.is_full_attention = is_full_attention
        self.config = config
        self.length = 0
        self.reuse: mac_attn.ReuseCache | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch, heads, dtype and device of the first keys `[B, Hkv, T, D]`."""
        if key_states.shape != value_states.shape:
            raise ValueError(
                f"MacCache needs keys and values of one shape; got {tuple(key_states.shape)} and "
                f"{tuple(value_states.shape)}"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = self.shared.batch_size or key_states.shape[0]
        self._allocate(*key_states.shape[1::2])
        self.is_initialized = True

    # A cache made under inference_mode would hold inference tensors, which nothing outside that
    # mode may update in place.
    @torch.inference_mode(False)
    def _allocate(self, num_kv_heads: int, head_dim: int) -> None:
        shape = (self.batch_size, self.shared.max_length, num_kv_heads, head_dim)
        self.key_store = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.value_store = torch.empty_like(self.key_store)
        self.keys = self.key_store.transpose(1, 2)
        self.values = self.value_store.transpose(1, 2)
        self.slots = torch.arange(self.batch_size, dtype=torch.int32, device=self.device)
        if self.is_full_attention and self.config is not None:
            self.reuse = mac_attn.ReuseCache(
                self.config,
                num_slots=self.batch_size,
                num_qo_heads=num_kv_heads * self.group_size,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                dtype=self.dtype,
                device=self.device,
                rotary=self.shared.rotary,
            )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values `[B, Hkv, T, D]` in place; views of all, `[B, Hkv, n, D]`."""
        batch, _, new, _ = key_states.shape
        another_batch = self.length == 0 and self.shared.batch_size is None
        if not self.is_initialized or (another_batch and batch != self.batch_size):
            self.lazy_initialization(key_states, value_states)
        if batch != self.batch_size:
            raise ValueError(
                f"the MacCache holds {self.batch_size} requests, the model was given {batch}; "
                "pass MacCache(batch_size=batch * num_beams) or call reset() before another batch"
            )
        end = self.length + new
        if end > self.shared.max_length:
            raise ValueError(
                f"the MacCache is full: {self.length} tokens and {new} more exceed its max_length "
                f"{self.shared.max_length}; make it with a larger MacCache(max_length=...)"
            )
        self.key_store[:, self.length : end] = key_states.detach().transpose(1, 2)
        self.value_store[:, self.length : end] = value_states.detach().transpose(1, 2)
        self.length = end
        keys = self.key_store[:, :end].transpose(1, 2)
        # The attention function gets no cache, only this tensor, so the tensor brings its layer
        # along. An attribute marks exactly this object: a model that changes the keys on the way (a
        # copy, a cast, repeated heads) loses it and falls back to SDPA, which is right for whatever
        # it made. A table by storage address would claim those too, and could outlive the storage.
        keys.mac_layer = self  # type: ignore[attr-defined]
        return keys, self.value_store[:, :end].transpose(1, 2)

    def _paging(self) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        layout = self.shared.layout
        return (
            (layout.pages(self.key_store), layout.pages(self.value_store)),
            layout.block_table(self.device),
            layout.seq_lens(self.length, self.device),
        )

    def observe(self, attention_mask: Tensor | None, query: Tensor) -> None:
        """Learn the padding from the mask of a forward; ValueError for another kind of mask."""
        self.shared.layout.observe(attention_mask, query.shape[0], query.shape[2], self.length)

    def decode(self, query: Tensor, sm_scale: float | None) -> Tensor:
        """Attention of one new query per request, `[B, Hq, 1, D]`; returns `[B, 1, Hq, D]`."""
        query = query.detach()[:, :, 0]
        reuse = self.reuse if self.shared.mode == "reuse" else None
        slots = None if reuse is None else self.slots
        kv_cache, block_table, seq_lens = self._paging()
        out = mac_attn.decode(
            query, kv_cache, block_table, seq_lens, reuse=reuse, slots=slots, sm_scale=sm_scale
        )
        assert isinstance(out, Tensor)  # a pair only with `return_lse`
        return out.unsqueeze(1)

    def seed(self, query: Tensor, sm_scale: float | None) -> None:
        """Write ring entries for the last of the queries `[B, Hq, T, D]` that joined the cache."""
        if self.reuse is None:
            return
        kv_cache, block_table, seq_lens = self._paging()
        query = query.detach().transpose(1, 2)
        new = min(query.shape[1], self.reuse.cfg.window)
        counts = [min(new, n) for n in self.shared.layout.lengths(self.length)]
        # A request with fewer tokens has padding among the last queries: then they go one by one.
        whole = all(count == new for count in counts)
        parts = [(0, len(counts), new)] if whole else [(b, b + 1, n) for b, n in enumerate(counts)]
        for first, last, count in parts:
            if count:
                mac_attn.seed(
                    self.reuse,
                    query[first:last, -count:],
                    kv_cache,
                    block_table[first:last],
                    seq_lens[first:last],
                    slots=self.slots[first:last],
                    sm_scale=sm_scale,
                )

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
        """Forget the last `-tokens_to_remove` tokens (not positive, as transformers passes it).

        A positive number is the length to keep, as early releases of transformers 5 pass it.
        """
        length = tokens_to_remove if tokens_to_remove > 0 else self.length + tokens_to_remove
        if length < 0:
            raise ValueError(
                f"tokens_to_remove is {tokens_to_remove}, must be at least {-self.length}"
            )
        if length >= self.length:
            return
        self.length = length
        if self.reuse is not None:
            self.reuse.truncate(self.slots, self.shared.layout.seq_lens(self.length, self.device))

    def reset(self) -> None:
        """Empty the layer; its memory is kept for a batch of the same size."""
        self.length = 0
        if self.reuse is not None:
            self.reuse.reset()

    def copy_rows(self, src: list[int], dst: list[int]) -> None:
        """Overwrite the requests `dst[i]` with `src[i]`, all at once."""
        if not self.is_initialized:
            return
        for store in (self.key_store, self.value_store):
            store[dst, : self.length] = store[src, : self.length]
        if self.reuse is not None:
            # `fork` starts the statistics of a copy anew; here they are those of the whole search.
            counters = self.reuse.counters.clone()
            self.reuse.fork(src, dst)
            self.reuse.counters.copy_(counters)

    def select_rows(self, rows: list[int]) -> None:
        """Make the batch the requests `rows` of this one, in that order; its size may change.

        The statistics start anew.
        """
        if not self.is_initialized:
            return
        keys, values, reuse = self.key_store, self.value_store, self.reuse
        self.batch_size = len(rows)
        self._allocate(*keys.shape[2:])
        self.key_store[:, : self.length] = keys[rows, : self.length]
        self.value_store[:, : self.length] = values[rows, : self.length]
        if reuse is not None and self.reuse is not None:
            index = torch.tensor(rows, device=self.device)
            self.reuse.ring.copy_(reuse.ring.index_select(0, index))
            self.reuse.counters.zero_()
