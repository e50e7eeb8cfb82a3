"""Rotary position embedding: the rotation, and its inverse that gets the pre-RoPE query back.

Queries are compared before their rotation (arXiv:2604.00235, match), because two equal queries at
different positions differ after it. Rotations are orthogonal, so the query is got back up to
rounding, and an engine that only hands over rotated queries needs no change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import _C
from ._checks import FLOAT_DTYPES, INT_DTYPES, check_number, check_tensor, check_type

# What csrc/unrotate.cpp takes on each kind of device.
_ONE_PASS_DTYPES: dict[str, tuple[torch.dtype, ...]] = {"cpu": FLOAT_DTYPES}
if _C.build_info()["cuda_arches"]:
    _ONE_PASS_DTYPES["cuda"] = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class RotaryEmbedding:
    """The rotation of a model: frequencies, pairing and scale.

    At position p the i-th of R/2 pairs of dimensions turns by `p * inv_freq[i]` and is multiplied
    by `scale`; dimensions from R on stay as they are.

    Args:
        inv_freq: [R/2] float32, radians per position, R <= head_dim.
        interleaved: pairs are (2i, 2i + 1) as in GPT-J and GLM, else (i, i + R/2) as in Llama.
        scale: factor on the rotated dimensions, > 0: `attention_scaling` of transformers (YaRN).

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type.
    """

    inv_freq: Tensor
    interleaved: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_tensor("inv_freq", self.inv_freq, shape=("pairs",), dtype=torch.float32)
        if len(self.inv_freq) == 0:
            raise ValueError("inv_freq has shape [0], must have one frequency per pair")
        check_type("interleaved", self.interleaved, bool)
        object.__setattr__(self, "scale", check_number("scale", self.scale, low=1e-6))

    @property
    def dim(self) -> int:
        """R, the number of dimensions that turn."""
        return 2 * self.inv_freq.shape[0]

    @property
    def arguments(self) -> tuple[Tensor, bool, float]:
        """The rotation as the ops take it."""
        return self.inv_freq, self.interleaved, self.scale

    def to(self, device: torch.device | str) -> RotaryEmbedding:
        """The same rotation with its frequencies on another device."""
        return RotaryEmbedding(self.inv_freq.to(device), self.interleaved, self.scale)

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles, float32 `[..., R/2]`, without `scale`.

        In float32 throughout, like transformers' rotary modules, so that both agree bit for bit.
        """
        angles = positions[..., None].float() * self.inv_freq
        return angles.cos(), angles.sin()

    @classmethod
    def from_transformers(
        cls, model: nn.Module, *, interleaved: bool = False, layer_type: str | None = None
    ) -> RotaryEmbedding:
        """The rotation of a transformers model, taken from its rotary module.

        Args:
            model: the model, or a part of it that holds one rotary module (of a multimodal model
                its language model). Whatever wraps it, the module is known by its `inv_freq` and
                `attention_scaling`.
            interleaved: how the model pairs dimensions, which its rotary module does not tell: True
                for those whose `rotate_half` takes `x[..., 0::2]` (GPT-J, Cohere, GLM).
            layer_type: for models with a rotation per kind of layer (Gemma 3): which of them, for
                example "full_attention".

        Raises:
            TypeError: `model` is not a module.
            ValueError: it has no rotary module, several different ones, or one whose frequencies
                change with the length ("dynamic", "longrope") or whose positions are not those of
                the tokens ("mrope_section"): there is no one rotation to undo.
        """
        check_type("model", model, nn.Module)
        prefix = "" if layer_type is None else f"{layer_type}_"
        found = [m for m, its_prefix in rotary_modules(model) if its_prefix == prefix]
        if not found:
            raise ValueError(_not_found(model, layer_type))
        rotations = [cls.of_module(m, prefix, interleaved=interleaved) for m in found]
        first = rotations[0]
        for other in rotations[1:]:
            same = first.scale == other.scale and torch.equal(first.inv_freq, other.inv_freq)
            if not same:
                raise ValueError(
                    f"model has {len(found)} rotary modules that differ, must have one: "
                    "give the part of it whose attention is meant"
                )
        return first

    @classmethod
    def of_module(
        cls, module: nn.Module, prefix: str = "", *, interleaved: bool = False
    ) -> RotaryEmbedding:
        """The rotation of one rotary module of a transformers model; see `from_transformers`.

        Args:
            module: holds `{prefix}inv_freq` and `{prefix}attention_scaling`: see `rotary_modules`.
            prefix: a kind of layer and an underscore, where the module serves several.
            interleaved: how the model pairs dimensions.

        Raises:
            ValueError: its frequencies change with the length, or its positions are not those of
                the tokens.
        """
        kind = getattr(module, "rope_type", "default")
        if isinstance(kind, dict):
            kind = kind.get(prefix.removesuffix("_"), "default")
        # The names by which transformers' dynamic_rope_update decides to change the frequencies.
        if "dynamic" in kind or kind == "longrope":
            raise ValueError(
                f"model has rope_type {kind!r}, whose frequencies change with the length; "
                "they must be fixed, or q_match be given to decode"
            )
        if _has_mrope(module):
            raise ValueError(
                "model has mrope_section, positions of several dimensions; they must be those of "
                "the tokens (for text alone, construct RotaryEmbedding from the module's inv_freq)"
            )
        inv_freq = getattr(module, f"{prefix}inv_freq").detach().float().clone()
        return cls(inv_freq, interleaved, float(getattr(module, f"{prefix}attention_scaling")))


