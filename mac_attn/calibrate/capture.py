"""Queries, keys and values of a real model on a real text, taken from one forward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import mac_attn
from mac_attn._checks import check_int, check_tensor
from mac_attn.paging import dense_as_pages

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "mac_capture"


@dataclass(frozen=True, eq=False)
class Capture:
    """What the attention of L layers saw of one text of n tokens, and what it should answer.

    Attributes:
        layer_index: which of the model's layers these are.
        num_model_layers: how many the model has, those that never reuse included.
        q: [L, T, Hq, D] post-RoPE queries of the last T positions: first those that a prefill would
            seed the rings with, then those of the decode steps.
        q_match: [L, T, Hq, D] the same before the rotary embedding.
        k, v: [L, n, Hkv, D].
        exact: [L, steps, Hq, D] float32, exact attention of the decode steps.
        sm_scale: factor of the logits.
    """

    layer_index: tuple[int, ...]
    num_model_layers: int
    q: Tensor
    q_match: Tensor
    k: Tensor
    v: Tensor
    exact: Tensor
    sm_scale: float

    @property
    def steps(self) -> int:
        """Decode steps: the last positions of the text."""
        return self.exact.shape[1]

    @property
    def num_layers(self) -> int:
        return self.k.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.k.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[2]

    @property
    def num_qo_heads(self) -> int:
        return self.q.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k.shape[3]

    @property
    def head_dim_v(self) -> int:
        return self.v.shape[3]

    def layers(self, index: list[int]) -> Capture:
        """The capture of these layers alone (copies)."""
        chosen: dict[str, Any] = {"layer_index": tuple(self.layer_index[i] for i in index)}
        for field in fields(self):
            value = getattr(self, field.name)
            chosen.setdefault(field.name, value[index] if isinstance(value, Tensor) else value)
        return Capture(**chosen)

    def save(self, path: str | Path) -> None:
        """Write it to a file that `load` reads."""
        torch.save({field.name: getattr(self, field.name) for field in fields(self)}, path)

    @classmethod
    def load(cls, path: str | Path) -> Capture:
        """What `save` wrote, mapped from the file; ValueError for one of an earlier version."""
        content = torch.load(path, mmap=True, weights_only=True)
        if set(content) != {field.name for field in fields(cls)}:
            raise ValueError(f"{path} holds {sorted(content)}, which is no capture of this version")
        return cls(**content)


@torch.no_grad()
def capture(model: PreTrainedModel, ids: Tensor, *, steps: int = 512, seeded: int = 512) -> Capture:
    """Run a model once over a text and keep what its attention layers saw.

    Args:
        model: a transformers model that `MacCache` supports, of which the layers are kept that
            reuse, each with its own rotation; its attention implementation is put back afterwards.
        ids: [1, n] token ids.
        steps: how many of the last positions are decode steps, >= 1.
        seeded: how many positions before them have their queries kept for `mac_attn.seed`, >= 1.

    Raises:
        ValueError, TypeError: an argument does not fit, no layer reuses, or those that do differ in
            their heads or in sm_scale, or have attention sinks.
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    from mac_attn.integrations.transformers import MacCache, mac_attention_forward
    from mac_attn.integrations.transformers.attention import mac_mask

    check_tensor("ids", ids, shape=(1, "length"))
    check_int("steps", steps, low=1)
    check_int("seeded", seeded, low=1)
    length, kept = ids.shape[1], steps + seeded
    if length <= kept:
        raise ValueError(f"ids has {length} tokens, must have more than steps + seeded = {kept}")
    rotaries: dict[int, mac_attn.RotaryEmbedding | None] = {}  # of the layers that reuse
    taken: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    scales: set[float] = set()

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if module.layer_idx in rotaries:
            if kwargs.get("s_aux") is not None:
                raise ValueError("model has attention sinks, must have none: the replay does not")
            scale = kwargs.get("scaling")
            scales.add(1 / math.sqrt(query.shape[-1]) if scale is None else float(scale))
            q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [T, H, D]
            # Contiguous copies: the views would keep every query of the text alive.
            taken[module.layer_idx] = (q[-kept:].clone(), k.clone(), v.clone())
        return mac_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, mac_mask)
    before = model.config.get_text_config(decoder=True)._attn_implementation
    try:
        model.set_attn_implementation("mac")
        cache = MacCache(model, max_length=1)
        rotaries |= {x.index: x.rings.rotary for x in cache.layers if x.rings.config is not None}
        model.set_attn_implementation(_NAME)
        # Layers that share the keys of others may be given no more queries than there are logits.
        shares = any(layer.kind == "none" for layer in cache.layers)
        model(ids.to(model.device), use_cache=False, logits_to_keep=kept if shares else 1)
    finally:
        model.set_attn_implementation(before)
    if not taken or set(taken) != set(rotaries):
        raise ValueError(
            f"model has layers that reuse, {sorted(rotaries)}, and called attention in "
            f"{sorted(taken)} of them, must have one at least and call all"
        )
    if len(scales) != 1:
        raise ValueError(f"model has layers with factors {sorted(scales)}, must have one sm_scale")
    shapes = {(q.shape[1], *k.shape[1:], v.shape[2]) for q, k, v in taken.values()}
    if len(shapes) != 1:
        raise ValueError(
            "model has layers with different (num_qo_heads, num_kv_heads, head_dim, head_dim_v), "
            f"{sorted(shapes)}, must have the same in all that reuse"
        )

    index = tuple(sorted(taken))
    q, k, v = (torch.stack(tensors) for tensors in zip(*(taken.pop(i) for i in index), strict=True))
    positions = torch.arange(length - kept, length, device=q.device)
    turned = zip(q, (rotaries[i] for i in index), strict=True)
    q_match = torch.stack([_unrotated(one, positions, rotary) for one, rotary in turned])
    sm_scale = scales.pop()
    exact = _exact(q[:, seeded:], k, v, sm_scale)
    return Capture(index, len(cache.layers), q, q_match, k, v, exact, sm_scale)


def _unrotated(q: Tensor, positions: Tensor, rotary: mac_attn.RotaryEmbedding | None) -> Tensor:
    return q if rotary is None else mac_attn.unrotate(q, positions, rotary.to(q.device))


def _exact(q: Tensor, k: Tensor, v: Tensor, sm_scale: float) -> Tensor:
    """Exact decode of the last queries `[L, steps, Hq, D]` in float32, layer by layer."""
    steps, length = q.shape[1], k.shape[1]
    seq_lens = torch.arange(length - steps + 1, length + 1, dtype=torch.int32, device=q.device)
    shape = (*q.shape[:-1], v.shape[-1])
    out = torch.empty(shape, dtype=torch.float32, device=q.device)
    on_cpu = q.device.type == "cpu"  # the CUDA kernels have no float32
    for layer in range(len(q)):
        # One request per step, all on the same page.
        tensors = (t[layer].float() if on_cpu else t[layer] for t in (q, k, v))
        queries, keys, values = tensors
        kv_cache, table = dense_as_pages(keys[None], values[None])
        exact = mac_attn.decode(
            queries, kv_cache, table.expand(steps, 1), seq_lens, sm_scale=sm_scale
        )
        assert isinstance(exact, Tensor)  # return_lse is off
        out[layer] = exact
    return out
