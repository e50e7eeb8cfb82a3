"""The demo's fifth way: steps that reuse draft, an exact one verifies them."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mac_attn import ReuseConfig
from mac_attn.integrations.transformers import AttentionTimer, Lossless, LosslessStats, MacCache
from mac_attn.integrations.transformers.rotation import cache_name

from .run import Choice

WARM_TOKENS = 16  # generated first, as first calls allocate and start threads


@dataclass
class Verified:
    """What `Lossless` did; times are sums over its tokens, drafts that were rejected included."""

    tokens: list[int]
    seconds: float
    attention_seconds: float
    stats: LosslessStats


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompt: Tensor,
    first: int,
    new_tokens: int,
    config: ReuseConfig,
    choice: Choice,
) -> Verified:
    """`new_tokens` tokens after the prompt `[1, n]` and a first one."""
    name = cache_name(model.forward)
    prompt = prompt.to(model.device)
    length = prompt.shape[1]
    base = MacCache(model, max_length=length + new_tokens + 1, config=config)
    model(prompt, **{name: base}, logits_to_keep=1)
    ids = torch.cat([prompt, prompt.new_tensor([[first]])], dim=1)

    def chosen(ids: Tensor, logits: Tensor) -> Tensor:
        return choice.adjusted(logits[0], ids[0, length:].tolist())[None]

    def run(method: Lossless, cache: MacCache, count: int) -> list[int]:
        options = {name: cache, "do_sample": False, "logits_processor": [chosen]}
        text = model.generate(  # type: ignore[operator]
            ids, custom_generate=method, max_new_tokens=count, **options
        )
        tokens: list[int] = text[0, length + 1 :].tolist()
        return tokens

    run(Lossless(), copy.deepcopy(base), min(WARM_TOKENS, new_tokens))
    method = Lossless()
    with AttentionTimer() as timer:
        start = time.perf_counter()
        tokens = run(method, base, new_tokens)
        attention = timer.lap()
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)
        seconds = time.perf_counter() - start
    return Verified(tokens, seconds, attention, method.stats)
