"""Gradients, which a MacCache does not keep, must not silently be wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def without_gradients(result: Tensor, source: Tensor) -> Tensor:
    """`result`, through which no backward pass can reach the `source` that it was made from.

    A forgotten `torch.no_grad()` costs nothing then; a backward pass raises.
    """
    if not (torch.is_grad_enabled() and source.requires_grad):
        return result
    refused: Tensor = _NoGradients.apply(result, source)
    return refused


class _NoGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, source: Tensor) -> Tensor:
        return result.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ValueError(
            "a MacCache keeps no gradients, neither of keys and values nor through reuse: train "
            "without it (use_cache=False), or use torch.no_grad()"
        )
