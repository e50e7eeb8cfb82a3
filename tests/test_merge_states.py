"""Merging attention states of which some are empty, in the ways that kernels write that."""

from __future__ import annotations

import math

import pytest
import torch

import mac_attn

EMPTY = [(0.0, -math.inf), (math.nan, -math.inf), (0.0, math.inf), (math.nan, math.inf)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mean", "empty"), EMPTY)
def test_an_empty_state_changes_nothing(
    mean: float, empty: float, dtype: torch.dtype, device: torch.device
) -> None:
    out, lse = torch.randn(3, 2, 8).to(device, dtype), torch.randn(3, 2, device=device)
    nothing = torch.full_like(out, mean), torch.full_like(lse, empty)
    for merged, merged_lse in (
        mac_attn.merge_states(out, lse, *nothing),
        mac_attn.merge_states(*nothing, out, lse),
    ):
        assert merged.dtype == dtype
        assert torch.equal(merged, out) and torch.equal(merged_lse, lse)
    merged, merged_lse = mac_attn.merge_states(*nothing, *nothing)
    assert not merged.any() and (merged_lse == -math.inf).all()


def test_nan_of_a_state_that_is_not_empty_stays() -> None:
    out, lse = torch.full((1, 4), math.nan), torch.zeros(1)
    merged, _ = mac_attn.merge_states(out, lse, torch.zeros(1, 4), torch.zeros(1))
    assert merged.isnan().all()
