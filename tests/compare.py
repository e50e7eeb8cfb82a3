"""A backend beside the reference: tolerances with their reasons, and the comparison of one step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from cases import PagedKV, one_thread, plain_dtype
from judge import Judge, adopt, sample_tolerance, seed_with_taus
from torch import Tensor

import mac_attn
from mac_attn import reference
from mac_attn.reference import Entry, HeadStep, ReferenceReuse, Step


@dataclass
class Tolerance:
    """Largest accepted deviation from float64: `absolute + relative * |reference|`."""

    absolute: float
    relative: float

    def check(self, got: Tensor, want: Tensor, what: str, gain: Tensor | float = 1.0) -> None:
        """Assert that got is within the tolerance of want, with equal infinities and no NaN.

        `absolute` is of terms whose sum may raise their errors: `gain` times.
        """
        got, want = got.detach().cpu().double() / gain, want.detach().cpu().double() / gain
        assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
        torch.testing.assert_close(
            got, want, atol=self.absolute, rtol=self.relative, msg=lambda text: f"{what}: {text}"
        )


def state_tolerance(dtype: torch.dtype, device: torch.device | str) -> Tolerance:
    """For lse and the float32 states of a ring.

    Accumulation is float32 on every backend: a logit is a sum of D products of about unit size,
    so it is off by some eps32 * sqrt(D) * |logit|, about 1e-6, and with it the weights, the lse and
    the mean of values of unit size; a chain of merges adds a few eps32. 2e-5 leaves a factor of 10.
    On the GPU 16-bit weights enter the tensor cores rounded to their own type (2^-9 for bfloat16),
    on values of up to 4 sigma.
    """
    if torch.device(device).type == "cuda" and dtype != torch.float32:
        return Tolerance(4 * torch.finfo(dtype).eps, 0.0)
    return Tolerance(2e-5, 2e-5)


def out_tolerance(dtype: torch.dtype, device: torch.device | str, roundings: int = 1) -> Tolerance:
    """For `out` in the queries' dtype: the state's tolerance and a rounding, eps/2 relative.

    There are two `roundings` beside another output of that dtype.
    """
    state = state_tolerance(dtype, device)
    return Tolerance(state.absolute, state.relative + roundings * torch.finfo(dtype).eps / 2)


def check_clear(step: Step, tolerance: Tolerance, margin: float = 1e-5) -> None:
    """Assert that no decision of a step hangs on rounding.

    Scores of float32 distances are off by about eps32 * sqrt(D) = 1e-6 relative; a case whose best
    score is within `margin` of 1 or of the runner-up would compare coin tosses, and needs
    another seed. Exact ties are fine: equal queries give equal scores on every backend. What a
    hit's anchors leave of an entry's sum is a difference of numbers of unit size; whether so little
    counts is within the tolerance of 16-bit weights.
    """
    for head in (head for row in step.heads for head in row):
        for row in (row for scores in head.scores for row in scores.tolist()):
            finite = sorted(s for s in set(row) if math.isfinite(s))
            if finite:
                assert abs(finite[0] - 1) > margin, f"score {finite[0]} is at the threshold"
            if len(finite) > 1 and finite[0] < 1:
                gap = (finite[1] - finite[0]) / finite[0] if finite[0] else math.inf
                assert gap > margin, f"scores {finite[:2]} are a near tie"
        for rest in head.rest if tolerance.absolute < reference.LEAST_REST else ():
            near = (rest.abs() - reference.LEAST_REST).abs() < 10 * margin
            assert not near.any(), f"the rest {rest} is as little as what counts as empty"


def added_counters(head: HeadStep, first: bool, seq_len: int) -> list[int]:
    """What a step of one KV head, the request's `first` or another, adds to a slot's counters."""
    steps, group = head.source.shape
    hits = int((head.source >= 0).sum())
    all_hit = steps * (hits == steps * group)
    full = sum(range(seq_len - steps + 1, seq_len + 1))
    stored = int(head.stored)
    return [first * steps, steps, all_hit, hits, head.tokens, full, head.anchors, stored]


def check_ring(
    cache: mac_attn.ReuseCache, reference: ReferenceReuse, slot: int, tolerance: Tolerance
) -> None:
    """Assert that a slot of a ReuseCache holds what the reference's slot holds."""
    want = reference.slots[slot]
    history = (cache.slot_end[slot], cache.slot_reach[slot], cache.slot_request[slot])
    assert [int(number) for number in history] == [want.end, want.reach, want.request]
    for head, ring in enumerate(want.rings):
        size, where = len(ring.places), f"of slot {slot}, KV head {head}"
        assert int(cache.ring_stored[slot, head]) == ring.stored, f"entries {where}"
        history = [(ring.stored - 1 - age) % size for age in range(min(ring.stored, size))]
        tags = cache.ring_position[slot, head].tolist()
        entries = [ring.places[at] for at in history]
        assert [tags[at] for at in history] == [e.position if e else -1 for e in entries], where
        places = [at for at, e in zip(history, entries, strict=True) if e]
        entries = [e for e in entries if e]
        if entries:
            parts = {
                name: getattr(cache, f"ring_{name}")[slot, head].cpu()[places]
                for name in ("query", "rotated", "depth", "lse", "out", "anchors", "anchor_weights")
            }
            check_entries(parts, entries, tolerance, where)


