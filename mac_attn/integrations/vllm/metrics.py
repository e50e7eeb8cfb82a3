"""Statistics of all workers of a server, in its log and at its Prometheus endpoint.

The counters of a worker's rings lie in a file of a folder that all processes of the server know
from the environment. A collector in the API server adds them up whenever the endpoint is read, so
nothing has to be sent, and what is read is what the kernels have counted. All engines that a
process has started share the folder. What a process counted is gone with it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mac_attn import ReuseStats
from mac_attn.stats import COUNTERS as COLUMNS

from ..serving.totals import COUNTERS, TURNED_AWAY, TURNED_AWAY_TEXT, totals

FOLDER = "MAC_ATTN_VLLM_METRICS_DIR"

_KIND, _DTYPE = ".i64", torch.int64


def folder() -> Path:
    """The folder of this server's counters. The first process to ask makes it, and removes it."""
    if path := os.environ.get(FOLDER):
        return Path(path)
    made = tempfile.mkdtemp(prefix="mac_attn-vllm-")
    os.environ[FOLDER] = made
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a fork of it
            shutil.rmtree(made, ignore_errors=True)

    atexit.register(remove)
    return Path(made)


def _runs(pid: int) -> bool:
    """Whether a process of this user's runs."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class WorkerCounters:
    """The counters of one worker.

    Attributes:
        engine, rank: which worker: of a data-parallel engine, its rank.
        num_qo_heads, num_kv_heads: heads of a layer on this rank.
        counters: [layers, slots, 8] int64, `mac_attn.stats.COUNTERS`.
        turned_away: [1] int64, requests that wanted a slot and had none.
    """

    engine: int
    rank: int
    num_qo_heads: int
    num_kv_heads: int
    counters: Tensor
    turned_away: Tensor

    @classmethod
    def create(
        cls, engine: int, rank: int, heads: tuple[int, int], layers: int, num_slots: int
    ) -> WorkerCounters:
        """New counters, all 0, in a file that `read_all` finds while this process runs."""
        about = [engine, rank, *heads, layers, num_slots, 0]
        numbers = torch.tensor(about + [0] * (layers * num_slots * len(COLUMNS)))
        home = folder()
        home.mkdir(parents=True, exist_ok=True)  # who made it may have ended, and removed it
        path = home / f"{os.getpid()}-{engine}-{rank}"
        new = path.with_suffix(".new")
        new.write_bytes(numbers.numpy().tobytes())
        path = new.replace(path.with_suffix(_KIND))  # who maps the file before it keeps that one
        return cls._of(torch.from_file(str(path), shared=True, size=len(numbers), dtype=_DTYPE))

    @classmethod
    def _of(cls, numbers: Tensor) -> WorkerCounters:
        engine, rank, num_qo_heads, num_kv_heads, layers, num_slots = numbers[:6].tolist()
        counters = numbers[7:].view(layers, num_slots, len(COLUMNS))
        return cls(engine, rank, num_qo_heads, num_kv_heads, counters, numbers[6:7])

    @classmethod
    def read_all(cls) -> list[WorkerCounters]:
        """Those of every worker of this server that runs, as they are now."""
        found = []
        for path in sorted(folder().glob(f"*{_KIND}")):
            if _runs(int(path.name.partition("-")[0])):
                numbers = torch.frombuffer(bytearray(path.read_bytes()), dtype=_DTYPE)
                found.append(cls._of(numbers))
            else:
                path.unlink(missing_ok=True)
        return found

    def stats(self) -> ReuseStats:
        """The statistics of all layers together; `steps` count every layer's."""
        return ReuseStats(self.counters.sum(0), self.num_qo_heads, self.num_kv_heads)


class Collector:
    """What prometheus_client asks when the endpoint is read: one sample of each for each engine."""

    def collect(self) -> Iterator[Any]:
        """Yield the metrics, the ranks of an engine added up."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        engines: dict[int, list[WorkerCounters]] = {}
        for worker in WorkerCounters.read_all():
            engines.setdefault(worker.engine, []).append(worker)
        totals_of = {
            engine: totals(worker.stats() for worker in workers)
            for engine, workers in engines.items()
        }
        for name, text in COUNTERS.items():
            counter = CounterMetricFamily(f"mac_attn:{name}", text, labels=["engine"])
            for engine, total in totals_of.items():
                counter.add_metric([str(engine)], total[name])
            yield counter
        away = CounterMetricFamily(f"mac_attn:{TURNED_AWAY}", TURNED_AWAY_TEXT, labels=["engine"])
        for engine, workers in engines.items():  # each of whose ranks has the same requests
            first = min(worker.rank for worker in workers)
            turned_away = sum(int(one.turned_away) for one in workers if one.rank == first)
            away.add_metric([str(engine)], turned_away)
        yield away
        for name, (part, whole, text) in _SHARES.items():
            gauge = GaugeMetricFamily(f"mac_attn:{name}", text, labels=["engine"])
            for engine, total in totals_of.items():
                if total[whole]:
                    gauge.add_metric([str(engine)], total[part] / total[whole])
            yield gauge


_SHARES = {
    "hit_rate": ("query_head_hits", "query_heads", "Share of the query heads that hit."),
    "kv_read_share": ("kv_tokens_read", "kv_tokens_full", "Share of the keys that were read."),
}


def register_collector() -> None:
    """Add the collector to this process's metrics, and make the folder before it has children."""
    from prometheus_client import REGISTRY

    folder()
    REGISTRY.register(Collector())
