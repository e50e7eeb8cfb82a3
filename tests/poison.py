"""Isolation: one step again, with every byte that belongs to anybody else replaced by garbage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mac_attn

# Of a slot, what belongs to single entries: [N, H, M, ...] each.
ENTRY_PARTS = (
    "ring_query",
    "ring_out",
    "ring_lse",
    "ring_depth",
    "ring_rotated",
    "ring_anchors",
    "ring_anchor_weights",
)
# And what belongs to its history as a whole.
SLOT_PARTS = (
    "slot_end",
    "slot_reach",
    "slot_request",
    "counters",
    "ring_stored",
    "ring_tau",
    "ring_spread",
    "ring_missed",
    "ring_last_lse",
)


def garbage(tensor: Tensor, rng: np.random.Generator) -> Tensor:
    """A tensor of this shape and dtype full of random bytes: NaNs, huge numbers, everything."""
    if tensor.numel() == 0:
        return tensor.clone()
    data = rng.integers(0, 256, tensor.numel() * tensor.element_size(), dtype=np.uint8)
    return torch.from_numpy(data).view(tensor.dtype).view(tensor.shape).to(tensor.device)


@dataclass
class Rerun:
    """What one row of a step answers, and leaves in its slot, when all else is poisoned."""

    row: int
    slot: int
    out: Tensor
    lse: Tensor
    cache: mac_attn.ReuseCache

    def check(
        self, cache: mac_attn.ReuseCache, out: Tensor, lse: Tensor, rounding: float = 0.0
    ) -> None:
        """Assert that the plain step answered the same and left the same.

        Bit for bit; with `rounding` above 0 floats may differ by that much: the CUDA kernels cut
        the tokens of all requests into even shares, so that sums are taken in another order.
        """

        def same(a: Tensor, b: Tensor) -> bool:
            if rounding and a.is_floating_point():
                return torch.allclose(a, b, rtol=rounding, atol=rounding, equal_nan=True)
            return same_bits(a, b)

        assert same(out[self.row], self.out), "out depends on what belongs to others"
        assert same(lse[self.row], self.lse), "lse depends on what belongs to others"
        for name in (*SLOT_PARTS, "ring_position", *ENTRY_PARTS):
            got, want = (getattr(c, name)[self.slot] for c in (cache, self.cache))
            if name not in SLOT_PARTS:
                places = history_places(cache, self.slot)
                got, want = got[places], want[places]
            assert same(got, want), f"{name} depends on what belongs to others"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bytes: a NaN equals itself, and 0 is not -0."""
    if a.numel() == 0:
        return a.shape == b.shape
    return torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))


def history_places(cache: mac_attn.ReuseCache, slot: int) -> Tensor:
    """Mask `[H, M]` of the places that the slot's history has filled."""
    filled = cache.ring_stored[slot].clamp(max=cache.cfg.entries)
    youngest = cache.ring_stored[slot] - 1
    at = torch.arange(cache.cfg.entries, device=cache.device)
    return (youngest[:, None] - at) % cache.cfg.entries < filled[:, None]


def poisoned_rerun(
    cache: mac_attn.ReuseCache,
    call: tuple[Any, ...],
    rows: dict[str, Any],
    row: int,
    rng: np.random.Generator,
) -> Rerun:
    """Decode on copies in which only what belongs to `row` is as it was.

    Poisoned are: the other rows' queries, lengths and pages, every token of the KV cache that is
    not one of this request's, the other slots with their histories and counters, and in its own
    slot the places that hold no entry of its history.
    """
    twin = mac_attn.ReuseCache(
        cache.cfg, num_slots=cache.num_slots, num_qo_heads=cache.num_qo_heads,
        num_kv_heads=cache.num_kv_heads, head_dim=cache.head_dim, dtype=cache.dtype,
        device=cache.device, rotary=cache.rotary, max_batch_size=cache.max_batch_size,
        layer=cache.layer, head_dim_v=cache.head_dim_v,
    )  # fmt: skip
    twin.ring.copy_(garbage(twin.ring, rng))
    q, (k, v), table, lens = call
    slot, n, page_size = int(rows["slots"][row]), int(lens[row]), k.shape[1]
    wide = rows.get("query_lens")
    query_lens = [1] * len(q) if wide is None else wide.tolist()
    first = n - query_lens[row]
    unbroken = int(cache.slot_end[slot]) <= first <= int(cache.slot_reach[slot]) and (
        rows["request_ids"] is None
        or int(cache.slot_request[slot]) == int(rows["request_ids"][row])
    )
    for name in SLOT_PARTS:
        getattr(twin, name)[slot] = getattr(cache, name)[slot]
    kept = history_places(cache, slot) & unbroken
    # A tag is the engine's own: whatever it says, a place that no history filled does not count.
    for name in ("ring_position", *ENTRY_PARTS):
        part, given = getattr(twin, name)[slot], getattr(cache, name)[slot]
        part.copy_(given.where(kept.view(*kept.shape, *[1] * (part.ndim - 2)), part))

    others = [b for b in range(len(q)) if b != row]
    q, q_match, lens = q.clone(), rows["q_match"].clone(), lens.clone()
    for queries in (q, q_match):
        queries[others] = garbage(queries, rng)[others]
    pages = table[row, : -(-n // page_size)].long()
    used = torch.zeros(k.shape[:2], dtype=torch.bool, device=k.device)
    for i, page in enumerate(pages.tolist()):
        used[page, : min(page_size, n - i * page_size)] = True
    cut = [torch.where(used[:, :, None, None], t, garbage(t, rng)) for t in (k, v)]
    table = table.clone()
    for b in others:  # lengths and ids must stay within bounds, or the call is refused
        if int(lens[b]) > 0:
            table[b] = torch.from_numpy(rng.integers(0, k.shape[0], table.shape[1]))
            lens[b] = int(rng.integers(query_lens[b], max(n, query_lens[b]) + 1))
    # A slot whose history was garbage may seem unbroken: then its garbage is used, for its own row.
    out, lse = mac_attn.decode(
        q, tuple(cut), table, lens, reuse=twin, return_lse=True, **{**rows, "q_match": q_match}
    )
    return Rerun(row, slot, out[row], lse[row], twin)