def rotate(q: Tensor, positions: Tensor, rotary: RotaryEmbedding) -> Tensor:
    """Rotate queries or keys to their positions: `scale * R(p) q`, the inverse of `unrotate`.

    Args:
        q: [..., num_heads, head_dim] float32, bfloat16 or float16.
        positions: [...] int32 or int64.
        rotary: the rotation.

    Returns:
        A new tensor like q, computed in float32.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit.
    """
    _check(q, positions, rotary)
    cos, sin = rotary.cos_sin(positions)
    return _turn(q, cos * rotary.scale, sin * rotary.scale, rotary)


def unrotate(q: Tensor, positions: Tensor, rotary: RotaryEmbedding) -> Tensor:
    """Undo the rotation of queries at their positions: `R(-p) q / scale`.

    Args:
        q: [..., num_heads, head_dim] float32, bfloat16 or float16, post-RoPE.
        positions: [...] int32 or int64.
        rotary: the rotation.

    Returns:
        A new tensor like q, computed in float32.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit.
    """
    if isinstance(rotary, RotaryEmbedding) and _one_pass(q, positions):
        # The op checks its arguments; on the CPU, with cold caches, that is faster than in Python.
        unrotated: Tensor = torch.ops.mac_attn.unrotate(q, positions, *rotary.arguments)
        return unrotated
    _check(q, positions, rotary)
    cos, sin = rotary.cos_sin(positions)
    return _turn(q, cos / rotary.scale, sin / -rotary.scale, rotary)


def _one_pass(q: Tensor, positions: Tensor) -> bool:
    """Whether csrc/unrotate.cpp serves: the queries of a decode step."""
    return (
        isinstance(q, Tensor)
        and isinstance(positions, Tensor)
        and q.ndim == 3
        and q.dtype in _ONE_PASS_DTYPES.get(q.device.type, ())
        and positions.dtype == torch.int32
        and positions.is_contiguous()
        and q.shape[-1] % 16 == 0
        and (q.shape[-1] <= 256 or q.shape[-1] == 512)
        and q.stride(-1) == 1
        and not q.requires_grad
    )


def pre_rope_query(
    q: Tensor, q_match: Tensor | None, positions: Tensor, rotary: RotaryEmbedding | None
) -> Tensor:
    """`q_match` checked against `q`, or, where it is None, `q` turned back by `rotary`."""
    if q_match is not None:
        check_tensor("q_match", q_match, tuple(q.shape), q.dtype, q.device)
        return q_match
    if rotary is None:
        raise ValueError(
            "q_match is None, must be the pre-RoPE queries, "
            "as the ReuseCache was made without `rotary`"
        )
    return unrotate(q, positions, rotary)


def _check(q: Tensor, positions: Tensor, rotary: RotaryEmbedding) -> None:
    check_type("rotary", rotary, RotaryEmbedding)
    check_tensor("q", q, dtype=FLOAT_DTYPES)
    if q.ndim < 2 or q.shape[-1] < rotary.dim:
        raise ValueError(
            f"q has shape {list(q.shape)}, must be [..., num_heads, head_dim] with "
            f"head_dim at least {rotary.dim}, the rotated dimensions"
        )
    check_tensor("positions", positions, shape=q.shape[:-2], dtype=INT_DTYPES, device=q.device)
    check_tensor("rotary.inv_freq", rotary.inv_freq, device=q.device)


def _turn(q: Tensor, cos: Tensor, sin: Tensor, rotary: RotaryEmbedding) -> Tensor:
    """Turn the pairs (x, y) to (x cos - y sin, x sin + y cos), all heads alike."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    turned = q[..., : rotary.dim].float()
    if rotary.interleaved:
        x, y = turned[..., 0::2], turned[..., 1::2]
        result = torch.stack((x * cos - y * sin, x * sin + y * cos), dim=-1).flatten(-2)
    else:
        x, y = turned.chunk(2, dim=-1)
        result = torch.cat((x * cos - y * sin, x * sin + y * cos), dim=-1)
    result = result.to(q.dtype)
    return (
        result if rotary.dim == q.shape[-1] else torch.cat((result, q[..., rotary.dim :]), dim=-1)
    )


def rotary_modules(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The rotary modules of a transformers model, each with the prefixes of its frequencies.

    A module is known by `inv_freq` and `attention_scaling`, whatever wraps it; one that serves
    several kinds of layers has them for each, behind the kind's name and an underscore.
    """
    suffix = "attention_scaling"
    return [
        (module, name.removesuffix(suffix))
        for module in model.modules()
        for name in vars(module)
        if name.endswith(suffix)
        and isinstance(getattr(module, f"{name.removesuffix(suffix)}inv_freq", None), Tensor)
    ]


def _not_found(model: nn.Module, layer_type: str | None) -> str:
    layer_types = {prefix.removesuffix("_") for _, prefix in rotary_modules(model)} - {""}
    if layer_types:
        return f"layer_type is {layer_type!r}, must be one of {sorted(layer_types)}"
    return "model has no rotary module, must have one with `inv_freq` and `attention_scaling`"


def _has_mrope(module: nn.Module) -> bool:
    if hasattr(module, "mrope_section"):
        return True
    parameters: Any = getattr(getattr(module, "config", None), "rope_parameters", None)
    return isinstance(parameters, dict) and "mrope_section" in parameters
