"""Arguments of the ops: a valid call of random small sizes, then some of it replaced by nonsense.

Everything is drawn from an `atheris.FuzzedDataProvider` (or anything with its methods), so that the
fuzzer steers it. Storages are as large as their tensors, so that AddressSanitizer sees one element
beyond.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

import mac_attn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ODD_DTYPES = (
    *DTYPES,
    torch.float8_e4m3fn,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
)
INTS = (0, 1, -1, 2, 7, 63, 2**15, 2**31 - 1, -(2**31), 2**30)
WIDE_INTS = (*INTS, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63))
FLOATS = (0.0, 1.0, -1.0, 1e-45, 3e38, -3e38, float("inf"), float("nan"), 1e30, -float("inf"))


class Call:
    """Sizes of one call and its tensors by name, as `torch.ops.mac_attn` takes them."""

    def __init__(self, draw: Any, wanted: Collection[str]) -> None:
        self.draw = draw
        pick = draw.ConsumeIntInRange
        # An input that has run out gives the lowest number: let that be a full call.
        self.batch, self.kv_heads, self.group = 3 - pick(0, 3), pick(1, 2), pick(1, 5)
        self.head_dim = draw.PickValueInList([16, 8, 24, 48, 80, 256, 512])
        shorter = (size for size in (8, 24, 64) if size < self.head_dim)
        self.head_dim_v = draw.PickValueInList([self.head_dim, *shorter])
        self.slots, self.entries, self.num_anchors = 5 - pick(1, 4), 7 - pick(1, 6), pick(0, 3)
        self.band, self.page_size, self.max_pages = pick(1, 5), 6 - pick(1, 5), 5 - pick(0, 5)
        self.num_pages = 6 - pick(0, 6)
        self.float8 = pick(0, 2) == 1
        self.dtype = draw.PickValueInList(list(DTYPES))
        self.per_head = self.num_anchors == 0 and draw.ConsumeBool()
        self.tokens = max(0, pick(0, 8) - 4)  # 0: one, without a dimension of its own
        self.generator = torch.Generator().manual_seed(pick(0, 2**16))
        self.args = {name: make() for name, make in self.makers().items() if name in wanted}

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype)

    def pages(self, *shape: int) -> Tensor:
        return self.normal(*shape, dtype=torch.float8_e4m3fn if self.float8 else None)

    def scale(self) -> Tensor | None:
        """Of a float8 cache."""
        shape = ([], [1], [self.kv_heads])[self.draw.ConsumeIntInRange(0, 2)]
        return torch.full(shape, 0.5) if self.float8 else None

    def ints(self, *shape: int, low: int, high: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(low, max(low + 1, high), shape, generator=self.generator).to(dtype)

    def makers(self) -> dict[str, Callable[[], Any]]:
        """What makes each argument of a call that is valid, or nearly."""
        B, H, G, D, V = self.batch, self.kv_heads, self.group, self.head_dim, self.head_dim_v
        N, M, S = self.slots, self.entries, self.num_anchors
        T = max(1, self.tokens)
        rows = (B, T, H * G) if self.tokens else (B, H * G)
        longest = self.max_pages * self.page_size if self.num_pages else 0
        lens = self.ints(B, low=0, high=longest + 1)
        query_lens = self.ints(B, low=1, high=T + 1) if self.draw.ConsumeBool() else None
        # What each request's first query token attends to.
        ends = (lens + 1 - (T if query_lens is None else query_lens)).clamp(min=0)
        order = torch.randperm(N, generator=self.generator).int()
        slots = order[:B] if B <= N else self.ints(B, low=0, high=N)
        slots[torch.rand(B, generator=self.generator) < 0.2] = -1  # requests without a ring
        rings = self.rings(ends, slots)
        cache = (self.num_pages, self.page_size, H)
        source = torch.full((B, H, T, G), -1, dtype=torch.int32)
        stored = torch.where(slots >= 0, rings["ring_stored"][slots.clamp(min=0).long(), 0], -1)
        if self.draw.ConsumeBool():  # the newest entry of each that has one
            old_enough = ((ends - 2 >= self.band) & (slots >= 0))[:, None]
            there = torch.arange(T) < (lens - ends + 1)[:, None]
            source = torch.where(old_enough & there, (ends - 2)[:, None], -1)
            source = source[:, None, :, None].expand(B, H, T, G)
        source = source.flatten(1).contiguous()
        place = torch.where(source >= 0, source % M, -1)
        return {
            "q": lambda: self.normal(*rows, D),
            "q_match": lambda: self.normal(*rows, D),
            "k_cache": lambda: self.pages(*cache, D),
            "v_cache": lambda: self.pages(*cache, V),
            "k_scale": self.scale,
            "v_scale": self.scale,
            "hnd": lambda: False,
            "block_table": lambda: self.ints(B, self.max_pages, low=0, high=self.num_pages),
            "seq_lens": lambda: lens,
            "query_lens": lambda: query_lens,
            "slots": lambda: slots,
            "request_ids": lambda: None,
            "source": lambda: source,
            "place": lambda: place,
            "stored": lambda: stored[:, None].expand(B, H).contiguous(),
            "states": lambda: self.normal(2, B, T * H * G, V, dtype=torch.float32),
            "state_lse": lambda: self.normal(2, B, T * H * G, dtype=torch.float32),
            "log_ratio": lambda: self.normal(B, T * H * G, dtype=torch.float32),
            "anchor_positions": lambda: torch.full((B, H, S), -1, dtype=torch.int32),
            "anchor_weights": lambda: torch.zeros(B, H, S),
            "sampled": lambda: self.ints(B, H * T, low=-1, high=4 * S + 2),
            "ring": lambda: rings["ring"],
            "num_kv_heads": lambda: H,
            "head_dim_v": lambda: V,
            "entries": lambda: M,
            "anchors": lambda: S,
            "layer": lambda: 3,
            "threshold": lambda: torch.full((H * G,), 3.0),
            "relative": lambda: self.draw.ConsumeBool(),
            "max_drift": lambda: self.draw.PickValueInList([0.0, 3.0]),
            "per_head": lambda: self.per_head,
            "window": lambda: 6,
            "band": lambda: self.band,
            "min_context": lambda: 0,
            "max_reuse_depth": lambda: 1 if S else 2**31 - 1,
            "exact": lambda: self.draw.ConsumeBool(),
            "learn": lambda: self.draw.ConsumeBool(),
            "sm_scale": lambda: 0.25,
            "logits_soft_cap": lambda: self.draw.PickValueInList([0.0, 2.0]),
            "batch_invariant": lambda: self.draw.ConsumeBool(),
            "sinks": lambda: self.draw.PickValueInList(
                [None, self.normal(H * G, dtype=torch.float32)]
            ),
            "workspace": lambda: None,
            "error_flag": lambda: None,
            "inv_freq": lambda: None,
            "interleaved": lambda: self.draw.ConsumeBool(),
            "rotary_scale": lambda: 1.0,
            "out": lambda: self.normal(*rows, V),
            "lse": lambda: self.normal(*rows, dtype=torch.float32),
        }

    def rings(self, lens: Tensor, slots: Tensor) -> dict[str, Tensor]:
        """The rings of a cache by name of their parts; histories end where the requests go on."""
        cfg = mac_attn.ReuseConfig(
            entries=self.entries,
            band=self.band,
            anchors=self.num_anchors,
            max_reuse_depth=1 if self.num_anchors else None,
        )
        cache = mac_attn.ReuseCache(
            cfg, num_slots=self.slots, num_qo_heads=self.kv_heads * self.group,
            num_kv_heads=self.kv_heads, head_dim=self.head_dim, dtype=self.dtype,
            head_dim_v=self.head_dim_v,
        )  # fmt: skip
        for name in ("query", "rotated", "out", "lse", "last_lse"):
            part = getattr(cache, f"ring_{name}")
            part.copy_(self.normal(*part.shape, dtype=torch.float32))
        cache.ring_tau.fill_(0.1)
        cache.ring_anchors.fill_(-1)
        cache.ring_position.fill_(-1)
        for n, slot in zip(lens.tolist(), slots.tolist(), strict=True):
            if slot < 0:
                continue
            cache.slot_end[slot] = cache.slot_reach[slot] = max(0, n - 1)
            for c in range(max(self.band, n - 1 - self.entries), n - 1):
                cache.ring_position[slot, :, c % self.entries] = c
                for i in range(min(self.num_anchors, c + 1 - self.band)):
                    cache.ring_anchors[slot, :, c % self.entries, i] = i
                    cache.ring_anchor_weights[slot, :, c % self.entries, i] = i
            if n > 1:  # the newest lies at (n - 2) % M, and the ring counts as full
                at = (n - 2) % self.entries + 1
                cache.ring_stored[slot] = at if at == self.entries else self.entries + at
        return {"ring": cache.ring, "ring_stored": cache.ring_stored}

    def frequencies(self) -> Tensor:
        """Of a rotary embedding, sometimes of more dimensions than there are."""
        pairs = self.draw.ConsumeIntInRange(0, self.head_dim // 2 + 1)
        return self.normal(pairs, dtype=torch.float32)

    def spoil(self) -> None:
        """Replace one argument."""
        name = self.draw.PickValueInList(list(self.args))
        value = self.args[name]
        if isinstance(value, Tensor):
            self.args[name] = self.spoiled(value)
        elif isinstance(value, bool):
            self.args[name] = not value
        elif isinstance(value, int):
            self.args[name] = self.draw.PickValueInList(list(WIDE_INTS))
        elif isinstance(value, float):
            self.args[name] = self.draw.PickValueInList(list(FLOATS))
        elif name == "query_lens":
            self.args[name] = self.ints(self.batch, low=-1, high=6)
        elif name == "request_ids":
            self.args[name] = self.ints(self.batch, low=-1, high=4, dtype=torch.int64)
        elif name == "sinks":
            self.args[name] = torch.full((self.kv_heads * self.group,), 3.0)
        elif name in ("k_scale", "v_scale"):
            self.args[name] = torch.ones(self.kv_heads)
        elif name == "inv_freq":
            self.args[name] = self.frequencies()

    def spoiled(self, value: Tensor) -> Tensor:
        """The tensor with other values, another shape, other strides or another dtype."""
        pick = self.draw.ConsumeIntInRange
        how = pick(0, 9)
        if how <= 4:  # most often: what a check of shapes does not see
            return self.other_values(value)
        if how == 5:
            return value.to(self.draw.PickValueInList(list(ODD_DTYPES)))
        shape = list(value.shape)
        if how == 6 and shape:
            at = pick(0, len(shape) - 1)
            shape[at] = max(0, shape[at] + self.draw.PickValueInList([-1, 1, 3, -shape[at]]))
            return torch.zeros(shape, dtype=value.dtype)
        if how == 7:
            if self.draw.ConsumeBool() or not shape:
                return value[None]
            wide = value.float() if value.dtype == torch.float8_e4m3fn else value
            return wide.sum(0).to(value)
        return self.other_strides(value)

    def other_values(self, value: Tensor) -> Tensor:
        value = whole = value.clone(memory_format=torch.contiguous_format)
        if value.dtype == torch.uint8 and value.numel() > 0 and value.numel() % 4 == 0:
            # Rings hold numbers of all types. Flat, as a row of its own may have any stride.
            flat = value.view(-1)
            value = flat.view(torch.float32 if self.draw.ConsumeBool() else torch.int32)
        for _ in range(self.draw.ConsumeIntInRange(1, 3)):
            if value.numel() == 0:
                break
            at = self.draw.ConsumeIntInRange(0, value.numel() - 1)
            if value.dtype == torch.float8_e4m3fn:  # any byte is a number
                value.view(-1).view(torch.uint8)[at] = self.draw.ConsumeIntInRange(0, 255)
            elif value.is_floating_point():
                value.view(-1)[at] = self.draw.PickValueInList(list(FLOATS))
            elif value.dtype in (torch.int32, torch.int64):
                value.view(-1)[at] = (
                    self.draw.PickValueInList(list(INTS))
                    if self.draw.ConsumeBool()
                    else self.draw.ConsumeIntInRange(-2, 40)
                )
        return whole

    def other_strides(self, value: Tensor) -> Tensor:
        """The same shape in a storage just large enough: gaps, overlaps, expanded, transposed."""
        strides = [self.draw.ConsumeIntInRange(0, 2 * s + 3) for s in value.stride()]
        if strides and self.draw.ConsumeBool():
            strides[-1] = 1
        shape = list(value.shape)
        size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        storage = torch.zeros(size if value.numel() else 0, dtype=value.dtype)
        return torch.as_strided(storage, shape, strides)
