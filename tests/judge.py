"""A backend's samples beside the float64 keys, and what makes the reference go on alike.

Keys in float32 are off by some 1e-6 of their size, so that a token whose key is that near to the
threshold may be in or out, and with it tau and what is stored afterwards. So the reference, when it
draws, asks a `Judge`: it checks the backend's list against the keys, and answers the list itself.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import mac_attn
from mac_attn.reference import Draw, ReferenceReuse, Sample, draw_sample, next_tau

ROOM = 4  # of candidates, in multiples of what a sample keeps


def sample_tolerance(device: torch.device | str) -> float:
    """Relative error of a key: that of exp(logit - lse) with both float32, of size up to 10.

    On the GPU exp and log are approximations, too.
    """
    return 1e-4 if torch.device(device).type == "cpu" else 1e-3


class Judge:
    """`choose` of the reference for a call that the backend has made already.

    `slots` are those of the call's rows. For `seed`, which makes many steps in a call, `taus` are
    the backend's `[N, H]` after each, see `seed_with_taus`.
    """

    def __init__(
        self,
        cache: mac_attn.ReuseCache,
        reference: ReferenceReuse,
        slots: list[int],
        tolerance: float,
        taus: dict[tuple[int, int], Tensor] | None = None,
    ) -> None:
        self.cache, self.reference, self.slots = cache, reference, slots
        self.tolerance, self.taus = tolerance, taus

    def __call__(self, draw: Draw) -> Sample:
        """The backend's sample, if the keys allow it."""
        slot, head, size = self.slots[draw.row], draw.kv_head, draw.size
        own, keys = draw_sample(draw), draw.keys.nan_to_num(nan=0.0)
        counts = [int((keys > draw.tau * (1 + x)).sum()) for x in (self.tolerance, -self.tolerance)]
        possible = set(range(counts[0], counts[1] + 1))
        taus = self.cache.ring_tau if self.taus is None else self.taus[draw.row, draw.position]
        tau = float(taus[slot, head])
        possible = {c for c in possible if near(next_tau(draw.tau, c, size), tau)}
        assert possible, f"tau went from {draw.tau} to {tau} by {counts} candidates"
        ring, room = self.reference.slots[slot].rings[head], self.cache.cfg.entries
        place = ring.stored % room
        stored = int(self.cache.ring_position[slot, head, place]) == draw.position
        # A tag may be left from another history of the slot.
        if self.taus is not None:
            stored = stored and min(possible) <= ROOM * size
        elif room > 1:
            stored = stored and int(self.cache.ring_stored[slot, head]) != ring.stored
        possible = {c for c in possible if (c <= ROOM * size) == stored}
        assert possible, f"{counts} candidates of {size} are {'' if stored else 'not '}stored"
        count = own.count if own.count in possible else min(possible)
        if not stored:
            return Sample(own.anchors[:0], own.weights[:0], count, own.threshold)
        row, weights = (
            getattr(self.cache, name)[slot, head, place].cpu()
            for name in ("ring_anchors", "ring_anchor_weights")
        )
        kept = row[row >= 0].long()
        self.check_list(draw, own.threshold, keys, kept, weights[: len(kept)].double())
        return Sample(kept, weights[: len(kept)].double(), count, own.threshold)

    def check_list(
        self, draw: Draw, threshold: float, keys: Tensor, kept: Tensor, weights: Tensor
    ) -> None:
        """Assert that these tokens and weights are the sample above a threshold."""
        where = f"sample of {draw.position}, row {draw.row}, KV head {draw.kv_head}"
        assert (kept.diff() > 0).all(), f"{where}: {kept} do not ascend"
        assert len(kept) == 0 or int(kept[-1]) < len(keys), f"{where}: {kept} are not old"
        inside = torch.zeros(len(keys), dtype=torch.bool)
        inside[kept] = True
        surely, maybe = (keys > threshold * (1 + x) for x in (self.tolerance, -self.tolerance))
        assert not (surely & ~inside).any(), f"{where} lacks {(surely & ~inside).nonzero()}"
        assert not (inside & ~maybe).any(), f"{where} should not have {(inside & ~maybe).nonzero()}"
        want = (threshold / draw.weights[kept] - 1).clamp(min=0)
        assert ((weights - want).abs() <= self.tolerance * (1 + want)).all(), f"weights of {where}"


def near(a: float, b: float) -> bool:
    """Whether two values of tau are the same but for the roundings of some ten steps."""
    return math.isclose(a, b, rel_tol=3e-6)


_patching = threading.Lock()  # two threads that seed would undo one another's patch


def seed_with_taus(
    cache: mac_attn.ReuseCache, *call: Any, **rows: Any
) -> dict[tuple[int, int], Tensor]:
    """Seed a cache; answers its tau `[N, H]` after the step of each (row, position)."""
    steps: list[Tensor] = []
    complete = mac_attn.ops.complete

    def recorded(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        result = complete(*args, **options)
        steps.append(cache.ring_tau.clone())
        return result

    with _patching, pytest.MonkeyPatch.context() as patch:
        patch.setattr(mac_attn.ops, "complete", recorded)
        mac_attn.seed(cache, *call, **rows)
    length, lens = call[0].shape[1], call[3].tolist()
    every = -(-length // cache.cfg.entries)
    chosen = range((length - 1) % every, length, every)
    taus = steps[-len(chosen) :]
    return {
        (b, n - length + t): tau
        for b, n in enumerate(lens)
        for t, tau in zip(chosen, taus, strict=True)
    }


def adopt(
    cache: mac_attn.ReuseCache, reference: ReferenceReuse, slots: list[int], tolerance: Any
) -> None:
    """Check the backend's tau and last log-sum-exps, and let the reference go on with them."""
    if not reference.cfg.anchors:
        return
    for slot in slots:
        for head, ring in enumerate(reference.slots[slot].rings):
            tau = float(cache.ring_tau[slot, head])
            assert near(tau, ring.tau), f"tau of slot {slot}, KV head {head}: {tau}, not {ring.tau}"
            ring.tau = tau
            if ring.last_lse is not None:
                got = cache.ring_last_lse[slot, head].cpu().double()
                tolerance.check(got, ring.last_lse, f"last_lse of slot {slot}, KV head {head}")
                ring.last_lse = got
