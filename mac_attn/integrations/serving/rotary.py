"""The rotary embedding of an engine's attention layer, in mac_attn's terms.

vLLM's rotary modules and SGLang's, which come from them, tell it in the same way.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import mac_attn

# What the engines' models name the switch of a layer that does not rotate, and its value there.
_NOT_ROTATED = {
    "nope": True,
    "use_rope": False,
    "apply_rope": False,
    "apply_rope_all_layers": False,
}

# Largest difference of a cosine or sine from the engine's table. Both are of the same angles.
_TOLERANCE = 1e-3


def is_rotated(attention: nn.Module) -> bool:
    """Whether a full-attention layer of the model rotates its queries, if it can at all."""
    return all(getattr(attention, name, None) is not off for name, off in _NOT_ROTATED.items())


def rotary_of(module: Any, max_position: int) -> mac_attn.RotaryEmbedding:
    """The rotation that a rotary module does, from the table of angles it computes.

    Whatever scaling the module knows, its table is [positions, R]: scale * cos(p * f), then
    scale * sin(p * f), for R/2 frequencies f. A few positions tell them, and the others tell
    whether it is such a table.

    Args:
        module: the module that the engine's `get_rope` made.
        max_position: positions below this one are used.

    Raises:
        ValueError: it is no rotation by fixed frequencies.
    """
    kind = type(module).__name__
    compute = getattr(module, "_compute_cos_sin_cache", None)
    if compute is None or hasattr(module, "mrope_section"):
        raise ValueError(f"rotary embedding {kind}")
    try:
        with torch.device("cpu"):
            table = compute()
    except TypeError:  # LongRoPE's takes the factors of one length
        raise ValueError(f"rotary embedding {kind}") from None
    rotary_dim = getattr(module, "rotary_dim", None)
    if not isinstance(table, Tensor) or table.ndim != 2 or table.shape[1] != rotary_dim:
        raise ValueError(f"rotary embedding {kind}")
    table = table.double().cpu()
    scale = float(torch.hypot(*table[1].chunk(2)).mean())
    rotary = mac_attn.RotaryEmbedding(_frequencies(table), not module.is_neox_style, scale)

    last = min(len(table), max_position) - 1
    positions = torch.unique(torch.linspace(0, last, 257).long())
    expected = torch.cat(rotary.cos_sin(positions), dim=-1).double() * scale
    if (table[positions] - expected).abs().max() > _TOLERANCE * scale:
        raise ValueError(f"rotary embedding {kind} with frequencies that are not fixed")
    return rotary


def _frequencies(table: Tensor) -> Tensor:
    """The frequencies of a table `[positions, R]` in float64, exact as float32 `[R/2]`.

    Position 1 gives them up to its rounding. A later one, a power of two so that the product with
    the frequency was exact in float32, gives the digits after those.
    """

    def angle(position: int) -> Tensor:
        cos, sin = table[position].chunk(2)
        return torch.atan2(sin, cos)

    position = 2 ** min(12, (len(table) - 1).bit_length() - 1)
    rough = angle(1) * position
    turns = torch.round((rough - angle(position)) / (2 * math.pi))
    exact: Tensor = (angle(position) + turns * 2 * math.pi) / position
    return exact.float()
