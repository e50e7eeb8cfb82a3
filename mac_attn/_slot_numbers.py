"""Numbers of slots, and others for each of them, as callers give them: ints or tensors anywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import INT32_MAX, INT_DTYPES, check_int, check_tensor

Ints = int | Sequence[int] | Tensor


def ints(name: str, values: Ints, device: torch.device, high: int = INT32_MAX) -> Tensor:
    """One int or several as int64 `[k]`, on the CPU or, where the caller had them, the device."""
    if not isinstance(values, Tensor):
        numbers = list(values) if isinstance(values, Sequence) else [values]
        for number in numbers:
            check_int(name, number, low=-INT32_MAX, high=high)
        return torch.tensor(numbers, dtype=torch.int64)
    check_tensor(name, values, dtype=INT_DTYPES)
    if values.ndim > 1:
        raise ValueError(f"{name} has shape {list(values.shape)}, must be [] or [k]")
    if values.device.type != "cpu":
        check_tensor(name, values, device=device)
    return values.reshape(-1).to(torch.int64)


def valid_slots(given: Tensor, num_slots: int, *, distinct: bool) -> tuple[Tensor, Tensor]:
    """Which of some numbers are slots, where they must not be read back from a GPU.

    Returns them, `num_slots` for one out of range, and which of them are valid: in range and, if
    they must be `distinct`, given once.
    """
    in_range = (given >= 0) & (given < num_slots)
    index = given.where(in_range, num_slots)
    if not distinct:
        return index, in_range
    uses = torch.zeros(num_slots + 1, dtype=torch.int32, device=given.device)
    uses.index_add_(0, index, torch.ones_like(index, dtype=torch.int32))
    return index, in_range & (uses[index] == 1)


def valid_pairs(valid: Tensor) -> Tensor:
    """Indices `[k]` of pairs to copy: one that is not valid repeats the first that is."""
    return torch.arange(len(valid), device=valid.device).where(
        valid, valid.to(torch.int32).argmax()
    )
