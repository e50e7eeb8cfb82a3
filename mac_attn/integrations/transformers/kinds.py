"""What each layer of a model keeps, as the config says: of every token, of a window, or nothing."""

from __future__ import annotations

from typing import Literal

from transformers import PretrainedConfig

from .support import Refusal

Kind = Literal["full", "local", "none"]

# transformers' words for kinds of layers. Those that share the keys of others are "dummy" to it.
_KINDS: dict[str, Kind] = {
    "full_attention": "full",
    "sliding_attention": "local",
    "chunked_attention": "local",
    "dummy": "none",
    "moe": "none",
    "mlp": "none",
}


def layer_kinds(config: PretrainedConfig) -> list[tuple[Kind, int | None]]:
    """The kind of every layer, and how many tokens it sees if it is local and the config tells.

    Raises:
        ValueError: a layer keeps something else than keys and values, or none keeps any.
    """
    # In transformers 5.24 layers may differ in any option, which then only they tell.
    configs = getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers
    windows = [_window(one) for one in configs]
    names = getattr(config, "layer_types", None)
    if names is None:
        names = ["sliding_attention" if window else "full_attention" for window in windows]
    if unknown := set(names) - set(_KINDS):
        raise Refusal(
            f"the model has layers of type {sorted(unknown)}, which keep something else than keys "
            "and values of every token, all that a MacCache can keep; use transformers' own cache"
        )
    kinds = [_KINDS[name] for name in names]
    # Layers that attend to the keys of an earlier one, in the words of Gemma 4 and of Gemma 3n.
    modes = getattr(config, "kv_sharing_modes", None)
    if modes is None:
        own = len(kinds) - (getattr(config, "num_kv_shared_layers", None) or 0)
        modes = [None if i < own else "reuse" for i in range(len(kinds))]
    kinds = ["none" if m == "reuse" else k for k, m in zip(kinds, modes, strict=True)]
    if set(kinds) == {"none"}:
        raise Refusal("no layer of the model keeps keys and values: there is nothing to cache")
    return list(zip(kinds, windows, strict=True))


def _window(config: PretrainedConfig) -> int | None:
    window: int | None = getattr(config, "sliding_window", None)
    return window or getattr(config, "attention_chunk_size", None)
