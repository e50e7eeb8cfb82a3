"""A small server on the real ops and on the reference side by side, compared after every step.

Its queries before the rotary embedding are a few prototypes of plus and minus ones with some signs
flipped: squared distances and norms are small integers and thresholds powers of two, so every score
is exact in float32 and float64 alike. Ties are real ties, and no decision hangs on rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from cases import GARBAGE_PAGES, one_thread
from compare import added_counters, check_ring, out_tolerance, state_tolerance
from judge import Judge, adopt, sample_tolerance, seed_with_taus
from poison import poisoned_rerun
from torch import Tensor

import mac_attn
from mac_attn import reference
from mac_attn.reference import HeadStep, ReferenceReuse, Slot
from mac_attn.stats import COUNTERS

CONTENTS = 512  # different tokens; one's content decides its key, value and query
PROTOTYPES = 3


def serving_config(head_dim: int, **changes: Any) -> mac_attn.ReuseConfig:
    """Small options with a relative threshold of 8 / head_dim: the squared length of a query is
    head_dim, so a head's score is 4 * flips / 8, and a group hits below 2 flips a head."""
    options = dict(entries=8, window=12, band=4, anchors=4, threshold=8 / head_dim, min_context=6)
    return mac_attn.ReuseConfig(**options | changes)


@dataclass(eq=False)
class Request:
    """One request; while it is served, `slot` is its own, swapped out it has `state` instead."""

    id: int
    tokens: list[int]  # contents
    pages: list[int]
    slot: int | None = None
    state: tuple[mac_attn.SlotState, Slot, list[int]] | None = None
    topic: int = 0
    checked: bool = True  # followed by the reference

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class Counts:
    """What has been tried."""

    steps: int = 0
    outputs: int = 0  # (request, step) pairs
    compared: int = 0  # of them, those compared with the reference
    hits: int = 0  # (query token, KV head) pairs of those that hit
    drafted: int = 0  # of them, in steps of several tokens
    isolated: int = 0  # steps repeated with everything of the other requests poisoned
    operations: dict[str, int] = field(default_factory=dict)

    def count(self, operation: str) -> None:
        self.operations[operation] = self.operations.get(operation, 0) + 1

    def __str__(self) -> str:
        operations = ", ".join(f"{n} {name}" for name, n in sorted(self.operations.items()))
        return (
            f"{self.steps} steps, {self.outputs} outputs, {self.compared} of them compared with "
            f"the reference ({self.hits} KV head hits, {self.drafted} of several tokens), "
            f"{self.isolated} repeated under poison; "
            f"{operations}"
        )


