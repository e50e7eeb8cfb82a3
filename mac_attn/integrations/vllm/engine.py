"""One worker's rings: which layers are served, with which slots, and what they have saved."""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

import mac_attn

from ..serving.budget import Shape, slots_within
from ..serving.rotary import is_rotated, rotary_of
from ..serving.slots import Place, Row, SlotTable
from . import requests
from .attend import Served
from .metrics import WorkerCounters
from .options import Options
from .support import backend_reason, engine_reason, layer_reason, shares_kv

# A child of vLLM's logger, so that its lines are formatted and shown as vLLM's are.
logger = logging.getLogger("vllm.mac_attn")


@dataclass(frozen=True)
class _Plan:
    """A layer that gets rings: their size, its number in the model, and how its queries come."""

    shape: Shape
    number: int
    rotated: bool
    rotary: mac_attn.RotaryEmbedding | None


class Engine:
    """The rings of the layers of one worker.

    Args:
        runner: vLLM's model runner, with its model loaded.
        options: the plugin's.

    Attributes:
        rings: by name of the layer, those that are served.
    """

    def __init__(self, runner: Any, options: Options) -> None:
        self.runner = runner
        self.options = options
        self.slots = SlotTable(0)
        self.rings: dict[str, mac_attn.ReuseCache] = {}
        self._rotaries: dict[Any, mac_attn.RotaryEmbedding] = {}
        self._counters: WorkerCounters | None = None
        self._logged = (time.monotonic(), 0)
        self._published = 0.0
        self._was_full = False
        parallel = runner.vllm_config.parallel_config
        # One rank speaks for all that split the heads of its layers.
        self._speaks = parallel.rank % parallel.tensor_parallel_size == 0
        self._attach()

    @functools.cached_property
    def _shortest(self) -> int:
        """Up to this length a ring is of no use: its entries would be gone at `min_context`."""
        return min(ring.cfg.min_context - ring.cfg.window for ring in self.rings.values())

    @functools.cached_property
    def seed(self) -> int:
        """Of how many last prompt tokens entries are made; no more than a window holds."""
        windows = [ring.cfg.window for ring in self.rings.values()]
        return min([self.options.seed, *windows])

    def seeded(self, row: Row) -> int:
        """How many of the last tokens of a row in prefill get ring entries in this step."""
        if row.is_decode or row.end > row.total:
            return 0
        return max(0, row.end - max(row.begin, row.total - self.seed))

    def leads(self, layer_names: list[str]) -> bool:
        """Whether a group of layers is the one that each step begins with."""
        return next(iter(self.rings)) in layer_names

    def place(self, rows: list[Row | None], leads: bool) -> list[Place | None]:
        """The ring slot of every row, None for those that are attended exactly.

        Called once a step for every group of layers; `leads` is true for one of them, the first.
        """
        known = [row for row in rows if row is not None]
        wants = [
            row.end > self._shortest and (row.is_decode or self.seeded(row) > 0) for row in known
        ]
        is_alive = requests.is_alive(self.runner)
        found = self.slots.place(known, wants, is_alive, same_step=not leads)
        if self.slots.turned_away and not self._was_full:
            self._was_full = True
            self._warn("all %d slots are in use: further requests are exact", self.slots.num_slots)
        places = iter(found)
        return [None if row is None else next(places) for row in rows]

    def rows(self, common: Any) -> list[Row | None]:
        """The requests behind the rows of a batch."""
        return requests.rows_of(self.runner, common)

    def report(self) -> None:
        """Bring the counters to where the metrics are read; now and then, log them."""
        if self._counters is None:
            return
        now = time.monotonic()
        if self.runner.device.type == "cpu" or now - self._published > 1:
            counters = torch.stack([ring.counters for ring in self.rings.values()])
            self._counters.counters.copy_(counters)
            self._counters.turned_away.fill_(self.slots.turned_away)
            self._published = now
        seconds = self.options.log_seconds
        since, steps = self._logged
        if self._speaks and seconds and now - since >= seconds:
            stats = self._counters.stats()
            if stats.steps > steps:
                where = f"engine {self._counters.engine} rank {self._counters.rank}"
                without = f"{self.slots.turned_away} requests without a slot"
                logger.info("MAC-Attention, %s, all layers: %s; %s", where, stats, without)
            self._logged = (now, stats.steps)

    def _attach(self) -> None:
        config = self.runner.vllm_config
        layers = _attention_layers(config)
        left: Counter[str] = Counter()
        if (reason := engine_reason(config)) is not None:
            self._warn("off: %s is left to vLLM's attention", reason)
            return
        parents = _parents(self.runner.get_model())
        shared = shares_kv(layers)
        plans: dict[str, _Plan] = {}
        for name, layer in layers.items():
            if not hasattr(layer.impl, "mac"):
                left[backend_reason(layer, self.options.by_name)] += 1
                continue
            if name in shared:
                left["layers that share their KV cache"] += 1
                continue
            try:
                plans[name] = self._plan(name, layer, parents.get(id(layer)))
            except ValueError as error:
                left[str(error)] += 1
        if plans:
            self.slots = SlotTable(self._num_slots([plan.shape for plan in plans.values()]))
        for name, plan in plans.items():
            layer, ring = layers[name], self._ring(plan)
            self.rings[name] = ring
            # Queries must come as they are; prefill's are rounded where vLLM's kernel is called.
            quant, layer.query_quant = getattr(layer, "query_quant", None), None
            float8 = layer.kv_cache_torch_dtype != plan.shape.dtype
            layer.impl.mac = Served(self, ring, plan.rotated, float8, quant)
        for reason, count in left.items():
            self._warn("%d layers are left to vLLM's attention: %s", count, reason)
        if self.rings:
            self._share_counters()
            self._say(len(layers))
        else:
            self._warn("off: no layer is served")

    def _warn(self, text: str, *values: object) -> None:
        if self._speaks:
            logger.warning(f"MAC-Attention: {text}", *values)

    def _plan(self, name: str, layer: Any, parent: nn.Module | None) -> _Plan:
        """The rings that a layer is to get. Raises ValueError with the reason why it gets none."""
        config = self.runner.vllm_config
        dtype = config.model_config.dtype
        if (reason := layer_reason(layer, dtype, self.runner.device)) is not None:
            raise ValueError(reason)
        module = getattr(parent, "rotary_emb", None)
        if parent is None or module is None:
            raise ValueError("no rotary embedding beside it")
        rotated = is_rotated(parent)
        number, parallel = extract_layer_index(name), config.parallel_config
        ranks = parallel.tensor_parallel_size
        options = self.options.layer_config(number, layer.num_heads, parallel.rank % ranks, ranks)
        options.threshold_per_head(layer.num_heads, layer.head_size)  # raises for another number
        shape = Shape(options, layer.num_heads, layer.num_kv_heads, layer.head_size, dtype)
        return _Plan(shape, number, rotated, self._rotary(module) if rotated else None)

    def _num_slots(self, layers: list[Shape]) -> int:
        """How many slots there are, by their number in the options or their share of the memory."""
        if self.options.num_slots is not None:
            return self.options.num_slots
        config, device = self.runner.vllm_config, self.runner.device
        memory = kv_cache_bytes(config.cache_config, device)
        most = int(config.scheduler_config.max_num_seqs)
        return slots_within(self.options.share, memory, layers, most)

    def _ring(self, plan: _Plan) -> mac_attn.ReuseCache:
        shape = plan.shape
        return mac_attn.ReuseCache(
            shape.config,
            num_slots=self.slots.num_slots,
            num_qo_heads=shape.num_qo_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
            device=self.runner.device,
            rotary=plan.rotary,
            max_batch_size=max(self.slots.num_slots, most_rows(self.runner.vllm_config)),
            layer=plan.number,
        )

    def _rotary(self, module: Any) -> mac_attn.RotaryEmbedding:
        """The rotation of a module, which the layers share as a rule."""
        if module not in self._rotaries:
            max_model_len = self.runner.vllm_config.model_config.max_model_len
            self._rotaries[module] = rotary_of(module, max_model_len)
        return self._rotaries[module]

    def _share_counters(self) -> None:
        """Make the file that the metrics are read from."""
        config = self.runner.vllm_config.parallel_config
        rings = list(self.rings.values())
        heads = (rings[0].num_qo_heads, rings[0].num_kv_heads)
        if any((ring.num_qo_heads, ring.num_kv_heads) != heads for ring in rings):
            self._warn("no metrics, as layers differ in their number of heads")
            return
        self._counters = WorkerCounters.create(
            config.data_parallel_index, config.rank, heads, len(rings), self.slots.num_slots
        )

    def _say(self, num_layers: int) -> None:
        if not self._speaks:
            return
        size = sum(ring.nbytes for ring in self.rings.values()) / 2**20
        one = next(iter(self.rings.values()))
        share = "" if self.options.num_slots else f", {self.options.share:.0%} of the KV cache's"
        logger.info(
            "MAC-Attention serves %d of %d layers: %d slots of %.1f MiB, %.1f MiB in all%s; %s",
            len(self.rings),
            num_layers,
            self.slots.num_slots,
            size / self.slots.num_slots,
            size,
            share,
            "calibrated options" if self.options.calibration else one.cfg,
        )


