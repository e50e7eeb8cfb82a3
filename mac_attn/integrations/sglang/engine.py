"""The rings of one model runner: which layers are served, for whom, and what they have saved."""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.arg_groups.model_override_base import resolved_view
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.runtime_context import get_parallel
from torch import nn

import mac_attn

from ..serving.budget import Shape, slots_within
from ..serving.options import Options
from ..serving.rotary import is_rotated, rotary_of
from ..serving.slots import Place, Row, SlotTable
from .metrics import Metrics
from .support import layer_reason, runner_reason

# A child of SGLang's logger, so that its lines are shown as SGLang's are.
logger = logging.getLogger("sglang.srt.mac_attn")

# So many batches in a row of which SGLang has not said whose they are, are no dummies.
_MANY = 1000


@dataclass(frozen=True)
class Served:
    """A layer with rings.

    Attributes:
        ring: the layer's.
        rotated: whether the layer's queries come rotated.
    """

    ring: mac_attn.ReuseCache
    rotated: bool


@dataclass(frozen=True)
class _Plan:
    """A layer that gets rings: their size, its number in the model, and how its queries come."""

    shape: Shape
    layer_id: int
    rotated: bool
    rotary: mac_attn.RotaryEmbedding | None


class Engine:
    """The rings of the layers of one model runner.

    Args:
        runner: SGLang's model runner, with its model loaded and its KV pool made.
        options: the plugin's.

    Attributes:
        layers: by layer_id, those that are served.
    """

    def __init__(self, runner: Any, options: Options) -> None:
        self.runner = runner
        self.options = options
        self.slots = SlotTable(0)
        self.layers: dict[int, Served] = {}
        self._places: list[Place | None] | None = None
        self._silent = 0
        self._was_full = False
        self._rotaries: dict[Any, mac_attn.RotaryEmbedding] = {}
        self._args = resolved_view(runner.server_args)
        self._attach()
        if self.layers:
            self._metrics = Metrics(self._args.enable_metrics)
            self._logged = (time.monotonic(), 0)
            self._read = 0.0
            self._listen()

    @functools.cached_property
    def _shortest(self) -> int:
        """Up to this length a ring is of no use: its entries would be gone at `min_context`."""
        configs = [served.ring.cfg for served in self.layers.values()]
        return min(cfg.min_context - cfg.window for cfg in configs)

    def most_rows(self) -> int:
        """Rows of a step of decode at most, padding for a CUDA graph included."""
        graph = self._args.cuda_graph_config
        captured = (graph.decode.max_bs or 0) if graph is not None else 0
        return int(max(self.slots.num_slots, self.runner.req_to_token_pool.size, captured))

    def places(self, rows: int) -> list[Place | None]:
        """The ring slot of every row of the batch announced last, None for those attended exactly.

        Args:
            rows: how many there are, padding included. A dummy batch, which nobody announces, has
                no slots: every announcement is used once.
        """
        places, self._places = self._places, None
        self._silent = 0 if places is not None else self._silent + 1
        if self._silent == _MANY:
            self._warn("this SGLang does not say whose batches are: all are exact")
        if places is None or len(places) > rows:
            return [None] * rows
        return [*places, *[None] * (rows - len(places))]

    def leave(self, layer_id: int, reason: str) -> None:
        """Have a layer no longer served."""
        del self.layers[layer_id]
        self._warn("layer %d is left to SGLang's attention: %s", layer_id, reason)

    def report(self) -> None:
        """Now and then, bring the counters to the metrics and to the log."""
        now = time.monotonic()
        seconds = self.options.log_seconds
        since, steps = self._logged
        due = seconds > 0 and now - since >= seconds
        # Reading them waits for the GPU.
        if not due and not (self._metrics.enabled and now - self._read >= 1):
            return
        if not self.layers:  # all were left meanwhile
            return
        self._read = now
        rings = [served.ring for served in self.layers.values()]
        counters = torch.stack([ring.counters for ring in rings]).cpu()
        stats = [
            mac_attn.ReuseStats(part, ring.num_qo_heads, ring.num_kv_heads)
            for part, ring in zip(counters, rings, strict=True)
        ]
        self._metrics.update(stats, self.slots.turned_away)
        total = sum(one.steps for one in stats)
        if due and total > steps and self._speaks:
            self._log(stats)
        if due:
            self._logged = (now, total)

    def _log(self, stats: list[mac_attn.ReuseStats]) -> None:
        """Log what the layers have saved, those with the same number of heads together."""
        for heads in sorted({(one.num_qo_heads, one.num_kv_heads) for one in stats}):
            alike = [one for one in stats if (one.num_qo_heads, one.num_kv_heads) == heads]
            per_slot = torch.stack([one.per_slot for one in alike]).sum(0)
            summed = mac_attn.ReuseStats(per_slot, *heads)
            without = f"{self.slots.turned_away} requests without a slot"
            logger.info("MAC-Attention, %d layers: %s; %s", len(alike), summed, without)

    def _announce(self, batch: Any) -> None:
        """What SGLang calls before it runs a batch of any kind."""
        self._places = None
        rids = batch.rids
        if not rids or not self.layers:  # a dummy, or nobody's
            return
        lens = [] if batch.seq_lens_cpu is None else batch.seq_lens_cpu[: len(rids)].tolist()
        decode = batch.forward_mode.is_decode() and len(lens) == len(rids)
        if not decode:  # nothing follows from such a batch but that tokens were computed elsewhere
            lens = [0] * len(rids)
        rows = [Row(rid, n - 1 if decode else -1, n, n) for rid, n in zip(rids, lens, strict=True)]
        wants = [decode and n > self._shortest for n in lens]
        # Who is over is not told; who is away longest makes room.
        places = self.slots.place(rows, wants, lambda rid: True)
        if not decode:
            return
        self._places = places
        if self.slots.turned_away and not self._was_full:
            self._was_full = True
            self._warn("all %d slots are in use: further requests are exact", self.slots.num_slots)

    def _listen(self) -> None:
        """Have SGLang announce every batch before it runs it, whatever will attend to it.

        A model may have a method for that. The runner looks it up anew for every batch, so that
        this instance of the model can be given one.
        """
        model = self.runner.model
        inner = getattr(model, "prepare_for_forward", None)

        def prepare_for_forward(batch: Any) -> None:
            self._announce(batch)
            if inner is not None:
                inner(batch)

        model.prepare_for_forward = prepare_for_forward

    @property
    def _speaks(self) -> bool:
        # One rank speaks for all that split the heads of its layers.
        return bool(get_parallel().attn_tp_rank == 0)

    def _warn(self, text: str, *values: object) -> None:
        if self._speaks:
            logger.warning(f"MAC-Attention: {text}", *values)

    def _attach(self) -> None:
        if (reason := runner_reason(self.runner)) is not None:
            self._warn("off: %s is left to SGLang's attention", reason)
            return
        layers = _attention_layers(self.runner.model)
        users = Counter(layer.layer_id for layer, _ in layers)
        left: Counter[str] = Counter()
        plans: list[_Plan] = []
        for layer, parent in layers:
            try:
                if users[layer.layer_id] > 1:
                    raise ValueError("layers that share their KV cache")
                plans.append(self._plan(layer, parent))
            except ValueError as error:
                left[str(error)] += 1
        try:
            if plans:
                self.slots = SlotTable(self._num_slots([plan.shape for plan in plans]))
            for plan in plans:
                self._serve(plan)
        except MemoryError as error:
            self.layers.clear()
            hint = "fewer MAC_ATTN_SGLANG_SLOTS or a smaller --mem-fraction-static make room"
            self._warn("off: %s; %s", error, hint)
            return
        for reason, count in left.items():
            self._warn("%d layers are left to SGLang's attention: %s", count, reason)
        if self.layers:
            self._say(len(layers))
        else:
            self._warn("off: no layer is served")

    def _plan(self, layer: Any, parent: nn.Module) -> _Plan:
        """The rings that a layer is to get. Raises ValueError with the reason why it gets none."""
        if (reason := layer_reason(layer, parent, self.runner)) is not None:
            raise ValueError(reason)
        module = getattr(parent, "rotary_emb", None)
        rotated = is_rotated(parent)
        if rotated and module is None:
            raise ValueError("no rotary embedding beside it")
        parallel, heads, size = get_parallel(), layer.tp_q_head_num, layer.qk_head_dim
        options = self.options.layer_config(
            layer.layer_id, heads, parallel.attn_tp_rank, parallel.attn_tp_size
        )
        options.threshold_per_head(heads, size)  # raises for another number
        shape = Shape(options, heads, layer.tp_k_head_num, size, self.runner.dtype)
        return _Plan(shape, layer.layer_id, rotated, self._rotary(module) if rotated else None)

    def _num_slots(self, layers: list[Shape]) -> int:
        """How many slots there are, by their number in the options or their share of the memory."""
        if self.options.num_slots is not None:
            return self.options.num_slots
        token = sum(2 * one.num_kv_heads * one.head_dim * one.dtype.itemsize for one in layers)
        memory = self.runner.max_total_num_tokens * token
        if self.runner.device != "cpu":  # and of what is left, no more than they leave
            free, _ = torch.cuda.mem_get_info()
            memory = min(memory, int(free / 2 / self.options.share))
        return slots_within(self.options.share, memory, layers, self.runner.req_to_token_pool.size)

    def _serve(self, plan: _Plan) -> None:
        """Give a layer its rings. Raises MemoryError where they do not fit."""
        shape = plan.shape
        ring = mac_attn.ReuseCache(
            shape.config,
            num_slots=self.slots.num_slots,
            num_qo_heads=shape.num_qo_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
            device=self.runner.device,
            rotary=plan.rotary,
            max_batch_size=self.most_rows(),
            layer=plan.layer_id,
        )
        self._check_memory(ring)
        self.layers[plan.layer_id] = Served(ring, plan.rotated)

    def _check_memory(self, ring: mac_attn.ReuseCache) -> None:
        """Raise MemoryError if rings take more than they leave, for CUDA graphs and activations."""
        if ring.device.type == "cpu":
            return
        free, _ = torch.cuda.mem_get_info(ring.device)
        used = sum(served.ring.nbytes for served in self.layers.values()) + ring.nbytes
        if used > free:
            raise MemoryError(
                f"the rings of {len(self.layers) + 1} layers take {used / 2**20:.1f} MiB and leave "
                f"{free / 2**20:.1f}, must leave as much as they take"
            )

    def _rotary(self, module: Any) -> mac_attn.RotaryEmbedding:
        """The rotation of a module, which the layers share as a rule."""
        if module not in self._rotaries:
            self._rotaries[module] = rotary_of(module, self.runner.model_config.context_len)
        return self._rotaries[module]

    def _say(self, num_layers: int) -> None:
        if not self._speaks:
            return
        rings = [served.ring for served in self.layers.values()]
        size = sum(ring.nbytes for ring in rings) / 2**20
        share = "" if self.options.num_slots else f", {self.options.share:.0%} of the KV cache's"
        logger.info(
            "MAC-Attention serves %d of %d layers: %d slots of %.1f MiB, %.1f MiB in all%s; %s",
            len(rings),
            num_layers,
            self.slots.num_slots,
            size / self.slots.num_slots,
            size,
            share,
            "calibrated options" if self.options.calibration else rings[0].cfg,
        )


def _attention_layers(model: nn.Module) -> list[tuple[RadixAttention, nn.Module]]:
    """The attention layers, whatever attends to them, each with the module around it."""
    return [
        (child, parent)
        for parent in model.modules()
        for child in parent.children()
        if isinstance(child, RadixAttention)
    ]
