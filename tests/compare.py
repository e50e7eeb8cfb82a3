"""A backend beside the reference: tolerances with their reasons, and the comparison of one step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from cases import PagedKV, one_thread
from torch import Tensor

import mac_attn
from mac_attn import reference
from mac_attn.reference import ReferenceReuse, Step


@dataclass
class Tolerance:
    """Largest accepted deviation from float64: `absolute + relative * |reference|`."""

    absolute: float
    relative: float

    def check(self, got: Tensor, want: Tensor, what: str) -> None:
        """Assert that got is within the tolerance of want, with equal infinities and no NaN."""
        got, want = got.detach().cpu().double(), want.detach().cpu().double()
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


def out_tolerance(dtype: torch.dtype, device: torch.device | str) -> Tolerance:
    """For `out` in the queries' dtype: the state's tolerance and one rounding, eps/2 relative."""
    state = state_tolerance(dtype, device)
    return Tolerance(state.absolute, state.relative + torch.finfo(dtype).eps / 2)


def check_clear(step: Step, margin: float = 1e-5) -> None:
    """Assert that no decision of a step hangs on rounding.

    Scores of float32 distances are off by about eps32 * sqrt(D) = 1e-6 relative; a case whose best
    score is within `margin` of 1 or of the runner-up would compare coin tosses, and needs
    another seed. Exact ties are fine: equal queries give equal scores on every backend.
    """
    for scores in step.scores:
        for row in scores.tolist():
            finite = sorted(s for s in set(row) if math.isfinite(s))
            if finite:
                assert abs(finite[0] - 1) > margin, f"score {finite[0]} is at the threshold"
            if len(finite) > 1 and finite[0] < 1:
                gap = (finite[1] - finite[0]) / finite[0] if finite[0] else math.inf
                assert gap > margin, f"scores {finite[:2]} are a near tie"


def check_ring(
    cache: mac_attn.ReuseCache, reference: ReferenceReuse, slot: int, tolerance: Tolerance
) -> None:
    """Assert that a slot of a ReuseCache holds what the reference's slot holds."""
    window, heads = cache.ring_position.shape[1], (reference.num_kv_heads, reference.group_size)
    want = reference.slots[slot]
    begin, end = int(cache.slot_begin[slot]), int(cache.slot_end[slot])
    assert (begin, end) == (want.begin, want.end)
    assert int(cache.slot_request[slot]) == want.request
    tags = cache.ring_position[slot].tolist()
    valid = {c for at, c in enumerate(tags) if begin <= c < end and c % window == at}
    entries = reference.entries(slot)
    assert valid == set(entries)
    if not entries:
        return
    at = torch.tensor([c % window for c in entries])

    def ours(name: str) -> Tensor:
        return getattr(cache, name)[slot].cpu()[:, at]

    def theirs(name: str) -> Tensor:
        rows = torch.stack([getattr(e, name) for e in entries.values()])
        return rows.unflatten(1, heads).transpose(0, 1)  # [Hkv, entries, G, ...]

    assert torch.equal(ours("ring_query").double().nan_to_num(), theirs("query").nan_to_num())
    assert torch.equal(ours("ring_depth").long(), theirs("depth"))
    tolerance.check(ours("ring_lse"), theirs("lse"), f"ring_lse of slot {slot}")
    # Where lse is -inf the state is empty, and o is 0 by definition.
    tolerance.check(ours("ring_out"), theirs("out"), f"ring_out of slot {slot}")
    if reference.cfg.anchors:
        anchors = ours("ring_anchors")
        for i, (c, entry) in enumerate(entries.items()):
            for head in range(heads[0]):
                row = anchors[head, i]
                count = int((row >= 0).sum())
                assert (row[count:] == -1).all(), f"unused anchors of {c} must come last: {row}"
                assert (
                    row[:count].sort().values.tolist() == entry.anchors[head].sort().values.tolist()
                )


