"""Capture for `sampled.py`: a text through SmolLM2 or Gemma 3 270M, its layers that attend in full.

    python bench/sampled_capture.py gemma prose 32768 6144 FILE

Local layers are attended in blocks, so that 32K tokens take minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gemma
import texts
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

NAME = "sampled_capture"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("smollm2", "gemma"))
    parser.add_argument("text", choices=texts.NAMES)
    parser.add_argument("tokens", type=int)
    parser.add_argument("rows", type=int, help="of the last queries: window and decode steps")
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if given.model == "gemma":
        model, tokenizer = gemma.load()
        start = torch.tensor([[model.config.bos_token_id]])  # without it Gemma is lost
    else:
        import mac_attn.integrations.transformers  # noqa: F401  (registers attention "mac")
        from mac_attn.demo import model as models

        model, tokenizer, _ = models.load(None, torch.float32, torch.device("cpu"))
        start = torch.empty(1, 0, dtype=torch.long)
    ids = texts.token_ids(given.text, model, tokenizer, given.tokens - start.shape[1])
    torch.save(capture(model, torch.cat([start, ids], 1), given.rows), given.file)


@torch.no_grad()
def capture(model: PreTrainedModel, ids: Tensor, rows: int) -> dict[str, Any]:
    """q and qm `[L, rows, Hq, D]`, k and v `[L, n, Hkv, D]`, all bfloat16; scale, layers."""
    taken: dict[int, list[Tensor]] = {}
    before: dict[int, Tensor] = {}
    scales: set[float] = set()

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        window, scale = kwargs.get("sliding_window"), float(kwargs["scaling"])
        if window is not None:
            return gemma.local_attention(q, k, v, window, scale).transpose(1, 2), None
        scales.add(scale)
        heads = [t[0].transpose(0, 1).bfloat16() for t in (q[:, :, -rows:], k, v)]
        taken[module.layer_idx] = [t.contiguous() for t in heads]
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    model.set_attn_implementation(NAME)
    hooks = [
        _query_module(layer).register_forward_hook(_keeper(before, i, rows))
        for i, layer in enumerate(model.model.layers)
    ]
    model(ids, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    layers = sorted(taken)
    q, k, v = (torch.stack([taken[i][j] for i in layers]) for j in range(3))
    qm = torch.stack([before[i].reshape(rows, *q.shape[2:]).bfloat16() for i in layers])
    return {"q": q, "qm": qm, "k": k, "v": v, "scale": scales.pop(), "layers": layers}


def _query_module(layer: Any) -> torch.nn.Module:
    """What answers the query just before the rotation."""
    module = getattr(layer.self_attn, "q_norm", layer.self_attn.q_proj)
    assert isinstance(module, torch.nn.Module)
    return module


def _keeper(kept: dict[int, Tensor], layer: int, rows: int) -> Callable[..., None]:
    def keep(module: torch.nn.Module, args: Any, out: Tensor) -> None:
        x = out[0]  # [T, Hq * D], or of a norm [T, Hq, D] or [Hq, T, D]
        if x.dim() == 3 and x.shape[0] < x.shape[1]:
            x = x.transpose(0, 1)
        kept[layer] = x[-rows:].clone()

    return keep


if __name__ == "__main__":
    main()