def check_entries(
    ours: dict[str, Tensor], entries: list[Entry], tolerance: Tolerance, where: str
) -> None:
    """Assert that entries of a ReuseCache, parts `[entries, ...]`, are the reference's."""

    def theirs(name: str) -> Tensor:
        return torch.stack([getattr(entry, name) for entry in entries])

    sampled = ours["anchors"].shape[1] > 0
    for name in ("query", "rotated") if sampled else ("query",):
        same = torch.equal(ours[name].double().nan_to_num(), theirs(name).nan_to_num())
        assert same, f"ring_{name} {where}"
    assert torch.equal(ours["depth"].long(), theirs("depth")), f"ring_depth {where}"
    tolerance.check(ours["lse"], theirs("lse"), f"ring_lse {where}")
    # Where lse is -inf the state is empty, and o is 0 by definition.
    tolerance.check(ours["out"], theirs("out"), f"ring_out {where}")
    # The samples have been judged, and taken over by the reference: `Judge`.
    for i, entry in enumerate(entries if sampled else []):
        row, weights, count = ours["anchors"][i], ours["anchor_weights"][i], len(entry.anchors)
        assert row[:count].tolist() == entry.anchors.tolist(), f"ring_anchors {where}"
        assert torch.equal(weights[:count].double(), entry.weights), f"ring_anchor_weights {where}"
        unused = (row[count:] == -1) & (weights[count:] == 0)
        assert unused.all(), f"unused anchors {where}"


class Twins:
    """A ReuseCache and the reference's, fed with the same steps and compared after each."""

    def __init__(
        self,
        cfg: mac_attn.ReuseConfig,
        *,
        num_slots: int,
        heads: tuple[int, int],
        head_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        dtype = dtype or plain_dtype(device)
        num_qo_heads, num_kv_heads = heads
        shape = {"num_slots": num_slots, "num_qo_heads": num_qo_heads, "num_kv_heads": num_kv_heads}
        self.cache = mac_attn.ReuseCache(
            cfg, **shape, head_dim=head_dim, dtype=dtype, device=device, **options
        )
        self.reference = ReferenceReuse(cfg, **shape, layer=options.get("layer", 0))
        self.state = state_tolerance(dtype, device)
        self.out = out_tolerance(dtype, device)
        self.hits = self.decisions = 0
        self.sampling = sample_tolerance(device)

    @property
    def hit_rate(self) -> float:
        """Share of hits among the decisions (of query heads) compared so far."""
        return self.hits / self.decisions

    def decode(
        self,
        kv: PagedKV,
        lengths: list[int],
        q: Tensor,
        q_match: Tensor,
        slots: list[int],
        *,
        request_ids: list[int] | None = None,
        query_lens: list[int] | None = None,
        order: list[int] | None = None,
        rings: bool = True,
        **softmax: Any,
    ) -> Step:
        """One step of both: request b has `lengths[b]` tokens (0: none now) and uses `slots[b]`.

        q and q_match are of one query token or of several, `query_lens[b]` of each request.

        `order` is the order of the requests in the batch. Compares out, lse and, with `rings`, the
        rings and counters; the samples of a miss are judged on their own.
        """
        device, order = q.device, list(range(len(lengths))) if order is None else order
        table, n = kv.table(lengths)[order], [lengths[b] for b in order]
        call = (q[order], kv.cache, table, torch.tensor(n, dtype=torch.int32, device=device))
        rows = {
            "slots": torch.tensor([slots[b] for b in order], dtype=torch.int32, device=device),
            "q_match": q_match[order],
            "query_lens": None
            if query_lens is None
            else torch.tensor([query_lens[b] for b in order], dtype=torch.int32, device=device),
            "request_ids": None
            if request_ids is None
            else torch.tensor([request_ids[b] for b in order], device=device),
            "kv_layout": kv.layout,
            **kv.scales,
        }
        counters = self.cache.counters.cpu().clone()
        out, lse = mac_attn.decode(*call, reuse=self.cache, **rows, **softmax, return_lse=True)
        judge = Judge(self.cache, self.reference, rows["slots"].tolist(), self.sampling)
        with one_thread():
            step = reference.decode(*call, reuse=self.reference, **rows, **softmax, choose=judge)
        check_clear(step, self.state)
        assert out.dtype == q.dtype and lse.dtype == torch.float32
        self.out.check(out, step.out, "out", step.gain[..., None])
        self.state.check(lse, step.lse, "lse", step.gain)
        sources = [head.source for row in step.heads for head in row]
        self.hits += sum(int((source >= 0).sum()) for source in sources)
        self.decisions += sum(source.numel() for source in sources)
        adopt(self.cache, self.reference, slots, self.state)
        if rings:
            for slot in slots:
                check_ring(self.cache, self.reference, slot, self.state)
        self.check_counters(step, n, rows["slots"].tolist(), counters)
        return step

    def check_counters(
        self, step: Step, seq_lens: list[int], slots: list[int], was: Tensor
    ) -> None:
        """Assert that the counters grew by what the step has done."""
        want = was.clone()
        for heads, n, slot in zip(step.heads, seq_lens, slots, strict=True):
            for i, head in enumerate(heads):
                want[slot] += torch.tensor(added_counters(head, i == 0, n))
        assert torch.equal(self.cache.counters.cpu(), want), self.cache.counters.cpu() - want

    def seed(self, *call: Any, **rows: Any) -> None:
        """Seed both; arguments as for `mac_attn.seed`."""
        taus = seed_with_taus(self.cache, *call, **rows)
        slots = rows["slots"].tolist()
        # Weights go by log-sum-exps that are not taken over from the backend between the steps.
        judge = Judge(self.cache, self.reference, slots, self.sampling + self.state.absolute, taus)
        with one_thread():
            reference.seed(self.reference, *call, **rows, choose=judge)
        adopt(self.cache, self.reference, slots, self.state)
