"""Means and their 95% intervals by bootstrap over groups of numbers that belong together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Interval = tuple[float, float, float]  # mean, and the ends of its interval


def mean_interval(groups: Sequence[Sequence[float]], rounds: int = 4000) -> Interval:
    """Mean over all numbers, and its interval when whole groups are drawn anew.

    Raises ValueError if there is no number.
    """
    sums = torch.tensor([sum(group) for group in groups], dtype=torch.float64)
    counts = torch.tensor([len(group) for group in groups], dtype=torch.float64)
    if not counts.sum():
        raise ValueError("groups is empty, must hold at least one number")
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(sums), (rounds, len(sums)), generator=generator)
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(sums.sum() / counts.sum()), low, high
