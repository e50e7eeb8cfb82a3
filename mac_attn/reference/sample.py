"""The sample of old tokens that an entry keeps, and the threshold that steers its size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_SHARE = 6  # a sample is no more than one in so many of the old tokens, but one
CANDIDATE_ROOM = 4  # in multiples of its size: an entry with more candidates is not stored
MOST_TAU = 64.0


def _mix(x: Tensor, last: bool = True) -> Tensor:
    """lowbias32 of numbers below 2^32 in int64; products wrap at 2^64, which keeps the low bits."""
    x = ((x ^ x >> 16) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ x >> 15) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ x >> 16 if last else x


def uniforms(position: int, kv_head: int, layer: int, count: int) -> Tensor:
    """u of the tokens `[0, count)`, float64 multiples of 2^-24 in (0, 1], by a hash.

    It differs between entries (their `position`), KV heads and layers.
    """
    seed = torch.tensor(position)
    for summand in (0, kv_head, layer):
        seed = _mix((seed + summand) & 0xFFFFFFFF)
    hashed = _mix((seed + torch.arange(count)) & 0xFFFFFFFF, last=False)
    return ((hashed >> 8) + 1).double() * 2.0**-24


def sample_size(anchors: int, old: int) -> int:
    """How many tokens a sample of `old` ones keeps at most, where there is room for `anchors`."""
    return min(anchors, max(1, old // LARGEST_SHARE))


@dataclass
class Draw:
    """The old tokens of one KV head as a sample of at most `size` is drawn from them."""

    row: int  # of the batch
    kv_head: int
    position: int  # whose entry the sample is for
    weights: Tensor  # [E] float64: w, the largest softmax weight over the group; NaN is never drawn
    keys: Tensor  # [E] float64: w / u
    tau: float  # what a candidate's key exceeds
    size: int


@dataclass
class Sample:
    """Tokens kept, and how many others each stands for."""

    anchors: Tensor  # int64 [<= S] positions, ascending
    weights: Tensor  # float64 [<= S]: a = 1 / pi - 1
    count: int  # candidates
    threshold: float  # t: those with larger keys were kept


def draw_sample(draw: Draw) -> Sample:
    """Keep the candidates, or of more than `size` those above the next largest key."""
    candidates = draw.keys[draw.keys > draw.tau]
    count, threshold = candidates.numel(), draw.tau
    if count > draw.size:
        threshold = float(candidates.topk(draw.size + 1).values[-1])
    kept = (draw.keys > threshold).nonzero().flatten()
    return Sample(kept, (threshold / draw.weights[kept] - 1).clamp(min=0), count, threshold)


def counted(weights: Tensor, size: int, old: int) -> Tensor:
    """How many tokens each of a sample of at most `size` of `old` ones is counted as: 1 + b.

    `1 / b = 1 / a + size / old`: a token that stands for many others answers for no more of them
    than one of an even sample would, as the rarer it was the less its value says about theirs.
    """
    return 1 + weights / (1 + weights * (size / max(old, 1)))


Choose = Callable[[Draw], Sample]


def first_tau(size: int) -> float:
    """tau of a slot that has drawn no sample yet."""
    return 1 / size


def next_tau(tau: float, count: int, size: int) -> float:
    """tau after a miss with `count` candidates, so that the next one has about 1.5 times `size`."""
    steered = tau * min(4.0, max(0.25, count / (1.5 * size)))
    return min(MOST_TAU, max(steered, 1 / (64 * size)))
