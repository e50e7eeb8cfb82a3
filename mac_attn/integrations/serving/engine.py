"""The rings of one worker of an engine: which layers get them, with how many slots."""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

import mac_attn

from .budget import Plan, slots_within
from .options import Options
from .rotary import is_rotated, rotary_of
from .slots import Place, Row, SlotTable


class BaseEngine(ABC):
    """What vLLM's workers and SGLang's have in common.

    Args:
        options: the plugin's.
        device: of the worker.
        max_position: the longest context.
        most_drafts: of a step, see `SlotTable`.

    Attributes:
        rings: of each layer that is served.
        slots: which request has which.
    """

    engine: ClassVar[str]  # its name, as its users know it
    logger: ClassVar[logging.Logger]  # a child of the engine's, so that lines are shown as its own

    def __init__(
        self,
        options: Options,
        device: torch.device | str,
        max_position: int,
        most_drafts: int = 0,
    ) -> None:
        self.options = options
        self.rings: dict[Any, mac_attn.ReuseCache] = {}
        self.slots = SlotTable(0)
        self._device = device
        self._most_drafts = most_drafts
        self._max_position = max_position
        self._rotaries: dict[Any, mac_attn.RotaryEmbedding] = {}
        self._was_full = False

    @abstractmethod
    def most_rows(self) -> int:
        """Rows of a step of decode at most, padding for a CUDA graph included."""

    @property
    @abstractmethod
    def rank(self) -> tuple[int, int]:
        """Which worker this is of how many that split the heads of its layers."""

    @property
    def speaks(self) -> bool:
        """Whether this worker logs: one of those that split the heads of its layers."""
        return self.rank[0] == 0

    @abstractmethod
    def _plan(self, key: Any, layer: Any) -> Plan:
        """The rings that a layer is to get, but for its own options.

        Raises ValueError with the reason why it gets none.
        """

    @abstractmethod
    def _memory(self, layers: list[Plan]) -> tuple[int, int]:
        """Bytes of the KV cache, and how many requests run at a time."""

    @abstractmethod
    def _serve(self, layer: Any, ring: mac_attn.ReuseCache) -> None:
        """Let a layer know its rings, or raise MemoryError."""

    @functools.cached_property
    def shortest(self) -> int:
        """Up to this length a ring is of no use: its entries would be gone at `min_context`."""
        return min(ring.cfg.min_context - ring.cfg.window for ring in self.rings.values())

    def attach(self, layers: Mapping[Any, Any]) -> None:
        """Serve those of the layers that can be, and log how many and why not the others."""
        plans, left = self._plans(layers)
        if plans:
            given, every = self.options.num_slots, list(plans.values())
            number = given or slots_within(self.options.share, *self._memory(every), every)
            self.slots = SlotTable(number, self._most_drafts)
        for key, plan in plans.items():
            ring = plan.rings(self.slots.num_slots, self.most_rows(), self._device)
            self._serve(layers[key], ring)
            self.rings[key] = ring
        for reason, count in left.items():
            self.warn("%d layers are left to %s's attention: %s", count, self.engine, reason)
        if plans:
            self._say(len(layers))
        else:
            self.warn("off: no layer is served")

    def warn(self, text: str, *values: object) -> None:
        """Log a warning."""
        if self.speaks:
            self.logger.warning(f"MAC-Attention: {text}", *values)

    def place_rows(
        self, rows: list[Row], wants: list[bool], is_alive: Any, *, same_step: bool = False
    ) -> list[Place | None]:
        """`SlotTable.place`, and a warning when the first request finds no slot."""
        places = self.slots.place(rows, wants, is_alive, same_step=same_step)
        if self.slots.turned_away and not self._was_full:
            self._was_full = True
            self.warn("all %d slots are in use: further requests are exact", self.slots.num_slots)
        return places

    def _plans(self, layers: Mapping[Any, Any]) -> tuple[dict[Any, Plan], Counter[str]]:
        """The layers that can be served, and how many cannot, by the reason.

        Raises ValueError if the options are not for a layer that can be.
        """
        plans: dict[Any, Plan] = {}
        left: Counter[str] = Counter()
        for key, layer in layers.items():
            try:
                plan = self._plan(key, layer)
            except ValueError as error:
                left[str(error)] += 1
                continue
            config = self.options.layer_config(plan.number, plan.num_qo_heads, *self.rank)
            plans[key] = replace(plan, config=config)
        return plans, left

    def _plan_of(
        self,
        number: int,
        parent: nn.Module | None,
        heads: tuple[int, int, int],
        dtype: torch.dtype,
    ) -> Plan:
        """The plan of a layer with nothing against it but, perhaps, its rotary embedding.

        Args:
            number: of the layer in the model.
            parent: the module around it.
            heads: num_qo_heads, num_kv_heads and head_dim of this rank.
            dtype: of its queries.
        """
        module = getattr(parent, "rotary_emb", None)
        rotated = parent is None or is_rotated(parent)
        if rotated and module is None:
            raise ValueError("no rotary embedding beside it")
        rotary = self._rotary(module) if rotated else None
        return Plan(self.options.config, *heads, dtype, number, rotary)

    def _rotary(self, module: Any) -> mac_attn.RotaryEmbedding:
        """The rotation of a module, which layers share as a rule."""
        if module not in self._rotaries:
            self._rotaries[module] = rotary_of(module, self._max_position)
        return self._rotaries[module]

    def _say(self, num_layers: int) -> None:
        if not self.speaks:
            return
        rings = list(self.rings.values())
        size = sum(ring.nbytes for ring in rings) / 2**20
        share = "" if self.options.num_slots else f", {self.options.share:.0%} of the KV cache's"
        self.logger.info(
            "MAC-Attention serves %d of %d layers: %d slots of %.1f MiB, %.1f MiB in all%s; %s",
            len(rings),
            num_layers,
            self.slots.num_slots,
            size / self.slots.num_slots,
            size,
            share,
            "calibrated options" if self.options.calibration else rings[0].cfg,
        )
