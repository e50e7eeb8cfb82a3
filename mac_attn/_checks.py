"""Checks of arguments. Each message names the argument, what it was and what it must be.

Wrong values and shapes raise ValueError, wrong types and dtypes TypeError. The helpers are called
on every decode step, so they cost about a microsecond a tensor, and `torch.compile` traces through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT_DTYPES = (torch.int32, torch.int64)
INT32_MAX = 2**31 - 1
MAX_QUERY_TOKENS = 16  # of a request in one step; csrc/params.h has it too


def check_tensor(
    name: str,
    t: Any,
    shape: Sequence[int | str] | None = None,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
    device: torch.device | None = None,
    *,
    rows: bool = False,
) -> None:
    """A tensor of this shape, dtype (or one of several) and device; None is not looked at.

    In `shape` a number is that size and a word names a size that is free. `rows` asks for a
    contiguous last dimension; the other strides are never looked at.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} is {_kind(t)}, must be a tensor")
    if shape is not None and not _fits(t.shape, shape):
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(t.shape)}, must be [{wanted}]")
    if (
        dtype is not None
        and t.dtype != dtype
        and not (isinstance(dtype, tuple) and t.dtype in dtype)
    ):
        options = dtype if isinstance(dtype, tuple) else (dtype,)
        raise TypeError(f"{name} is {t.dtype}, must be {' or '.join(map(str, options))}")
    if device is not None and t.device != device:
        raise ValueError(f"{name} is on {t.device}, must be on {device}")
    if rows and t.stride(-1) != 1:
        raise ValueError(
            f"{name} has strides {list(t.stride())}, must have 1 in the last dimension"
        )


def check_int(name: str, value: Any, low: int, high: int = INT32_MAX) -> int:
    """An int in `[low, high]`; returns it."""
    # A bool is an int to Python, but window=True is a mistake.
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {_kind(value)}, must be an int")
    if value < low or value > high:
        raise ValueError(f"{name} is {value}, must be from {low} to {high}")
    return value


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite int or float in `[low, high]`; returns it as a float."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} is {_kind(value)}, must be a number")
    if not (math.isfinite(value) and low <= value <= high):
        limits = "finite"
        if low > -math.inf:
            limits += f" and at least {low:g}"
        if high < math.inf:
            limits += f" and at most {high:g}"
        raise ValueError(f"{name} is {value}, must be {limits}")
    return float(value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """One of these strings."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {_kind(value)}, must be a str")
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, must be {' or '.join(map(repr, choices))}")


def check_type(name: str, value: Any, kind: type) -> None:
    """An instance of this class."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {_kind(value)}, must be a {kind.__name__}")


def check_head_dim(name: str, value: Any) -> int:
    """A size of heads that there are kernels for; returns it."""
    size = check_int(name, value, low=8, high=512)
    if size % 8 or 256 < size < 512:
        raise ValueError(f"{name} is {size}, must be a multiple of 8 up to 256, or 512")
    return size


def check_heads(num_qo_heads: int, num_kv_heads: int) -> int:
    """Query heads that divide evenly among the KV heads; returns the group size."""
    if num_kv_heads < 1 or num_qo_heads < 1 or num_qo_heads % num_kv_heads:
        raise ValueError(
            f"num_qo_heads is {num_qo_heads}, must be a positive multiple of "
            f"num_kv_heads = {num_kv_heads}"
        )
    return num_qo_heads // num_kv_heads


def _fits(size: Sequence[int], shape: Sequence[int | str]) -> bool:
    if len(size) != len(shape):
        return False
    for have, want in zip(size, shape, strict=True):
        if have != want and not isinstance(want, str):
            return False
    return True


def _kind(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
