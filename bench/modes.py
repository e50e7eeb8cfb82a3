"""Ways to attend at decode steps, behind one transformers model and one prefill.

| mode | decode steps |
|---|---|
| exact | `mac_attn.decode` without reuse |
| sdpa | torch's SDPA: exact too, so that its difference from `exact` is rounding |
| MAC | `mac_attn.decode` with reuse |
| streaming, quest | the baselines of `baselines.py` that need nothing but the KV cache |

Options follow a colon: `MAC:threshold=0.1,band=512`, any of `ReuseConfig`; for a calibration
`MAC:calibration=FILE`; `MAC:seed=0` begins with an empty ring, so that nothing computed for the
prompt is reused; for the baselines the part of the KV that they read, `quest:share=0.5`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from baselines import PAGE, SINKS
from gemma import local_attention
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from mac_attn import ReuseConfig
from mac_attn.calibrate import Calibration
from mac_attn.integrations.transformers import MacCache, mac_attention_forward
from mac_attn.integrations.transformers.layer import MacLayer

KINDS = ("exact", "sdpa", "MAC", "streaming", "quest")
_BASELINES = ("streaming", "quest")


@dataclass(frozen=True)
class Mode:
    """One way to attend; `name` is what the command line said."""

    name: str
    kind: str
    config: ReuseConfig | tuple[ReuseConfig, ...] | None = None  # of MAC
    share: float = 1.0  # of the KV, for a baseline
    seeds: bool = True  # MAC's ring begins with the last queries of the prompt

    @classmethod
    def parse(cls, text: str, base: ReuseConfig, share: float) -> Mode:
        """A mode from its name and options; `base` and `share` are what they change.

        Raises ValueError for an unknown kind or option, or a value that is not valid.
        """
        kind, _, given = text.partition(":")
        if kind not in KINDS:
            raise ValueError(f"mode is {text!r}, must begin with one of {', '.join(KINDS)}")
        options = dict(part.partition("=")[::2] for part in given.split(",") if part)
        if kind == "MAC":
            seeds = options.pop("seed", "1")
            if seeds not in ("0", "1"):
                raise ValueError(f"seed is {seeds}, must be 0 or 1")
            if path := options.pop("calibration", None):
                layers = Calibration.load(path).configs
                configs = tuple(_changed(c, options, base.min_context) for c in layers)
                return cls(text, kind, configs, seeds=seeds == "1")
            config = _changed(base, options, base.min_context)
            return cls(text, kind, config, seeds=seeds == "1")
        if kind in _BASELINES:
            share = float(options.pop("share", share))
            if not 0 < share <= 1:
                raise ValueError(f"share is {share}, must be above 0 and at most 1")
        if options:
            raise ValueError(f"mode is {text!r}, has no option {', '.join(options)}")
        return cls(text, kind, share=share if kind in _BASELINES else 1.0)

    @property
    def seed_key(self) -> Any:
        """Modes with equal keys have equal ring entries after the same prompt."""
        configs = self.config if isinstance(self.config, tuple) else (self.config,)
        return tuple(c and (c.entries, c.window, c.band, c.anchors, c.granularity) for c in configs)


def _changed(config: ReuseConfig, options: dict[str, str], min_context: int) -> ReuseConfig:
    unknown = set(options) - {field.name for field in fields(ReuseConfig)}
    if unknown:
        raise ValueError(f"options are {', '.join(sorted(unknown))}, must be of ReuseConfig")
    values = {name: _value(text) for name, text in options.items()}
    return replace(config, **({"min_context": min_context} | values))


def _value(text: str) -> Any:
    try:
        return json.loads(text)  # numbers and null
    except json.JSONDecodeError:
        return text


class Prefill:
    """Prompts `[B, n]` prefilled once and exactly, from which every mode can decode.

    All caches share one KV store, in which what a mode decodes lies behind the prompts: use one
    after the other, or ask for a copy. Attribute `logits`: `[B, vocab]` float32, after the prompts.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, room: int, window: int = 2048) -> None:
        """`room` is how many tokens may follow the prompts; `window` the largest of a mode."""
        self.model, self.window = model, window
        self.batch, self.length = ids.shape
        # Without `config` it neither searches nor seeds: that comes with the modes.
        self.base = MacCache(model, max_length=self.length + room, config=None)
        self._queries: list[tuple[Tensor, float | None]] = []
        self._seeded: tuple[Any, MacCache] | None = None
        with self._watching():
            output = model(
                ids.to(model.device), past_key_values=self.base, logits_to_keep=1, use_cache=True
            )
        self.logits = output.logits[:, -1].float()

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Keep the last queries of every layer, which seed the rings of the modes later."""

        def attend(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
        ) -> tuple[Tensor, None]:
            self._queries.append((query[:, :, -self.window :].clone(), options.get("scaling")))
            return _attend(module, query, key, value, mask, **options)

        AttentionInterface.register("mac", attend)
        try:
            yield
        finally:
            AttentionInterface.register("mac", mac_attention_forward)

    def cache(self, mode: Mode, copy: bool = False) -> MacCache:
        """A cache that decodes in this mode right after the prompts; with its own store if asked.

        The rings of the last seeded mode are kept: modes of one `seed_key` in a row seed once.
        """
        if mode.kind != "MAC":
            cache = self._on_store(None, copy)
            if mode.kind == "sdpa":
                cache.mode = "sdpa"
            return cache
        if not mode.seeds:
            return self._on_store(mode.config, copy)
        if self._seeded is None or self._seeded[0] != mode.seed_key:
            self._seeded = None  # its memory first
            seeded = self._on_store(mode.config, copy=False)
            for layer, (query, scaling) in zip(seeded.layers, self._queries, strict=True):
                rings = layer.rings
                if rings.config is not None:  # else one that attends locally
                    rings.seed(layer, query[:, :, -rings.config.window :], scaling)
            self._seeded = mode.seed_key, seeded
        cache = self._on_store(mode.config, copy)
        for new, old in zip(cache.layers, self._seeded[1].layers, strict=True):
            if new.reuse is not None:
                new.reuse.ring.copy_(old.reuse.ring)
        return cache

    def _on_store(self, config: ReuseConfig | Sequence[ReuseConfig] | None, copy: bool) -> MacCache:
        cache = MacCache(self.model, max_length=self.base.get_max_length(), config=config)
        layers = zip(cache.layers, self.base.layers, self._queries, strict=True)
        for new, old, (query, _) in layers:
            _place(new, old, copy)
            new.rings.allocate(new, query.shape[1])
        cache._shared.layout.set_padding([0] * self.batch)
        return cache


def _place(layer: MacLayer, on: MacLayer, copy: bool) -> None:
    """Put a new layer on the keys and values of another, or on a copy of them."""
    layer.lazy_initialization(on.keys[:, :, :1], on.values[:, :, :1])
    if copy:
        layer.key_store[:, : on.length] = on.key_store[:, : on.length]
        layer.value_store[:, : on.length] = on.value_store[:, : on.length]
    else:
        layer.key_store, layer.value_store = on.key_store, on.value_store
    layer.length = on.length
    layer.sign()


_chosen: Mode | None = None  # the baseline that decode steps use


@contextmanager
def attending(mode: Mode) -> Iterator[None]:
    """Decode steps of "mac" models attend in this mode."""
    global _chosen
    AttentionInterface.register("mac", _attend)
    _chosen = mode if mode.kind in _BASELINES else None
    try:
        yield
    finally:
        _chosen = None
        AttentionInterface.register("mac", mac_attention_forward)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    if (window := options.get("sliding_window")) is not None:  # the same in every mode
        local = local_attention(query, key, value, window, options["scaling"])
        return local.transpose(1, 2), None
    if _chosen is None or query.shape[2] > 1:
        return mac_attention_forward(module, query, key, value, mask, **options)
    heads, n = key.shape[1:3]
    count = max(PAGE, round(_chosen.share * n))
    rows = query[:, :, 0].unflatten(1, (heads, -1))  # [B, Hkv, G, D]
    if _chosen.kind == "streaming":
        near = count - SINKS
        key, value = (torch.cat([t[:, :, :SINKS], t[:, :, -near:]], dim=2) for t in (key, value))
        out = scaled_dot_product_attention(rows, key, value, scale=options.get("scaling"))
    else:
        kept = _quest_pages(rows, key, count)[:, :, None]  # [B, Hkv, 1, n]
        out = scaled_dot_product_attention(
            rows, key, value, attn_mask=kept, scale=options.get("scaling")
        )
    return out.flatten(1, 2)[:, None], None


def _quest_pages(rows: Tensor, key: Tensor, count: int) -> Tensor:
    """Mask `[B, Hkv, n]` of the pages that Quest reads, the newest always, for a whole group."""
    n = key.shape[2]
    pages = n // PAGE  # whole ones; the newest tokens beyond them are kept
    paged = key[:, :, : pages * PAGE].unflatten(2, (pages, PAGE))
    low, high = paged.amin(3).float(), paged.amax(3).float()
    rows = rows.float() / rows.shape[-1] ** 0.5
    bound = rows.clamp(min=0) @ high.transpose(2, 3) + rows.clamp(max=0) @ low.transpose(2, 3)
    score = bound.log_softmax(-1).amax(2)  # [B, Hkv, pages]
    best = score.topk(min(pages, max(1, (count - n % PAGE) // PAGE)), dim=-1).indices
    kept = torch.zeros(score.shape, dtype=torch.bool, device=key.device).scatter_(2, best, True)
    return pad(kept.repeat_interleave(PAGE, dim=2), (0, n - pages * PAGE), value=True)
