"""Keys and values as float8: what the numbers of each KV head stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import mac_attn

FLOAT8 = torch.float8_e4m3fn
_HEADROOM = 16

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Scales:
    """What the float8 numbers 1 of keys and of values stand for, `[Hkv]` each.

    They are set by the first tokens: their largest number becomes 1/16 of the largest that float8
    has. It is a floating-point format, so that room for later tokens costs no precision.
    """

    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, states: Pair) -> Scales:
        """The scales of a batch whose first keys and values `[B, T, Hkv, D]` these are."""
        return cls(*(_scale(one) for one in states))

    def narrow(self, states: Pair) -> Pair:
        """Keys and values `[B, T, Hkv, D]` as float8."""
        return mac_attn.to_float8(states[0], self.k), mac_attn.to_float8(states[1], self.v)

    def wide(self, stored: Pair, dtype: torch.dtype) -> Pair:
        """Keys and values `[B, T, Hkv, D]` that are float8, in another dtype."""
        k, v = (
            (numbers.float() * scale[:, None]).to(dtype)
            for numbers, scale in zip(stored, (self.k, self.v), strict=True)
        )
        return k, v


def _scale(states: Tensor) -> Tensor:
    most = states.abs().amax(dim=(0, 1, 3)).float() * _HEADROOM / torch.finfo(FLOAT8).max
    return most.where(most.isfinite() & (most > 0), 1.0)
