"""The options of reuse: how far back to look, how alike is enough, what is attended afresh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ._checks import check_choice, check_int, check_number

if TYPE_CHECKING:
    from .calibrate import Calibration


MAX_ENTRIES = 1 << 24  # and anchors: csrc/ops.cpp


@dataclass(frozen=True)
class ReuseConfig:
    """Options of reuse, checked when constructed; immutable, comparable and hashable.

    At a step of position p the pre-RoPE query is compared with those stored of the `window`
    positions before. If the nearest is within the threshold, its attention result over the old
    tokens is reused and only the newest ones, from `band` tokens before it on, and a sample of the
    old ones, its anchors, are attended afresh.

    Args:
        entries: how many queries with their results a KV head keeps, >= 1. Only what may be reused
            is stored, so with `max_reuse_depth=1` they are those of the last misses. Memory and
            matching time grow with them.
        window: how many positions back an entry may lie, >= 1. The older the entry, the more
            tokens a hit attends afresh.
        band: newest tokens of an entry that are never reused but always attended afresh, >= 1. A
            larger band lowers the error of a hit and raises its cost.
        anchors: old tokens per KV head that a hit attends exactly with its own query, >= 0: a
            sample by weight, so that the heaviest are among them for certain and the others tell
            how the rest has moved. The error of a hit falls like 1 / sqrt(anchors). Not in the
            paper: 0 is the paper.
        threshold: how far apart two queries may be, one number or one per query head (a sequence or
            tensor `[num_qo_heads]`, kept as a tuple). 0 in the relative and 1 in the absolute mode
            never hit. Higher ones read less and lose more (docs/fidelity.md).
        threshold_mode: "relative": the squared distance must be below `threshold * |query|²`.
            "absolute" (the paper): below `2 * head_dim * (1 - threshold)²`, the threshold being
            the paper's τ in `[0, 1]`.
        max_drift: by how much a hit may move logits: the expected square of the change, in nats²,
            is the squared distance of the queries times the keys' spread, which is measured when a
            slot starts and as its request grows (of fewer than 512 tokens it is taken as that of
            the sharpest heads). It lowers the threshold of heads whose queries and keys are large,
            where a token that no sample holds may suddenly become the heaviest. Not in the paper:
            None is no bound.
        granularity: "group": the query heads that share a KV head decide together, by the mean of
            their scores, so that a KV head is read in full for all of them or for none. "head" (the
            paper): each for itself; needs `anchors=0`.
        min_context: shortest seq_len at which a hit is allowed, >= 0.
        max_reuse_depth: longest chain of reuse, >= 1: an entry made by that many hits in a row is
            not reused again. 1 reuses only results of exact attention, so that errors do not build
            up over a long generation; `anchors` need that. None is no limit (the paper).

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type.
    """

    entries: int = 128
    window: int = 2048
    band: int = 256
    anchors: int = 1024
    threshold: float | Sequence[float] | Tensor = 0.4
    threshold_mode: Literal["relative", "absolute"] = "relative"
    max_drift: float | None = 4.0
    granularity: Literal["group", "head"] = "group"
    min_context: int = 2048
    max_reuse_depth: int | None = 1

    def __post_init__(self) -> None:
        check_int("entries", self.entries, low=1, high=MAX_ENTRIES)
        check_int("window", self.window, low=1)
        check_int("band", self.band, low=1)
        check_int("anchors", self.anchors, low=0, high=MAX_ENTRIES)
        check_int("min_context", self.min_context, low=0)
        if self.max_reuse_depth is not None:
            check_int("max_reuse_depth", self.max_reuse_depth, low=1)
        check_choice("threshold_mode", self.threshold_mode, ("relative", "absolute"))
        if self.max_drift is not None:
            high = torch.finfo(torch.float32).max
            object.__setattr__(
                self, "max_drift", check_number("max_drift", self.max_drift, low=1e-6, high=high)
            )
        check_choice("granularity", self.granularity, ("group", "head"))
        if self.granularity == "head" and self.anchors > 0:
            raise ValueError(
                f"anchors is {self.anchors}, must be 0 with granularity='head': "
                "anchors belong to a KV head, so its query heads must decide together"
            )
        if self.max_reuse_depth != 1 and self.anchors > 0:
            raise ValueError(
                f"anchors is {self.anchors}, must be 0 with "
                f"max_reuse_depth={self.max_reuse_depth}: anchors are drawn from exact attention, "
                "so only that can be reused"
            )
        # Plain numbers, so that configs compare, hash and do not change with a caller's tensor.
        object.__setattr__(self, "threshold", self._plain_threshold(self.threshold))

    def _plain_threshold(self, threshold: Any) -> float | tuple[float, ...]:
        # τ > 1 would widen the threshold again: a slip, not a setting. rho ends up as a float32.
        high = 1.0 if self.threshold_mode == "absolute" else torch.finfo(torch.float32).max
        if isinstance(threshold, Tensor):
            if threshold.ndim > 1:
                raise ValueError(
                    f"threshold has shape {list(threshold.shape)}, must be [] or [num_qo_heads]"
                )
            threshold = threshold.tolist()
        if isinstance(threshold, Sequence) and not isinstance(threshold, str):
            if not threshold:
                raise ValueError("threshold is empty, must hold one number per query head")
            return tuple(
                check_number(f"threshold[{i}]", number, low=0.0, high=high)
                for i, number in enumerate(threshold)
            )
        return check_number("threshold", threshold, low=0.0, high=high)

    def threshold_per_head(self, num_qo_heads: int, head_dim: int) -> Tensor:
        """What the kernels compare with, float32 `[num_qo_heads]` on the CPU.

        Absolute mode: θ = 2 * head_dim * (1 - τ)²; relative mode: the factor of |query|². Raises
        ValueError if the config holds another number of thresholds than there are query heads.
        """
        assert isinstance(self.threshold, (float, tuple))  # by __post_init__
        given = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        if len(given) not in (1, num_qo_heads):
            raise ValueError(
                f"threshold has {len(given)} numbers, must have 1 or num_qo_heads = {num_qo_heads}"
            )
        number = torch.tensor(given, dtype=torch.float64)
        if self.threshold_mode == "absolute":
            number = 2.0 * head_dim * (1.0 - number) ** 2
        return number.float().expand(num_qo_heads).contiguous()

    @classmethod
    def from_calibration(cls, calibration: Calibration | str | Path, layer: int) -> ReuseConfig:
        """The options of one layer that `mac_attn.calibrate` has chosen.

        Args:
            calibration: what `calibrate` returned, or the JSON file it was saved to.
            layer: number of the layer, from 0.

        Raises:
            ValueError: the file is no calibration, or has no such layer.
        """
        from .calibrate import Calibration  # which needs this class

        if not isinstance(calibration, Calibration):
            calibration = Calibration.load(calibration)
        return calibration.config(layer)

    @classmethod
    def paper(cls) -> ReuseConfig:
        """The settings of MAC-Attention (arXiv:2604.00235): τ = 0.45, every head for itself."""
        return cls(
            entries=512,
            window=512,
            band=256,
            anchors=0,
            threshold=0.45,
            threshold_mode="absolute",
            max_drift=None,
            granularity="head",
            min_context=2048,
            max_reuse_depth=None,
        )

    @classmethod
    def drafts(cls) -> ReuseConfig:
        """For steps whose tokens are verified (`Lossless`): laxer and cheaper than the default.

        What a draft gets wrong costs its acceptance, not quality (docs/transformers.md).
        """
        return cls(threshold=0.6, max_drift=None, anchors=512, window=512)