class Twins:
    """A ReuseCache and the reference's, fed with the same steps and compared after each."""

    def __init__(
        self,
        cfg: mac_attn.ReuseConfig,
        *,
        num_slots: int,
        heads: tuple[int, int],
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        num_qo_heads, num_kv_heads = heads
        shape = {"num_slots": num_slots, "num_qo_heads": num_qo_heads, "num_kv_heads": num_kv_heads}
        self.cache = mac_attn.ReuseCache(
            cfg, **shape, head_dim=head_dim, dtype=dtype, device=device, **options
        )
        self.reference = ReferenceReuse(cfg, **shape)
        self.state = state_tolerance(dtype, device)
        self.out = out_tolerance(dtype, device)
        self.hits = self.decisions = 0

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
        order: list[int] | None = None,
        rings: bool = True,
        **softmax: Any,
    ) -> Step:
        """One step of both: request b has `lengths[b]` tokens (0: none now) and uses `slots[b]`.

        `order` is the order of the requests in the batch. Compares out, lse and, with `rings`, the
        rings; the anchors of a miss are the backend's choice and judged on their own.
        """
        device, order = q.device, list(range(len(lengths))) if order is None else order
        table, n = kv.table(lengths)[order], [lengths[b] for b in order]
        call = (q[order], kv.cache, table, torch.tensor(n, dtype=torch.int32, device=device))
        rows = {
            "slots": torch.tensor([slots[b] for b in order], dtype=torch.int32, device=device),
            "q_match": q_match[order],
            "request_ids": None
            if request_ids is None
            else torch.tensor([request_ids[b] for b in order], device=device),
            "kv_layout": kv.layout,
        }
        out, lse = mac_attn.decode(*call, reuse=self.cache, **rows, **softmax, return_lse=True)
        chosen = self.anchors([slots[b] for b in order], n)
        with one_thread():
            step = reference.decode(*call, reuse=self.reference, **rows, **softmax, anchors=chosen)
        check_clear(step)
        assert out.dtype == q.dtype and lse.dtype == torch.float32
        self.out.check(out, step.out, "out")
        self.state.check(lse, step.lse, "lse")
        active = torch.tensor(n) > 0
        self.hits += int((step.source[active] >= 0).sum())
        self.decisions += step.source[active].numel()
        if rings:
            for slot in slots:
                check_ring(self.cache, self.reference, slot, self.state)
        if chosen is not None:
            with one_thread():
                self.check_choice(step, *call[:3], n, chosen, kv.layout, softmax)
        return step

    def anchors(self, slots: list[int], seq_lens: list[int]) -> Tensor | None:
        """Anchors `[B, Hkv, S]` of the newest entries of the backend; None without anchors."""
        if not self.reference.cfg.anchors:
            return None
        window = self.reference.cfg.window
        rings = self.cache.ring_anchors.cpu()
        newest = [rings[slot, :, (n - 1) % window] for slot, n in zip(slots, seq_lens, strict=True)]
        return torch.stack(newest)

    def check_choice(
        self,
        step: Step,
        q: Tensor,
        kv_cache: Tensor | tuple[Tensor, Tensor],
        table: Tensor,
        seq_lens: list[int],
        chosen: Tensor,
        kv_layout: str,
        softmax: dict[str, Any],
    ) -> None:
        """Assert that the anchors of misses may be what they are: the S heaviest tokens.

        Equal weights may swap, and the weights of float32 logits are off by some 1e-6 of their
        size, hence the comparison of sorted weights. The CUDA kernels order 16 tokens by their
        heaviest and then tokens, each in bins of 1/8 log2 and by weights rounded to 8 bits, and may
        leave out tokens lighter than 2^-12 of the heaviest (csrc/cuda/anchors.cuh).
        """
        scale = softmax.get("sm_scale") or q.shape[-1] ** -0.5
        cap = softmax.get("logits_soft_cap", 0.0)
        for b, n in enumerate(seq_lens):
            old = self.reference.old_end(n - 1)
            if old == 0:
                continue
            k, _ = reference.gather_kv(kv_cache, table[b], n, kv_layout)
            for head, group in enumerate(q[b].cpu().double().chunk(k.shape[1])):
                if step.source[b, head * group.shape[0]] >= 0:
                    continue
                weights = reference.anchor_weights(group, k[:, head], scale, cap)[:old]
                best = weights.topk(min(self.reference.cfg.anchors, old)).values
                got = weights[chosen[b, head][chosen[b, head] >= 0].long()].sort(descending=True)
                if q.device.type == "cpu":
                    torch.testing.assert_close(got.values, best, rtol=1e-5, atol=0.0)
                    continue
                tokens = chosen[b, head][chosen[b, head] >= 0].tolist()
                assert tokens == sorted(set(tokens)) and tokens[-1] < old
                assert len(tokens) >= (best > 2**-11.9 * best[0]).sum()
                assert (got.values >= best[: len(tokens)] * 2**-0.26).all()
