"""Thresholds for every KV head and anchors for every layer: a target error at the fewest bytes.

A replay's queries, keys and values are given, so what one KV head does changes nothing for another:
its error and its reads depend on its own threshold and anchors alone. One replay for each pair of
these therefore tells all that is needed, and the best choice for a sum of errors is one that
minimises `reads + price * error` head by head, at a price that is the same for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mac_attn._checks import check_int, check_number, check_type
from mac_attn.config import ReuseConfig

from .calibration import Calibration
from .capture import Capture, capture
from .replay import Replayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# 0 never hits and is exact.
THRESHOLDS = (0.0, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65)
ANCHORS = (128, 256, 512, 1024)


def calibrate(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    target_error: float = 0.04,
    base: ReuseConfig | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    anchors: Sequence[int] = ANCHORS,
    steps: int = 512,
) -> Calibration:
    """Choose every KV head's threshold and every layer's anchors for a model, from one text.

    The error is that of the attention outputs, |out - exact| / |exact|, mean over steps, layers and
    query heads. The text should be like those that will be decoded, and as long.

    Args:
        model: a transformers model that `MacCache` supports. Layers that never reuse get `base`.
        ids: [1, n] token ids; the last `steps` are decoded. n is at least base.min_context + steps:
            below min_context nothing is reused, so nothing could be learned.
        target_error: the mean error allowed, >= 0.
        base: the options that are not chosen; None is `ReuseConfig()`. Decisions must be per group
            and the threshold relative.
        thresholds: what to choose from; with 0 among them every target can be met.
        anchors: what to choose from.
        steps: decode steps of the replay, >= 1.

    Raises:
        ValueError, TypeError: an argument does not fit, no choice meets the target, or what the
            model computes is not finite.
    """
    base = ReuseConfig() if base is None else base
    check_type("base", base, ReuseConfig)
    check_int("steps", steps, low=1)
    if ids.shape[-1] < base.min_context + steps:
        raise ValueError(
            f"ids has {ids.shape[-1]} tokens, must have at least min_context + steps = "
            f"{base.min_context + steps}"
        )
    seeded = min(base.window, ids.shape[-1] - steps - 1)
    captured = capture(model, ids, steps=steps, seeded=seeded)
    return calibrate_capture(
        captured, target_error=target_error, base=base, thresholds=thresholds, anchors=anchors
    )


def calibrate_capture(
    captured: Capture,
    *,
    target_error: float = 0.04,
    base: ReuseConfig | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    anchors: Sequence[int] = ANCHORS,
) -> Calibration:
    """`calibrate` for what has been captured already."""
    base = ReuseConfig() if base is None else base
    if base.granularity != "group" or base.threshold_mode != "relative":
        raise ValueError(
            f"base has granularity {base.granularity!r} and threshold_mode "
            f"{base.threshold_mode!r}, must have 'group' and 'relative'"
        )
    check_number("target_error", target_error, low=0.0)
    if not thresholds or not anchors:
        raise ValueError("thresholds or anchors is empty, must hold a number to choose")
    replayer = Replayer(captured)
    error, read = measure(replayer, base, thresholds, anchors)
    finite = error.isfinite().all(3).all(1).all(0)  # [L]
    if not finite.all():
        layers = [
            n for n, fine in zip(captured.layer_index, finite.tolist(), strict=True) if not fine
        ]
        raise ValueError(
            f"captured has errors that are not finite in layers {layers}, must have finite "
            "queries, keys and values in all"
        )
    which_anchors, which_threshold = choose(error, read, target_error)

    group = captured.num_qo_heads // captured.num_kv_heads
    chosen = {
        number: replace(
            base,
            anchors=anchors[which_anchors[layer]],
            threshold=[thresholds[i] for i in which_threshold[layer] for _ in range(group)],
        )
        for layer, number in enumerate(captured.layer_index)
    }
    run = replayer(list(chosen.values()))
    configs = tuple(chosen.get(number, base) for number in range(captured.num_model_layers))
    return Calibration(configs, target_error, run.mean_error, run.kv_read_share)


def measure(
    replayer: Replayer, base: ReuseConfig, thresholds: Sequence[float], anchors: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Mean error and share of the KV read for each choice: float64 `[A, T, L, Hkv]`."""
    kv_heads = (replayer.captured.num_kv_heads, -1)
    errors, reads = [], []
    never = None
    for count in anchors:  # the outer loop, so that rings seeded for it serve all thresholds
        for threshold in thresholds:
            if threshold > 0 or never is None:
                run = replayer(replace(base, anchors=count, threshold=threshold))
            if threshold == 0:  # without hits anchors change nothing but rounding
                run = never = never or run
            errors.append(run.error.mean(0).unflatten(1, kv_heads).mean(2))
            reads.append(run.read_share())
    grid = (len(anchors), len(thresholds))
    error = torch.stack(errors).unflatten(0, grid).double()
    return error, torch.stack(reads).unflatten(0, grid).double()


def choose(error: Tensor, read: Tensor, target: float) -> tuple[list[int], list[list[int]]]:
    """For every layer which anchors, and for every KV head which threshold.

    error, read `[A, T, L, Hkv]`: mean error and share of the KV read for each choice. Of the
    choices with a mean error up to the target this finds one on the lower convex hull of reads over
    errors, and spends what is left up to the target on single heads.
    Raises ValueError if none has.
    """

    def best(price: float) -> tuple[Tensor, Tensor, float]:
        cost, threshold = (read + price * error).min(dim=1)  # [A, L, Hkv]
        anchors = cost.sum(2).argmin(dim=0)  # [L]
        layers = torch.arange(error.shape[2])
        threshold = threshold[anchors, layers]  # [L, Hkv]
        heads = torch.arange(error.shape[3])
        chosen = error[anchors[:, None], threshold, layers[:, None], heads]
        return anchors, threshold, float(chosen.mean())

    low, high = 0.0, 1.0
    while best(high)[2] > target:
        low, high = high, 4 * high
        if high > 1e12:
            raise ValueError(
                f"target_error is {target}, must be at least {best(high)[2]:.3g}, the least error "
                "of any choice; give 0 among the thresholds"
            )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if best(middle)[2] <= target else (middle, high)
    anchors, threshold, _ = best(high)
    layers = torch.arange(error.shape[2])
    _spend(error[anchors, :, layers], read[anchors, :, layers], threshold, target)
    return anchors.tolist(), threshold.tolist()


def _spend(error: Tensor, read: Tensor, threshold: Tensor, target: float) -> None:
    """Loosen single heads, the largest saving first, while the mean error stays up to the target.

    error, read `[L, T, Hkv]`; threshold `[L, Hkv]` is changed in place.
    """
    chosen = threshold[:, None]  # [L, 1, Hkv]
    while True:
        now = error.gather(1, chosen)
        slack = target * threshold.numel() - float(now.sum())
        saving = (read.gather(1, chosen) - read).masked_fill(error - now > slack, 0.0)
        best = int(saving.argmax())
        if float(saving.flatten()[best]) <= 1e-9:
            return
        layer, index, head = (int(i) for i in torch.unravel_index(torch.tensor(best), saving.shape))
        threshold[layer, head] = index
