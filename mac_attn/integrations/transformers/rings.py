"""Attention of one layer to the keys in a MacCache, and its reuse rings."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import mac_attn

from .float8 import FLOAT8
from .gradients import without_gradients
from .shared import WITH_RINGS, Mode
from .support import Refusal

if TYPE_CHECKING:
    from .layer import MacLayer


class Rings:
    """Attention of one layer of the model: what it reuses, and how its queries turn.

    A layer that attends to the keys of an earlier one has rings of its own, as its queries are
    others.

    Attributes:
        index: of the attention layer in the model.
        config: None for a layer that never reuses.
        rotary: None for a layer that does not rotate.
        keeper: index of the layer that keeps the keys and values it attends to, once that is known.
            The methods get it as `store`.
        reuse: allocated when the layer first attends.
        claimed: whether it has attended to the newest keys.
    """

    def __init__(
        self,
        index: int,
        config: mac_attn.ReuseConfig | None,
        rotary: mac_attn.RotaryEmbedding | None,
        keeper: int | None,
    ) -> None:
        self.index = index
        self.config = config
        self.rotary = rotary
        self.keeper = keeper
        self.reuse: mac_attn.ReuseCache | None = None
        self.claimed = False

    @torch.inference_mode(False)
    def allocate(self, store: MacLayer, num_qo_heads: int) -> None:
        """Empty rings for the queries of that many heads, if the layer is to reuse at all."""
        if self.config is not None:
            self.reuse = mac_attn.ReuseCache(
                self.config,
                num_slots=store.batch_size,
                num_qo_heads=num_qo_heads,
                num_kv_heads=store.key_store.shape[2],
                head_dim=store.key_store.shape[3],
                head_dim_v=store.value_store.shape[3],
                dtype=store.dtype,
                device=store.device,
                rotary=self.rotary,
                layer=self.index,
            )

    def claim(
        self,
        store: MacLayer,
        query: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        local: bool,
    ) -> Mode | None:
        """The mode in which to attend to the keys that `update` returned; None leaves it to SDPA.

        Raises:
            ValueError: for a mask, or for heads, that mac_attn does not do.
        """
        if store.kind == "local":
            store.check_local(attention_mask)
            return None
        store.stranger = None
        if local:
            store.stranger = "they have a sliding window"
        elif getattr(value, "mac_source", (None, None))[1] is not store:
            store.stranger = "the model changes values between its cache and its attention"
        elif query.dtype != store.dtype:
            store.stranger = f"queries are {query.dtype}, keys and values {store.dtype}"
        if store.stranger is not None:
            return None
        shape = query.shape[1], *store.key_store.shape[2:], store.value_store.shape[3]
        if reason := _undecodable(store.device.type, store.dtype, store.key_store.dtype, *shape):
            raise Refusal(
                f"layer {self.index}: {reason}\nmac_attn.decode cannot serve these heads; use "
                "attn_implementation='sdpa' with transformers' own cache"
            )
        shared = store.shared
        shared.layout.observe(attention_mask, query.shape[0], query.shape[2], store.length)
        if shared.record is not None:
            shared.record(self.index, query)
        # Whatever attends a second time does so exactly: the rings are of the first one's queries.
        first, self.claimed = not self.claimed, True
        mode: Mode = shared.mode
        if mode not in WITH_RINGS:
            return mode
        if not first or self.config is None:
            return "exact"
        if self.reuse is None:
            self.allocate(store, query.shape[1])
        return mode

    def decode(
        self,
        store: MacLayer,
        query: Tensor,
        sm_scale: float | None,
        sinks: Tensor | None,
        mode: Mode,
    ) -> Tensor:
        """Attention of the new queries, `[B, Hq, T, D]`; returns `[B, T, Hq, D]`."""
        # One token is the common case, and what a view costs counts there.
        q = query.select(2, 0) if query.shape[2] == 1 else query.transpose(1, 2)
        q = q.detach() if q.requires_grad else q
        options = store.scaling | {"sinks": sinks}
        if mode != "exact":
            q_match = q if self.rotary is None else None
            options |= {"reuse": self.reuse, "slots": store.slots, "q_match": q_match}
            options |= {"learn": mode != "draft", "exact": mode == "verify"}
        out = mac_attn.decode(q, *store.paging(), sm_scale=sm_scale, **options)
        assert isinstance(out, Tensor)  # a pair only with `return_lse`
        return without_gradients(out.unsqueeze(1) if out.dim() == 3 else out, query)

    def seed(self, store: MacLayer, query: Tensor, sm_scale: float | None) -> None:
        """Write ring entries for the last of the queries `[B, Hq, T, D]` that joined the cache."""
        assert self.reuse is not None
        kv_cache, block_table, seq_lens = store.paging()
        query = query.detach().transpose(1, 2)
        new = min(query.shape[1], self.reuse.cfg.window)
        counts = [min(new, n) for n in store.shared.layout.lengths(store.length)]
        # A request with fewer tokens has padding among the last queries: then they go one by one.
        whole = all(count == new for count in counts)
        parts = [(0, len(counts), new)] if whole else [(b, b + 1, n) for b, n in enumerate(counts)]
        for first, last, count in parts:
            if count:
                queries = query[first:last, -count:]
                mac_attn.seed(
                    self.reuse,
                    queries,
                    kv_cache,
                    block_table[first:last],
                    seq_lens[first:last],
                    slots=store.slots[first:last],
                    q_match=queries if self.rotary is None else None,
                    sm_scale=sm_scale,
                    **store.scaling,
                )

    def shorten(self, slots: Tensor, seq_lens: Tensor) -> None:
        """Forget what is not of the first `seq_lens` tokens of each request, `[B]`."""
        self.claimed = True  # what is left has been attended to
        if self.reuse is not None:
            self.reuse.truncate(slots, seq_lens)

    def reset(self) -> None:
        """Forget everything."""
        if self.reuse is not None:
            self.reuse.reset()

    def copy_rows(self, src: list[int], dst: list[int]) -> None:
        """Overwrite the requests `dst[i]` with `src[i]`, all at once."""
        if self.reuse is not None:
            # `fork` starts the statistics of a copy anew; here they are those of the whole search.
            counters = self.reuse.counters.clone()
            self.reuse.fork(src, dst)
            self.reuse.counters.copy_(counters)

    def select_rows(self, store: MacLayer, rows: list[int]) -> None:
        """Make the requests those of the store now, `rows` of the ones before."""
        before = self.reuse
        if before is not None:
            self.allocate(store, before.num_qo_heads)
            assert self.reuse is not None
            self.reuse.import_slots(store.slots, before.export_slots(rows))
            self.reuse.counters.zero_()


@cache
def _undecodable(
    device: str,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    head_dim_v: int,
) -> str | None:
    """Why `mac_attn.decode` refuses heads like these, in its own words; None: it does not."""
    k, v = (
        torch.zeros(1, 1, num_kv_heads, size, dtype=kv_dtype, device=device)
        for size in (head_dim, head_dim_v)
    )
    q = torch.zeros(1, num_qo_heads, head_dim, dtype=dtype, device=device)
    ints = torch.zeros(1, 1, dtype=torch.int32, device=device)
    scale = 1.0 if kv_dtype == FLOAT8 else None
    try:
        mac_attn.decode(q, (k, v), ints, ints[0] + 1, k_scale=scale, v_scale=scale)
    except (ValueError, TypeError) as error:
        return str(error)
    return None
