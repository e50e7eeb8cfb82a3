"""The tensors of a decode step and rings in which a chosen share of the heads finds a match.

Hits are planted: the ring is full of random queries, which are too far from the current one to be
reused (with a head_dim of 64 or more), and one entry of a given age holds the current query itself
for those heads that are to hit. The kernels run as they always do and find it or not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

import mac_attn
from mac_attn.floor import Floor, step_floor


@dataclass(frozen=True)
class Case:
    """Shapes of a decode step. `context` tokens are in the cache before it, so seq_len is one more.

    So it is in the sweep of the method's authors too.
    """

    num_qo_heads: int
    num_kv_heads: int
    context: int
    batch: int
    head_dim: int = 128
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    float8: bool = False  # the KV cache

    @classmethod
    def of(
        cls, layout: str, context: int, batch: int, head_dim: int = 128, page_size: int = 16
    ) -> Case:
        """With the heads as "32/8": 32 query heads, 8 KV heads."""
        num_qo_heads, num_kv_heads = map(int, layout.split("/"))
        return cls(num_qo_heads, num_kv_heads, context, batch, head_dim, page_size)

    @property
    def seq_len(self) -> int:
        return self.context + 1

    @property
    def group_size(self) -> int:
        return self.num_qo_heads // self.num_kv_heads

    @property
    def pages_per_request(self) -> int:
        return -(-self.seq_len // self.page_size)

    @property
    def layout(self) -> str:
        return f"{self.num_qo_heads}/{self.num_kv_heads}"

    def __str__(self) -> str:
        return f"{self.layout} heads, batch {self.batch}, context {self.context}"

    def floor(
        self, cfg: mac_attn.ReuseConfig | None = None, hits: Tensor | None = None, age: int = 1
    ) -> Floor:
        """The floor of an exact step, or of one in which `hits` [B, Hq] reuse the entry of `age`"""
        sources = None
        if hits is not None:
            source = self.seq_len - 1 - age
            sources = [[source if hit else -1 for hit in row] for row in hits.tolist()]
        return step_floor(
            [self.seq_len] * self.batch,
            num_qo_heads=self.num_qo_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            itemsize=self.dtype.itemsize,
            page_size=self.page_size,
            kv_itemsize=1 if self.float8 else None,
            cfg=cfg,
            sources=sources,
        )


class Workload:
    """Queries and a paged KV cache with shuffled pages, all random.

    Attributes:
        q, q_match: [B, Hq, D], with the rotary embedding and before it.
        rotary: that embedding.
        kv: [pages, 2, page_size, Hkv, D], the pair of K and V in dimension 1.
        block_table: [B, pages per request] int32
        seq_lens, slots: [B] int32
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        self.device = device
        pages = case.batch * case.pages_per_request
        shape = (pages, 2, case.page_size, case.num_kv_heads, case.head_dim)
        # In the cache's dtype from the start: at 33 GB there is no room for a float32 copy.
        self.scales: dict[str, Tensor] = {}
        if case.float8:
            self.kv = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
            for part in self.kv.split(1024):
                part.copy_(torch.randn(part.shape, dtype=case.dtype, device=device))
            one = torch.ones(case.num_kv_heads, device=device)
            self.scales = {"k_scale": one, "v_scale": one}
        else:
            self.kv = torch.empty(shape, dtype=case.dtype, device=device).normal_()
        self.block_table = (
            torch.randperm(pages, device=device).int().view(case.batch, case.pages_per_request)
        )
        self.seq_lens = torch.full((case.batch,), case.seq_len, dtype=torch.int32, device=device)
        self.slots = torch.arange(case.batch, dtype=torch.int32, device=device)
        heads = (case.batch, case.num_qo_heads, case.head_dim)
        self.q_match = torch.randn(heads, device=device).to(case.dtype)
        pairs = torch.arange(case.head_dim // 2, device=device) / (case.head_dim // 2)
        self.rotary = mac_attn.RotaryEmbedding(10000.0**-pairs)
        self.q = mac_attn.rotate(self.q_match, self.seq_lens - 1, self.rotary)

    def exact(self, *, batch_invariant: bool = False) -> Tensor:
        out = mac_attn.decode(
            self.q,
            self.kv,
            self.block_table,
            self.seq_lens,
            batch_invariant=batch_invariant,
            **self.scales,
        )
        assert isinstance(out, Tensor)
        return out

    def mac(self, reuse: mac_attn.ReuseCache, *, turned: bool = False) -> Tensor:
        """A step with reuse; with `turned` it is not given the queries before their rotation."""
        out = mac_attn.decode(
            self.q,
            self.kv,
            self.block_table,
            self.seq_lens,
            reuse=reuse,
            slots=self.slots,
            q_match=None if turned else self.q_match,
            **self.scales,
        )
        assert isinstance(out, Tensor)
        return out

    @cached_property
    def dense(self) -> tuple[Tensor, Tensor]:
        """A copy of K and V in order, each [B, seq_len, Hkv, D], for peers that know no pages."""
        case = self.case
        shape = (case.batch, -1, case.num_kv_heads, case.head_dim)
        table = self.block_table.long()
        k, v = (self.kv[:, i][table].view(shape)[:, : case.seq_len] for i in range(2))
        return k, v

    @cached_property
    def dense_by_head(self) -> tuple[Tensor, Tensor]:
        """The same as [B, Hkv, seq_len, D], contiguous."""
        k, v = (t.transpose(1, 2).contiguous() for t in self.dense)
        return k, v


def reuse_config(
    granularity: str, anchors: int, entries: int | None = None
) -> mac_attn.ReuseConfig:
    """The paper's setting with decisions per head (it has no anchors), ours with group decisions.

    Band 256 in both, as in the authors' sweep. Entries, if not given: 512 without anchors, as in
    the authors' server (2,048 in their sweep), and with them our default.
    """
    cfg = (
        mac_attn.ReuseConfig.paper()
        if granularity == "head"
        else mac_attn.ReuseConfig(anchors=anchors)
    )
    if entries is None and anchors == 0:
        entries = 512
    if entries is None:
        return cfg
    return replace(cfg, entries=entries, window=max(cfg.window, entries))


def hit_mask(case: Case, granularity: str, rate: float, spread: str) -> Tensor:
    """Which heads are to hit: bool [B, Hq] with exactly round(rate * decisions) hits.

    Decisions are (request, query head) pairs for granularity "head", (request, KV head) pairs for
    "group".

    spread "run": the misses are one run over the flattened decisions, from the last query head of a
    KV head on. That is the authors' quota, as the miss masks in their published results show
    (results/cuda_graph_hit_curves in github.com/YJHMITWEB/MAC-Attention), and it is kind: most KV
    heads miss as a whole. spread "even": as far apart as can be, rotated from request to request,
    so that with decisions per head nearly every KV head is read in full for the sake of one head.
    """
    heads = case.num_qo_heads if granularity == "head" else case.num_kv_heads
    total = case.batch * heads
    quota = math.floor(rate * total + 0.5)
    index = torch.arange(total)
    if spread == "run":
        first_miss = case.group_size - 1 if granularity == "head" else 0
        mask = ((index - first_miss) % total >= total - quota).view(case.batch, heads)
    elif spread == "even":
        mask = ((index + 1) * quota // total > index * quota // total).view(case.batch, heads)
        mask = torch.stack([row.roll(b) for b, row in enumerate(mask)])
    else:
        raise ValueError(f"spread is {spread!r}, must be 'run' or 'even'")
    if granularity == "group":
        mask = mask.repeat_interleave(case.group_size, dim=1)
    return mask


class PlantedRing:
    """A full ring for every request of a workload, and what puts it back after a step.

    A miss overwrites the oldest entry, and a step moves the slots' history on. `put_back` undoes
    both and plants the hits of a mask, in a few small copies that do not wait for the device. The
    counters are left to run: `reuse.stats()` covers every step; so is what sampling is steered by.
    """

    def __init__(self, work: Workload, cfg: mac_attn.ReuseConfig, age: int) -> None:
        case, device = work.case, work.device
        if not 1 <= age <= cfg.entries:
            raise ValueError(f"age is {age}, must be from 1 to the entries, {cfg.entries}")
        if case.context < max(cfg.entries + cfg.band, cfg.min_context):
            raise ValueError(f"context is {case.context}, must be longer for a full ring of hits")
        self.case = case
        self.age = age
        self.reuse = mac_attn.ReuseCache(
            cfg,
            num_slots=case.batch,
            num_qo_heads=case.num_qo_heads,
            num_kv_heads=case.num_kv_heads,
            head_dim=case.head_dim,
            dtype=case.dtype,
            device=device,
            rotary=work.rotary,
        )
        reuse, entries = self.reuse, cfg.entries
        # Logits of random queries are normal: their log-sum-exp is ln n + 1/2.
        lse = math.log(case.context) + 0.5
        reuse.ring_query.normal_()
        reuse.ring_out.normal_()
        reuse.ring_lse.fill_(lse)
        if cfg.anchors:
            # E(c) of the oldest entry, of a step of many tokens.
            oldest = max(1, case.seq_len - mac_attn.MAX_QUERY_TOKENS - entries + 1 - cfg.band)
            positions = torch.randint(0, oldest, reuse.ring_anchors.shape, device=device)
            reuse.ring_anchors.copy_(positions.sort(-1).values)
            reuse.ring_anchor_weights.fill_(case.context / cfg.anchors)
            reuse.ring_rotated.normal_()
            reuse.ring_last_lse.fill_(lse)
            reuse.ring_tau.fill_(1 / cfg.anchors)
        self.missed = 0  # steps in a row without a hit, before the one that is timed
        self._position = -1  # where the slots have ended
        self._planted = entries - age
        self._queries = work.q_match[:, None]
        # Of the places that entries are planted at, the youngest last; and of the oldest one.
        first = max(0, self._planted + 1 - mac_attn.MAX_QUERY_TOKENS)
        self._random = reuse.ring_query[:, :, first : self._planted + 1].clone()
        self._oldest = reuse.ring_query[:, :, 0].clone()
        self.put_back(self.on_device(torch.zeros(case.batch, case.num_qo_heads, dtype=torch.bool)))

    def on_device(self, hits: Tensor) -> Tensor:
        """A mask [B, Hq] in the form that `put_back` takes: [B, Hkv, G, 1] on the device."""
        case = self.case
        shape = (case.batch, case.num_kv_heads, case.group_size, 1)
        return hits.view(shape).to(self.reuse.device)

    def put_back(self, hits: Tensor, queries: Tensor | None = None) -> None:
        """For the workload's step or one of several tokens, with pre-RoPE queries [B, T, Hq, D].

        The first one's entry has `age`, those of the others are each one older.
        """
        reuse, entries = self.reuse, self.reuse.cfg.entries
        queries = self._queries if queries is None else queries
        tokens = queries.shape[1]
        reuse.ring_query[:, :, 0].copy_(self._oldest)
        by_head = queries.unflatten(2, (self.case.num_kv_heads, -1)).unbind(1)
        for token, query in enumerate(by_head):
            random = self._random[:, :, -1 - token]
            reuse.ring_query[:, :, self._planted - token].copy_(torch.where(hits, query, random))
        position = self.case.seq_len - tokens
        if position == self._position:
            reuse.ring_position[:, :, 0].fill_(position - entries)
        else:  # one entry for each of the last positions, the oldest where the next one goes
            every = torch.arange(position - entries, position, dtype=torch.int32)
            reuse.ring_position.copy_(every)
            self._position = position
        reuse.ring_stored.fill_(entries)
        reuse.ring_missed.fill_(self.missed)
        for bound in (reuse.slot_end, reuse.slot_reach):
            bound.fill_(position)

    def check_match(self, work: Workload, hits: Tensor) -> None:
        """After `put_back(hits)`: match finds just the planted entries. Raises SystemExit."""
        source = mac_attn.match(self.reuse, work.q_match, work.seq_lens, work.slots).source
        expected = torch.where(hits.view(source.shape), self._position - self.age, -1)
        if not torch.equal(source, expected.to(source.dtype)):
            wrong = int((source != expected).sum())
            raise SystemExit(f"{self.case}: {wrong} heads did not find what was planted for them")