def kv_cache_bytes(cache_config: Any, device: torch.device) -> int:
    """About how much memory vLLM will give its KV cache, before it has measured what it needs.

    What is asked for, or what its share of the memory leaves beside the loaded model.
    """
    if cache_config.kv_cache_memory_bytes is not None:
        return int(cache_config.kv_cache_memory_bytes)
    if device.type == "cpu":
        total, used = psutil.virtual_memory().total, psutil.Process().memory_info().rss
    else:
        free, total = torch.cuda.mem_get_info(device)
        used = total - free
    return max(0, int(cache_config.gpu_memory_utilization * total - used))


def most_rows(vllm_config: Any) -> int:
    """Rows of a step of decode at most, padding for a CUDA graph included."""
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return int(max(vllm_config.scheduler_config.max_num_seqs, captured))


def engine_of(vllm_config: Any, layer_names: list[str]) -> Engine | None:
    """The engine of a group of layers, None if none of them is served."""
    layers = vllm_config.compilation_config.static_forward_context
    for name in layer_names:
        served = getattr(getattr(layers.get(name), "impl", None), "mac", None)
        if served is not None:
            engine: Engine = served.engine
            return engine
    return None


def _attention_layers(vllm_config: Any) -> dict[str, Any]:
    """The attention layers by name, whatever their backend."""
    layers = vllm_config.compilation_config.static_forward_context
    return {name: layer for name, layer in layers.items() if isinstance(layer, Attention)}


def _parents(model: nn.Module) -> dict[int, nn.Module]:
    """The module around every attention layer, by the layer's id."""
    return {
        id(child): parent
        for parent in model.modules()
        for child in parent.children()
        if isinstance(child, Attention)
    }
