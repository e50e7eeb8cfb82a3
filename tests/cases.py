"""Random cases for the tests: paged KV caches as engines have them, queries that resemble others.

Everything is drawn from a generator seeded per case, so that a case is the same on every device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mac_attn
from mac_attn.reference import ReferenceReuse, Step, decode

# Ids that a block table may hold beyond a request's pages: never to be followed.
GARBAGE_PAGES = (-1, 2**31 - 1, -(2**31), 10**6)


def plain_dtype(device: torch.device | str) -> torch.dtype:
    """float32, or bfloat16 on CUDA, whose kernels have no float32: what helpers default to."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


@dataclass
class PagedKV:
    """KV of several requests in shuffled pages; every place that holds no token yet is NaN."""

    k: Tensor  # [B, L, Hkv, D] what the pages receive, in order
    v: Tensor  # [B, L, Hkv, Dv]
    scales: dict[str, Tensor]  # k_scale and v_scale of a float8 cache
    cache: Tensor | tuple[Tensor, Tensor]  # as mac_attn.decode takes it
    pages: Tensor  # [B, P] int64, the page ids of a request of length L
    page_size: int
    layout: str

    def write(self, begin: list[int], end: list[int]) -> None:
        """Write the tokens `[begin[b], end[b])` of every request b to their pages."""
        pair = self.cache.unbind(1) if isinstance(self.cache, Tensor) else self.cache
        for pages, tokens in zip(pair, (self.k, self.v), strict=True):
            rows = pages.transpose(1, 2) if self.layout == "HND" else pages
            for b, (first, last) in enumerate(zip(begin, end, strict=True)):
                at = torch.arange(first, last, device=self.pages.device)
                rows[self.pages[b, at // self.page_size], at % self.page_size] = tokens[b, at]

    def double(self) -> tuple[Tensor, Tensor]:
        """k and v as float64, float8 numbers as what they stand for."""
        one = torch.ones((), device=self.k.device)
        factors = (self.scales.get(name, one).double() for name in ("k_scale", "v_scale"))
        pairs = zip((self.k, self.v), factors, strict=True)
        k, v = (x.double() * factor.reshape(-1, 1) for x, factor in pairs)
        return k, v

    def table(self, seq_lens: list[int]) -> Tensor:
        """Block table int32 `[B, P]` with garbage beyond each request's `ceil(n / page_size)`."""
        table = self.pages.cpu().int()
        for b, n in enumerate(seq_lens):
            used = -(-n // self.page_size)
            for i in range(used, table.shape[1]):
                table[b, i] = GARBAGE_PAGES[(i + b) % len(GARBAGE_PAGES)]
        return table.to(self.pages.device)


def make_kv(
    seed: int,
    *,
    batch: int,
    length: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int = 16,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    layout: str = "NHD",
    combined: bool = False,
    strided: bool = False,
    float8: str = "",
    head_dim_v: int | None = None,
) -> PagedKV:
    """KV for `batch` requests of up to `length` tokens, none of them written yet.

    `combined` is one tensor with K and V in dimension 1 instead of a pair. `strided` leaves gaps
    between pages, tokens and heads, as caches cut from a larger allocation have them. `float8` is
    a cache of float8_e4m3fn with scales that are "0-d", "1-d" or one "per head". Values have rows
    of `head_dim_v`, or None of `head_dim`.
    """
    dtype = dtype or plain_dtype(device)
    generator = torch.Generator().manual_seed(seed)
    pages_each = -(-length // page_size)
    num_pages = batch * pages_each + 3  # some pages belong to nobody
    order = torch.randperm(num_pages, generator=generator)[: batch * pages_each]
    shape = (page_size, num_kv_heads) if layout == "NHD" else (num_kv_heads, page_size)

    def allocate(size: int, *lead: int) -> Tensor:
        full = (*lead, *shape, size)
        if not strided:
            return torch.full(full, torch.nan, dtype=dtype, device=device)
        # Rows stay aligned to 16 bytes by the padding in the last dimension.
        gap = 16 // dtype.itemsize
        padded = (2 * lead[0], *lead[1:], shape[0] + 1, shape[1] + 2, size + gap)
        buffer = torch.full(padded, torch.nan, dtype=dtype, device=device)
        return buffer[::2, ..., : shape[0], : shape[1], :size]

    sizes = (head_dim, head_dim if head_dim_v is None else head_dim_v)
    rows = (batch, length, num_kv_heads)
    k, v = (torch.randn(*rows, size, generator=generator) for size in sizes)
    scales = {}
    if float8:
        dtype = torch.float8_e4m3fn
        # From 0.02, where numbers exceed 200, to 6, where one in twelve is subnormal.
        wanted = {"0-d": (), "1-d": (1,), "per head": (num_kv_heads,)}[float8]
        for name in ("k_scale", "v_scale"):
            scales[name] = 0.02 * 300 ** torch.rand(wanted, generator=generator)
        k, v = (x / s.reshape(-1, 1) for x, s in zip((k, v), scales.values(), strict=True))
        scales = {name: scale.to(device) for name, scale in scales.items()}
    k, v = (x.to(device, dtype) for x in (k, v))
    pair = () if combined else tuple(allocate(size, num_pages) for size in sizes)
    cache = allocate(head_dim, num_pages, 2) if combined else pair
    pages = order.view(batch, pages_each).to(device)
    return PagedKV(k, v, scales, cache, pages, page_size, layout)


def make_q(
    seed: int,
    *shape: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    strided: bool = False,
) -> Tensor:
    """Normal queries `[..., Hq, D]`; `strided` cuts them out of a fused QKV projection's output."""
    generator = torch.Generator().manual_seed(seed)
    *lead, heads, head_dim = shape
    extra = 2 if strided else 0
    q = torch.randn((*lead, heads + extra, head_dim), generator=generator)
    return q.to(device, dtype or plain_dtype(device))[..., :heads, :]


def random_walk(
    seed: int,
    steps: int,
    batch: int,
    num_kv_heads: int,
    group_size: int,
    head_dim: int,
    *,
    step: float = 0.25,
    jump: float = 0.15,
    revisit: float = 0.3,
    reach: int = 8,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Queries `[steps, B, Hq, D]`, normal at every step, each near one of the few before it.

    `q_t = sqrt(1 - a²) q_s + a·noise` for every KV head's group: s is t - 1, or with probability
    `revisit` one of the `reach` steps before; a is `step`, or 1 (a fresh query) with probability
    `jump`. Single heads also jump on their own, a third as often. The relative squared distance to
    the source is about a², so a threshold between step² and 1 gives hits and misses.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, num_kv_heads, group_size)
    walk = torch.empty(steps, *shape, head_dim)
    b, h = torch.arange(batch)[:, None], torch.arange(num_kv_heads)
    for t in range(steps):
        noise = torch.randn(*shape, head_dim, generator=generator)
        back = torch.randint(1, reach + 1, shape[:2], generator=generator)
        near = torch.rand(shape[:2], generator=generator) >= revisit
        source = walk[(t - back.masked_fill(near, 1)).clamp(min=0), b, h] if t else noise
        jumps = torch.rand(*shape[:2], 1, generator=generator) < jump
        jumps = jumps | (torch.rand(shape, generator=generator) < jump / 3)
        a = torch.where(jumps, 1.0, step)[..., None]
        walk[t] = (1 - a**2).sqrt() * source + a * noise
    return walk.flatten(2, 3).to(device, dtype or plain_dtype(device))


def small_config(**changes: Any) -> mac_attn.ReuseConfig:
    """Options small enough that a context of some hundred tokens wraps the ring several times.

    Chains of hits are what needs testing, but where there are anchors there are none.
    """
    options = dict(entries=32, window=32, band=16, anchors=0, threshold=0.16, min_context=24)
    options |= dict(max_drift=None)  # queries here are small: test_drift.py is about it
    options |= dict(max_reuse_depth=1 if changes.get("anchors") else None) | changes
    return mac_attn.ReuseConfig(**options)


@contextmanager
def one_thread() -> Iterator[None]:
    """For the reference: its tiny operations gain nothing from threads, which on a busy machine
    wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def hashed(position: int, kv_head: int, layer: int, token: int) -> float:
    """u of a token, as csrc/sample.h says it, in plain integers."""

    def mix(x: int, last: bool = True) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16 if last else x

    seed = mix((mix((mix(position) + kv_head) % 2**32) + layer) % 2**32)
    return ((mix((seed + token) % 2**32, last=False) >> 8) + 1) / 2**24


class ReferenceChain:
    """Requests decoded by the reference, a slot each; q_match is not q, to tell them apart."""

    def __init__(
        self,
        cfg: mac_attn.ReuseConfig,
        *,
        steps: int,
        batch: int = 1,
        heads: tuple[int, int] = (4, 2),
        head_dim: int = 16,
        seed: int = 0,
        **walk: Any,
    ) -> None:
        self.kv = make_kv(
            seed, batch=batch, length=steps, num_kv_heads=heads[1], head_dim=head_dim, page_size=4
        )
        self.kv.write([0] * batch, [steps] * batch)
        self.q = make_q(seed + 1, steps, batch, heads[0], head_dim)
        self.q_match = random_walk(
            seed + 2, steps, batch, heads[1], heads[0] // heads[1], head_dim, **walk
        )
        self.reuse = ReferenceReuse(
            cfg, num_slots=batch + 1, num_qo_heads=heads[0], num_kv_heads=heads[1]
        )
        self.batch = batch

    def step(
        self,
        p: int,
        *,
        q: Tensor | None = None,
        q_match: Tensor | None = None,
        slots: list[int] | None = None,
        request_ids: list[int] | None = None,
        **options: Any,
    ) -> Step:
        """Decode position p of every request."""
        with one_thread():
            return decode(
                self.q[p] if q is None else q,
                self.kv.cache,
                self.kv.table([p + 1] * self.batch),
                torch.tensor([p + 1] * self.batch),
                reuse=self.reuse,
                slots=torch.tensor(slots or list(range(self.batch))),
                q_match=self.q_match[p] if q_match is None else q_match,
                request_ids=None if request_ids is None else torch.tensor(request_ids),
                **options,
            )

    def run(self, begin: int, end: int, **options: Any) -> list[Step]:
        """Decode the positions `[begin, end)`."""
        return [self.step(p, **options) for p in range(begin, end)]


def close(got: Tensor, want: Tensor) -> None:
    """Assert equality of two float64 computations: sums of some hundred terms of unit size."""
    torch.testing.assert_close(got, want.double(), atol=1e-12, rtol=1e-12)
