"""Hugging Face transformers: decode an unpatched Llama, Qwen2, Qwen3, ... with MAC-Attention.

    from mac_attn.integrations.transformers import MacCache  # importing it registers "mac"

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="mac")
    cache = MacCache(model, max_length=8192)
    model.generate(**inputs, cache=cache)  # past_key_values=cache before transformers 5.24
    print(cache.stats())

Prefill is torch SDPA, followed by `mac_attn.seed` with the last queries of the prompt; a step with
one new token is `mac_attn.decode`, which finds the pre-RoPE query by itself. So is one with a few
(draft tokens); more on a cache in use (chunked prefill) are SDPA and `seed` again.
Without a MacCache, "mac" is SDPA. A model for which either would be wrong is refused;
docs/transformers.md lists them.

`Lossless` decodes with the tokens of exact attention: steps that reuse draft them.
"""

from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from .attention import mac_attention_forward, mac_mask
from .cache import MacCache
from .lossless import Lossless, LosslessStats
from .shared import Mode
from .timer import AttentionTimer

__all__ = [
    "AttentionTimer",
    "Lossless",
    "LosslessStats",
    "MacCache",
    "Mode",
    "mac_attention_forward",
]

AttentionInterface.register("mac", mac_attention_forward)
AttentionMaskInterface.register("mac", mac_mask)
