"""`batch_invariant`: what a request gets does not hang on what else is in its batch."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import PagedKV, make_kv, random_walk, small_config
from torch import Tensor

import mac_attn
from mac_attn.slot_state import SlotState

REQUESTS, STEPS = 12, 6
LENGTHS = [7900, 5600, 1300, 6000, 700, 90, 4095, 4097, 1025, 30, 3700, 6333]
CASES = {
    "exact": (2, 4, 64, None),
    "exact, 20 heads a KV head": (2, 20, 128, None),
    "by heads": (5, 3, 64, {"granularity": "head"}),
    "depth": (6, 2, 96, {"max_reuse_depth": 3}),
    "anchors": (5, 4, 64, {"anchors": 96, "min_context": 24}),
    "anchors, 256": (4, 2, 256, {"anchors": 64}),
    "anchors, 512": (4, 2, 512, {"anchors": 64}),
    "3 tokens, anchors": (5, 4, 64, {"anchors": 96, "threshold": 0.5}),
    "3 tokens, by heads": (5, 3, 64, {"granularity": "head", "threshold": 0.5}),
}


@dataclass
class Alone:
    """A request's last step without company: its slot before it, and what it must get."""

    before: SlotState | None
    out: Tensor
    lse: Tensor
    after: SlotState | None


class Pool:
    """Requests of which batches are made."""

    def __init__(self, name: str, device: Any) -> None:
        self.num_kv_heads, self.group, self.head_dim, options = CASES[name]
        self.tokens = 3 if name.startswith("3 tokens") else 1  # of a step; all but one are rejected
        self.config = None if options is None else small_config(**options)
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else random.choice(
            [torch.float32, torch.bfloat16, torch.float16]
        )  # fmt: skip
        shape = {"num_kv_heads": self.num_kv_heads, "head_dim": self.head_dim}
        self.kv: PagedKV = make_kv(
            7, batch=REQUESTS, length=max(LENGTHS) + STEPS + 2, dtype=self.dtype, device=device,
            **shape,
        )  # fmt: skip
        self.lengths = [n + STEPS + self.tokens - 1 for n in LENGTHS]
        self.kv.write([0] * REQUESTS, self.lengths)
        self.table = self.kv.table(self.lengths)
        self.walk = random_walk(
            3, STEPS + 2, REQUESTS, self.num_kv_heads, self.group, self.head_dim,
            jump=0.15 / self.tokens, dtype=self.dtype, device=device,
        )  # fmt: skip

    def rings(self, num_slots: int) -> mac_attn.ReuseCache | None:
        if self.config is None:
            return None
        return mac_attn.ReuseCache(
            self.config, num_slots=num_slots, num_qo_heads=self.num_kv_heads * self.group,
            num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, dtype=self.dtype,
            device=self.device, max_batch_size=2 * REQUESTS,
        )  # fmt: skip

    def step(
        self, t: int, requests: list[int], reuse: Any, slots: list[int], invariant: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Step t of some requests; -1 is a row of padding."""

        def ints(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        rows = [max(r, 0) for r in requests]
        lengths = [LENGTHS[r] + t + self.tokens if r >= 0 else 0 for r in requests]
        q = self.walk[t : t + self.tokens, rows].transpose(0, 1)
        if self.tokens == 1:
            q = q[:, 0]
        options = {} if reuse is None else {"reuse": reuse, "slots": ints(slots), "q_match": q}
        # As wide as this batch needs: of a request alone it may be narrower.
        table = self.table[rows, : max(1, -(-max(lengths) // self.kv.page_size))]
        out, lse = mac_attn.decode(
            q, self.kv.cache, table, ints(lengths),
            batch_invariant=invariant, return_lse=True, **options,
        )  # fmt: skip
        return out, lse

    def alone(self, r: int) -> Alone:
        reuse, before = self.rings(1), None
        for t in range(STEPS):
            if reuse is not None:
                before = reuse.export_slots(0)
            out, lse = self.step(t, [r], reuse, [0])
        return Alone(before, out[0], lse[0], None if reuse is None else reuse.export_slots(0))

    def put_back(
        self, reuse: Any, alone: list[Alone], requests: list[int], slots: list[int]
    ) -> None:
        """The slots as they were before the last step."""
        for r, slot in zip(requests, slots, strict=True):
            if reuse is not None and r >= 0:
                reuse.import_slots(slot, alone[r].before)


@pytest.mark.parametrize("name", CASES)
def test_a_request_gets_what_it_gets_alone(name, device):
    """Output, log-sum-exp and, with reuse, the whole slot with its new entry, bit for bit."""
    draw = random.Random(name)
    random.seed(name)
    pool = Pool(name, device)
    alone = [pool.alone(r) for r in range(REQUESTS)]
    reuse = pool.rings(REQUESTS)
    others = 0
    for number in range(40):
        chosen = draw.sample(range(REQUESTS), draw.randint(1, REQUESTS))
        slots = draw.sample(range(REQUESTS), len(chosen))
        requests = list(chosen)
        for _ in range(draw.randint(0, 2)):  # padding
            at = draw.randint(0, len(requests))
            requests.insert(at, -1)
            slots.insert(at, -1)

        pool.put_back(reuse, alone, requests, slots)
        out, lse = pool.step(STEPS - 1, requests, reuse, slots)
        for row, (r, slot) in enumerate(zip(requests, slots, strict=True)):
            if r < 0:
                assert not out[row].any()
                continue
            assert torch.equal(out[row], alone[r].out), (number, r)
            assert torch.equal(lse[row], alone[r].lse)
            if reuse is not None:
                assert torch.equal(reuse.export_slots(slot).ring, alone[r].after.ring)
        pool.put_back(reuse, alone, requests, slots)
        plain, _ = pool.step(STEPS - 1, requests, reuse, slots, invariant=False)
        others += sum(not torch.equal(plain[i], out[i]) for i, r in enumerate(requests) if r >= 0)
    if reuse is not None:
        assert 0.1 < reuse.stats().hit_rate < 0.95
    assert others  # without the option some differ: it does something
