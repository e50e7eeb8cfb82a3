"""The rotary embedding of an engine's attention layer, in mac_attn's terms.

vLLM's rotary modules and SGLang's, which come from them, tell it in the same way.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import mac_attn

Conditions = list[tuple[ast.expr, bool]]  # and whether each must hold

# Not its other methods, which look up tables for instance.
_ROTATES = r"self\.rotary_emb(\.forward\w*)?$"

# Largest difference of a cosine or sine from the engine's table. Both are of the same angles.
_TOLERANCE = 1e-3


def is_rotated(attention: nn.Module) -> bool:
    """Whether a layer rotates its queries: whether its code ever comes to call `self.rotary_emb`.

    Layers that do not rotate have that all the same, as a rule, and an `if` before the call, on
    attributes of many names (`self.nope`, `self.v1 or self.sliding_window`, ...). A condition on
    anything but attributes may hold. Without any call, kernels that do more may do it. (To take a
    layer that rotates for one that does not is safe: rotated queries are equal less often, but then
    their attention is.)

    Raises:
        ValueError: the code is not there.
    """
    calls: list[Conditions] = []
    for name, function in inspect.getmembers(type(attention), inspect.isfunction):
        if function is not getattr(nn.Module, name, None):
            try:
                code = textwrap.dedent(inspect.getsource(function))
            except OSError:
                raise ValueError(f"no source of {function.__qualname__}") from None
            calls += _rotary_calls(ast.parse(code), [])
    return not calls or any(
        all(_may_hold(test, wanted, attention) for test, wanted in tests) for tests in calls
    )


def _rotary_calls(node: ast.AST, tests: Conditions) -> Iterator[Conditions]:
    """The conditions that each call of `self.rotary_emb` in some code is under."""
    if isinstance(node, ast.Call) and re.match(_ROTATES, ast.unparse(node.func)):
        yield tests
    branches = {"body": True, "orelse": False} if isinstance(node, ast.If | ast.IfExp) else {}
    for name, value in ast.iter_fields(node):
        more = [(node.test, branches[name])] if name in branches else []  # type: ignore[attr-defined]
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _rotary_calls(child, tests + more)


def _may_hold(test: ast.expr, wanted: bool, attention: nn.Module) -> bool:
    """Whether a condition may be what is wanted; one that hangs on more than `self` may."""
    names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
    if names != {"self"} or any(isinstance(node, ast.Call) for node in ast.walk(test)):
        return True
    try:
        holds = eval(ast.unparse(test), {"__builtins__": {}}, {"self": attention})
    except (AttributeError, TypeError):
        return True
    return bool(holds) is wanted


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
