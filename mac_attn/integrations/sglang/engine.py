"""The rings of one model runner: which layers are served, for whom, and what they have saved."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from sglang.srt.arg_groups.model_override_base import resolved_view
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.runtime_context import get_parallel
from torch import nn

import mac_attn

from ..serving.budget import Plan
from ..serving.engine import BaseEngine
from ..serving.options import Options
from ..serving.slots import Place, Row
from .metrics import Metrics
from .support import layer_reason, runner_reason

Users = list[tuple[RadixAttention, nn.Module]]

# So many batches in a row of which SGLang has not said whose they are, are no dummies.
_MANY = 1000


class Engine(BaseEngine):
    """The rings of the layers of one model runner.

    Args:
        runner: SGLang's model runner, with its model loaded and its KV pool made.
        options: the plugin's.

    Attributes:
        rings: by layer_id, of the layers that are served.
    """

    engine = "SGLang"
    logger = logging.getLogger("sglang.srt.mac_attn")

    def __init__(self, runner: Any, options: Options) -> None:
        super().__init__(options, runner.device, runner.model_config.context_len)
        self.runner = runner
        self._places: list[Place | None] | None = None
        self._silent = 0
        self._args = resolved_view(runner.server_args)
        if (reason := runner_reason(runner)) is not None:
            self.warn("off: %s is left to SGLang's attention", reason)
            return
        try:
            self.attach(_attention_layers(runner.model))
        except MemoryError as error:
            self.rings.clear()
            hint = "fewer MAC_ATTN_SGLANG_SLOTS or a smaller --mem-fraction-static make room"
            self.warn("off: %s; %s", error, hint)
        if self.rings:
            self._metrics = Metrics(self._args.enable_metrics)
            self._logged = (time.monotonic(), 0)
            self._read = 0.0
            self._listen()

    @property
    def rank(self) -> tuple[int, int]:
        """Which of how many that split the heads of its layers."""
        parallel = get_parallel()
        return parallel.attn_tp_rank, parallel.attn_tp_size

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
            self.warn("this SGLang does not say whose batches are: all are exact")
        if places is None or len(places) > rows:
            return [None] * rows
        return [*places, *[None] * (rows - len(places))]

    def leave(self, layer_id: int, reason: str) -> None:
        """Have a layer no longer served."""
        del self.rings[layer_id]
        self.warn("layer %d is left to SGLang's attention: %s", layer_id, reason)

    def report(self) -> None:
        """Now and then, bring the counters to the metrics and to the log."""
        now = time.monotonic()
        seconds = self.options.log_seconds
        since, steps = self._logged
        due = seconds > 0 and now - since >= seconds
        # Reading them waits for the GPU.
        if not due and not (self._metrics.enabled and now - self._read >= 1):
            return
        if not self.rings:  # all were left meanwhile
            return
        self._read = now
        rings = list(self.rings.values())
        counters = torch.stack([ring.counters for ring in rings]).cpu()
        stats = [
            mac_attn.ReuseStats(part, ring.num_qo_heads, ring.num_kv_heads)
            for part, ring in zip(counters, rings, strict=True)
        ]
        self._metrics.update(stats, self.slots.turned_away)
        total = sum(one.steps for one in stats)
        if due and total > steps and self.speaks:
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
            self.logger.info("MAC-Attention, %d layers: %s; %s", len(alike), summed, without)

    def _announce(self, batch: Any) -> None:
        """What SGLang calls before it runs a batch of any kind."""
        self._places = None
        rids = batch.rids
        if not rids or not self.rings:  # a dummy, or nobody's
            return
        lens = [] if batch.seq_lens_cpu is None else batch.seq_lens_cpu[: len(rids)].tolist()
        decode = batch.forward_mode.is_decode() and len(lens) == len(rids)
        if not decode:  # nothing follows from such a batch but that tokens were computed elsewhere
            lens = [0] * len(rids)
        rows = [Row(rid, n - 1 if decode else -1, n, n) for rid, n in zip(rids, lens, strict=True)]
        wants = [decode and n > self.shortest for n in lens]
        # Who is over is not told; who is away longest makes room.
        places = self.place_rows(rows, wants, lambda rid: True)
        if decode:
            self._places = places

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

    def _plan(self, key: int, layer: Users) -> Plan:
        if len(layer) > 1:
            raise ValueError("layers that share their KV cache")
        ((attention, parent),) = layer
        if (reason := layer_reason(attention, parent, self.runner)) is not None:
            raise ValueError(reason)
        heads = (attention.tp_q_head_num, attention.tp_k_head_num, attention.qk_head_dim)
        return self._plan_of(key, parent, heads, self.runner.dtype)

    def _memory(self, layers: list[Plan]) -> tuple[int, int]:
        token = sum(2 * one.num_kv_heads * one.head_dim * one.dtype.itemsize for one in layers)
        memory = self.runner.max_total_num_tokens * token
        if self.runner.device != "cpu":  # and of what is left, no more than they leave
            free, _ = torch.cuda.mem_get_info()
            memory = min(memory, int(free / 2 / self.options.share))
        return memory, self.runner.req_to_token_pool.size

    def _serve(self, layer: Users, ring: mac_attn.ReuseCache) -> None:
        """Raise MemoryError if rings take more than they leave, for CUDA graphs and activations."""
        if ring.device.type == "cpu":
            return
        free, _ = torch.cuda.mem_get_info(ring.device)
        used = sum(one.nbytes for one in self.rings.values()) + ring.nbytes
        if used > free:
            raise MemoryError(
                f"the rings of {len(self.rings) + 1} layers take {used / 2**20:.1f} MiB and leave "
                f"{free / 2**20:.1f}, must leave as much as they take"
            )


def _attention_layers(model: nn.Module) -> dict[int, Users]:
    """The attention layers by layer_id, whatever attends to them, each with the module around it.

    Those that share a KV cache have the same one.
    """
    layers: dict[int, Users] = {}
    for parent in model.modules():
        for child in parent.children():
            if isinstance(child, RadixAttention):
                layers.setdefault(child.layer_id, []).append((child, parent))
    return layers