class Server:
    """Requests, their paged KV cache and their slots. With `ids` every call names its requests and
    slots are never reset for a new one; without, they always are. `sampled`: not all requests are
    `checked`, so that there can be hundreds. `kernels` is the kind of device whose kernels
    compute, if it is not `device`: the CUDA kernels also run on the host (tests/simt/torch)."""

    def __init__(
        self,
        cfg: mac_attn.ReuseConfig,
        *,
        num_slots: int = 4,
        heads: tuple[int, int] = (4, 2),
        head_dim: int = 16,
        head_dim_v: int | None = None,
        dtype: torch.dtype = torch.float32,
        page_size: int = 4,
        max_length: int = 64,
        ids: bool = True,
        sampled: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        kernels: str | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def pool(*shape: int) -> Tensor:
            return torch.randn(CONTENTS, *shape, generator=generator).to(device, dtype)

        num_qo_heads, num_kv_heads = heads
        shape = {"num_slots": num_slots, "num_qo_heads": num_qo_heads, "num_kv_heads": num_kv_heads}
        self.cache = mac_attn.ReuseCache(
            cfg,
            **shape,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            dtype=dtype,
            device=device,
            max_batch_size=num_slots + 2,  # see `decode`
        )
        self.reference = ReferenceReuse(cfg, **shape)
        self.sampling = sample_tolerance(kernels or device)
        sizes = (head_dim, head_dim_v or head_dim)
        self.k_pool, self.v_pool = (pool(num_kv_heads, size) for size in sizes)
        self.q_pool = pool(num_qo_heads, head_dim)
        signs = torch.randint(0, 2, (PROTOTYPES, num_qo_heads, head_dim), generator=generator)
        self.prototypes = (2 * signs - 1).numpy()
        self.max_pages = -(-max_length // page_size)
        pages = (2 * num_slots + 2) * self.max_pages
        self.k, self.v = (
            torch.full(
                (pages, page_size, num_kv_heads, size), torch.nan, dtype=dtype, device=device
            )
            for size in sizes
        )
        self.free = list(range(pages))
        self.cfg, self.ids, self.page_size, self.max_length = cfg, ids, page_size, max_length
        self.sampled = sampled
        self.device, self.dtype = torch.device(device), dtype
        self.requests: list[Request] = []
        self.next_id = 1
        self.rng = np.random.default_rng(seed)
        self.expected = [[0] * len(COUNTERS) for _ in range(num_slots)]
        self.counts = Counts()
        kernels = kernels or torch.device(device).type
        self.state_tolerance = state_tolerance(dtype, kernels)
        self.out_tolerance = out_tolerance(dtype, kernels)
        self.rounding = 0.0 if kernels == "cpu" else self.out_tolerance.relative

    # --- requests and their tokens ---------------------------------------------------------------

    def start(
        self, slot: int, length: int, *, seeded: int = 0, chunks: int = 1, checked: bool = True
    ) -> Request:
        """A new request of `length` prompt tokens, prefilled in chunks, of each of which the last
        `seeded` queries go into the ring."""
        self.counts.count("start")
        self.vacate(slot)
        request = Request(self.next_id, [], [], slot, checked=checked)
        self.next_id += 1
        self.requests.append(request)
        if not self.ids:
            self.reset_slot(slot)
        elif self.sampled:  # the reference may not have seen what the slot holds
            self.reference.reset([slot])
            self.expected[slot] = self.cache.counters[slot].tolist()
        for chunk in np.array_split(np.arange(length), chunks):
            if len(chunk):
                self.append(request, self.rng.integers(0, CONTENTS, len(chunk)).tolist())
                if seeded:
                    self.seed(request, min(seeded, len(chunk), self.cfg.window))
        return request

    def append(self, request: Request, contents: list[int]) -> None:
        """Write tokens to the KV cache."""
        begin = len(request)
        request.tokens += contents
        while len(request.pages) * self.page_size < len(request):
            request.pages.append(self.free.pop(int(self.rng.integers(len(self.free)))))
        at = torch.arange(begin, len(request), device=self.device)
        pages = torch.tensor(request.pages, device=self.device)[at // self.page_size]
        self.k[pages, at % self.page_size] = self.k_pool[contents]
        self.v[pages, at % self.page_size] = self.v_pool[contents]

    def finish(self, request: Request) -> None:
        """The request ends. Its slot keeps what it holds; its pages, before another gets them, are
        NaN."""
        self.counts.count("finish")
        self.requests.remove(request)
        self.k[request.pages] = self.v[request.pages] = torch.nan
        self.free += request.pages

    def table(self, requests: Sequence[Request]) -> Tensor:
        """Block table with garbage beyond the pages in use."""
        rows = [
            r.pages + [GARBAGE_PAGES[(i + r.id) % 4] for i in range(self.max_pages - len(r.pages))]
            for r in requests
        ]
        return self.ints([row[: self.max_pages] for row in rows]).view(-1, self.max_pages)

    def ints(self, values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def query(self, request: Request) -> Tensor:
        """A pre-RoPE query: the request's prototype with at most two signs flipped in each head."""
        if self.rng.random() < 0.2:
            request.topic = int(self.rng.integers(PROTOTYPES))
        query = self.prototypes[request.topic].copy()
        if self.rng.random() < 0.7:
            for head in query:
                head[self.rng.integers(0, len(head), int(self.rng.integers(3)))] *= -1
        return torch.from_numpy(query).to(self.device, self.dtype)

    # --- what a server does to slots -------------------------------------------------------------

    def vacate(self, slot: int) -> None:
        """Whoever has the slot loses it, and goes on in another one from an empty ring."""
        for request in self.requests:
            if request.slot == slot:
                self.counts.count("preempt")
                request.slot = None

    def reset_slot(self, slot: int) -> None:
        self.counts.count("reset")
        self.cache.reset([slot])
        self.reference.reset([slot])
        self.expected[slot] = [0] * len(COUNTERS)

    def resume(self, request: Request, slot: int) -> None:
        """Give a request without a slot this one, with the state it was swapped out with if any."""
        self.vacate(slot)
        request.slot = slot
        if request.state is None:
            self.reset_slot(slot)
            return
        self.counts.count("swap in")
        state, twin, expected = request.state
        self.cache.import_slots([slot], state)
        self.reference.slots[slot] = twin.copy()
        self.expected[slot] = list(expected)
        request.state = None

    def swap_out(self, request: Request) -> None:
        assert request.slot is not None
        self.counts.count("swap out")
        twin = self.reference.slots[request.slot]
        request.state = (
            self.cache.export_slots([request.slot]),
            twin.copy(),
            list(self.expected[request.slot]),
        )
        request.slot = None

    def swap_slots(self, one: Request, other: Request) -> None:
        assert one.slot is not None and other.slot is not None
        self.counts.count("swap slots")
        pair = [one.slot, other.slot]
        self.cache.fork(pair, pair[::-1])
        self.reference.fork(pair, pair[::-1])
        one.slot, other.slot = other.slot, one.slot
        for slot in pair:
            self.expected[slot] = [0] * len(COUNTERS)

    def fork(self, request: Request, slot: int) -> Request:
        """A second request that goes on from here on its own."""
        assert request.slot is not None and request.slot != slot
        self.counts.count("fork")
        self.vacate(slot)
        child = Request(self.next_id, [], [], slot, topic=request.topic, checked=request.checked)
        self.next_id += 1
        self.requests.append(child)
        self.append(child, list(request.tokens))
        self.cache.fork([request.slot], [slot], request_ids=[child.id] if self.ids else None)
        self.reference.fork([request.slot], [slot])
        if self.ids:
            self.reference.slots[slot].request = child.id
        self.expected[slot] = [0] * len(COUNTERS)
        return child

    def drop(self, request: Request, length: int) -> None:
        """Take the tokens from `length` on out of the KV cache."""
        at = np.arange(length, len(request))
        pages = np.array(request.pages)[at // self.page_size]
        self.k[pages, at % self.page_size] = self.v[pages, at % self.page_size] = torch.nan
        del request.tokens[length:]
        keep = -(-length // self.page_size)
        self.free += request.pages[keep:]
        del request.pages[keep:]

    def truncate(self, request: Request, count: int) -> None:
        """Reject the last tokens."""
        self.counts.count("truncate")
        length = max(1, len(request) - count)
        self.drop(request, length)
        if request.slot is not None:
            self.cache.truncate([request.slot], [length])
            self.reference.truncate([request.slot], [length])
        elif request.state is not None:
            request.state = None  # a server that rolls back what it has swapped out drops it

    # --- steps -----------------------------------------------------------------------------------

    def rows(self, requests: Sequence[Request]) -> dict[str, Any]:
        ids = self.ints([r.id for r in requests], torch.int64) if self.ids else None
        return {"slots": self.ints([r.slot for r in requests]), "request_ids": ids}

    def seed(self, request: Request, length: int) -> None:
        """Ring entries of the last `length` tokens, whose queries are then those of a decode."""
        assert request.slot is not None
        self.counts.count("seed")
        q = self.q_pool[request.tokens[-length:]][None]
        q_match = torch.stack([self.query(request) for _ in range(length)])[None]
        n = len(request)
        call = (q, (self.k, self.v), self.table([request]), self.ints([n]))
        rows = {**self.rows([request]), "q_match": q_match}
        taus = seed_with_taus(self.cache, *call, **rows)
        if request.checked:
            # Log-sum-exps between the steps are not taken over from the backend.
            tolerance = self.sampling + self.state_tolerance.absolute
            judge = Judge(self.cache, self.reference, [request.slot], tolerance, taus)
            with one_thread():
                reference.seed(self.reference, *call, **rows, choose=judge)
            adopt(self.cache, self.reference, [request.slot], self.state_tolerance)

    def decode(
        self, requests: Sequence[Request], *, isolate: bool = False, tokens: int | None = None
    ) -> Tensor:
        """One token for each of these requests, or up to `tokens` at once of which some may be
        rejected afterwards; and somewhere between them a padding row and another row of one of them
        that has no slot: it is exact and leaves no trace."""
        self.counts.steps += 1
        self.counts.outputs += len(requests)
        new = {r.id: int(self.rng.integers(1, (tokens or 1) + 1)) for r in requests}
        for request in requests:
            self.append(request, self.rng.integers(0, CONTENTS, new[request.id]).tolist())
        padding = Request(0, [], [], 10**6)  # a row of no tokens may name any slot
        batch = list(requests)
        host = requests[int(self.rng.integers(len(requests)))]
        guest = replace(host, slot=-1)
        for row in (padding, guest):
            batch.insert(int(self.rng.integers(len(batch) + 1)), row)
        lens = [new.get(r.id, 1) for r in batch]
        width = tokens or 1
        newest = [
            r.tokens[len(r) - n :] if len(r) else [0] for r, n in zip(batch, lens, strict=True)
        ]
        contents = torch.tensor([some + some[-1:] * (width - len(some)) for some in newest])
        q = self.q_pool[contents]
        q_match = torch.stack([self.query(r) for r in batch for _ in range(width)]).view(q.shape)
        if tokens is None:
            q, q_match = q.squeeze(1), q_match.squeeze(1)
        call = (q, (self.k, self.v), self.table(batch), self.ints([len(r) for r in batch]))
        query_lens = None if tokens is None else self.ints(lens)
        rows = {**self.rows(batch), "q_match": q_match, "query_lens": query_lens}
        rerun = None
        if isolate:
            self.counts.isolated += 1
            row = batch.index(requests[int(self.rng.integers(len(requests)))])
            rerun = poisoned_rerun(self.cache, call, rows, row, self.rng)
        out, lse = mac_attn.decode(*call, reuse=self.cache, return_lse=True, **rows)
        if rerun is not None:
            rerun.check(self.cache, out, lse, self.rounding)
        assert (out[batch.index(padding)] == 0).all()
        checked = [b for b, r in enumerate(batch) if r.checked and len(r)]
        if checked:
            self.compare(batch, checked, call, rows, out, lse)
        for request in requests:  # some are rejected, of which the cache is not told
            self.drop(request, len(request) - int(self.rng.integers(new[request.id])))
        return out

    def compare(
        self,
        batch: list[Request],
        checked: list[int],
        call: tuple[Any, ...],
        rows: dict[str, Any],
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """The reference's answer, rings and counters for the rows of requests that it follows."""
        some = [batch[b] for b in checked]
        q, kv, table, lens = call
        slots = [-1 if r.slot is None else r.slot for r in some]
        judge = Judge(self.cache, self.reference, slots, self.sampling)
        with one_thread():
            step = reference.decode(
                q[checked],
                kv,
                table[checked],
                lens[checked],
                reuse=self.reference,
                choose=judge,
                **{name: None if t is None else t[checked] for name, t in rows.items()},
            )
        self.counts.compared += len(checked)
        self.out_tolerance.check(out[checked], step.out, "out", step.gain[..., None])
        self.state_tolerance.check(lse[checked], step.lse, "lse", step.gain)
        slots = [slot for slot in slots if slot != -1]
        adopt(self.cache, self.reference, slots, self.state_tolerance)
        for heads, request in zip(step.heads, some, strict=True):
            if request.slot != -1:
                self.count_step(request, heads)
                self.check_slot(request.slot)

    def count_step(self, request: Request, heads: list[HeadStep]) -> None:
        """Add to the counters of a slot what this step must add."""
        assert request.slot is not None
        for i, head in enumerate(heads):
            added = added_counters(head, i == 0, len(request))
            hits = added[COUNTERS.index("kv_head_hits")]
            self.counts.hits += hits
            self.counts.drafted += hits if len(head.source) > 1 else 0
            expected = self.expected[request.slot]
            self.expected[request.slot] = [a + b for a, b in zip(expected, added, strict=True)]

    def check_slot(self, slot: int | None) -> None:
        """Ring and statistics of one slot."""
        assert slot is not None
        check_ring(self.cache, self.reference, slot, self.state_tolerance)
        got = self.cache.stats().per_slot[slot].tolist()
        assert got == self.expected[slot], f"counters of slot {slot}"

    def check_slots(self) -> None:
        """All slots, those of nobody too."""
        for slot in range(self.cache.num_slots):
            self.check_slot(slot)
        self.cache.check()
