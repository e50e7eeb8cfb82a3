"""One worker's rings: which layers are served, with which slots, and what they have saved."""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from torch import nn
from vllm import envs
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

import mac_attn

from ..serving.budget import Plan
from ..serving.engine import BaseEngine
from ..serving.slots import Place, Row
from . import requests
from .attend import Served
from .metrics import WorkerCounters
from .options import Options
from .support import (
    backend_reason,
    engine_reason,
    layer_reason,
    num_drafts,
    query_tokens,
    sharing_kv,
)


class Engine(BaseEngine):
    """The rings of the layers of one worker.

    Args:
        worker: vLLM's, with its model loaded.
        options: the plugin's.

    Attributes:
        runner: the worker's model runner.
        rings: by name, of the layers that are served.
        query_tokens: up to how many tokens of a request a step is one of decode.
        warms_up: whether vLLM takes steps of its own, of requests that nobody has sent.
    """

    options: Options  # with what only vLLM's have
    engine = "vLLM"
    warms_up = False
    logger = logging.getLogger("vllm.mac_attn")

    def __init__(self, worker: Any, options: Options) -> None:
        runner = worker.model_runner
        config = runner.vllm_config
        longest, drafts = config.model_config.max_model_len, num_drafts(config)
        super().__init__(options, runner.device, longest, drafts)
        self.query_tokens = query_tokens(config)
        self.runner = runner
        self._worker = worker
        self._counters: WorkerCounters | None = None
        self._logged = (time.monotonic(), 0)
        self._published = 0.0
        if (reason := engine_reason(config)) is not None:
            self.warn("off: %s is left to vLLM's attention", reason)
            return
        self._parents = _parents(runner.get_model())
        self.attach(_attention_layers(config))
        if self.rings:
            requests.watch_batches(runner)
            self._share_counters()
            self._say_what_drafts_do(drafts)

    def most_rows(self) -> int:
        """Rows of a step of decode at most, padding for a CUDA graph included."""
        return most_rows(self.runner.vllm_config)

    @property
    def batch_invariant(self) -> bool:
        """See `Served`."""
        return bool(envs.VLLM_BATCH_INVARIANT)

    @property
    def rank(self) -> tuple[int, int]:
        """Which of how many that split the heads of its layers."""
        parallel = self.runner.vllm_config.parallel_config
        ranks: int = parallel.tensor_parallel_size
        return parallel.rank % ranks, ranks

    @functools.cached_property
    def seed(self) -> int:
        """Of how many last prompt tokens entries are made; no more than a window holds."""
        windows = [ring.cfg.window for ring in self.rings.values()]
        return min([self.options.seed, *windows])

    def seeded(self, row: Row) -> int:
        """How many of the last tokens of a row in prefill get ring entries in this step."""
        if row.tokens <= self.query_tokens or row.end > row.total:
            return 0
        return max(0, row.end - max(row.begin, row.total - self.seed))

    def leads(self, layer_names: list[str]) -> bool:
        """Whether a group of layers is the one that each step begins with."""
        return next(iter(self.rings)) in layer_names

    def place(self, rows: list[Row | None], leads: bool) -> list[Place | None]:
        """The ring slot of every row, None for those that are attended exactly.

        Called once a step for every group of layers; `leads` is true for one of them, the first.
        """
        if self.warms_up:
            return [None] * len(rows)
        known = [row for row in rows if row is not None]
        wants = [
            row.end > self.shortest and (row.tokens <= self.query_tokens or self.seeded(row) > 0)
            for row in known
        ]
        is_alive = requests.is_alive(self.runner)
        places = iter(self.place_rows(known, wants, is_alive, same_step=not leads))
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
        if self.speaks and seconds and now - since >= seconds:
            stats = self._counters.stats()
            if stats.steps > steps:
                where = f"engine {self._counters.engine} rank {self._counters.rank}"
                without = f"{self.slots.turned_away} requests without a slot"
                self.logger.info("MAC-Attention, %s, all layers: %s; %s", where, stats, without)
            self._logged = (now, stats.steps)

    def _plans(self, layers: Mapping[str, Any]) -> tuple[dict[str, Plan], Counter[str]]:
        plans, left = super()._plans(layers)
        # On the CPU served layers have pages of their own kind, so that sharing them takes all.
        for group in sharing_kv(layers):
            if not group <= set(plans):
                for name in group & set(plans):
                    del plans[name]
                    left["layers that share the KV cache of a layer that is not served"] += 1
        return plans, left

    def _plan(self, name: str, layer: Any) -> Plan:
        config = self.runner.vllm_config
        dtype = config.model_config.dtype
        if not hasattr(layer.impl, "mac"):
            raise ValueError(backend_reason(layer, self.options.by_name))
        if (reason := layer_reason(layer, dtype, self.runner.device)) is not None:
            raise ValueError(reason)
        heads = (layer.num_heads, layer.num_kv_heads, layer.head_size)
        parent = self._parents.get(id(layer))
        if parent is None and config.speculative_config is not None:
            raise ValueError("layers of the model that drafts")
        return self._plan_of(extract_layer_index(name), parent, heads, dtype)

    def _memory(self, layers: list[Plan]) -> tuple[int, int]:
        most = int(self.runner.vllm_config.scheduler_config.max_num_seqs)
        return kv_cache_bytes(self._worker), most

    def _serve(self, layer: Any, ring: mac_attn.ReuseCache) -> None:
        # Queries must come as they are; prefill's are rounded where vLLM's kernel is called.
        quant, layer.query_quant = getattr(layer, "query_quant", None), None
        float8 = layer.kv_cache_torch_dtype != ring.dtype
        layer.impl.mac = Served(self, ring, float8, quant, self.batch_invariant)

    def _say_what_drafts_do(self, drafts: int) -> None:
        """Log what is verified by whom, if there is speculative decoding."""
        if not drafts or not self.speaks:
            return
        text = "MAC-Attention, speculative decoding: steps that verify drafts reuse where all of"
        text += " their tokens can"
        if 1 + drafts > self.query_tokens:
            text += f"; steps of more than {self.query_tokens} tokens are left to vLLM's attention"
        self.logger.info(text)

    def _share_counters(self) -> None:
        """Make the file that the metrics are read from."""
        config = self.runner.vllm_config.parallel_config
        rings = list(self.rings.values())
        heads = (rings[0].num_qo_heads, rings[0].num_kv_heads)
        if any((ring.num_qo_heads, ring.num_kv_heads) != heads for ring in rings):
            self.warn("no metrics, as layers differ in their number of heads")
            return
        self._counters = WorkerCounters.create(
            config.data_parallel_index, config.rank, heads, len(rings), self.slots.num_slots
        )


def kv_cache_bytes(worker: Any) -> int:
    """About how much memory vLLM will give its KV cache, before it has measured what it needs.

    What is asked for, or what is left of its share of the memory beside the loaded model; what
    other processes have is no part of either.
    """
    runner = worker.model_runner
    cache_config, device = runner.vllm_config.cache_config, runner.device
    if cache_config.kv_cache_memory_bytes is not None:
        return int(cache_config.kv_cache_memory_bytes)
    if device.type == "cpu":
        requested = cache_config.gpu_memory_utilization * psutil.virtual_memory().total
        used = psutil.Process().memory_info().rss
    else:
        requested = worker.requested_memory
        used = worker.init_snapshot.free_memory - torch.cuda.mem_get_info(device)[0]
    return max(0, int(requested - used))


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
