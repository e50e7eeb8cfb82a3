"""The plugin's counters among SGLang's own metrics (`--enable-metrics`).

SGLang collects the metrics of all of its processes from files (prometheus_client's multi-process
mode), so that a counter of a worker shows at the server's endpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mac_attn import ReuseStats

from ..serving.totals import COUNTERS, TURNED_AWAY, TURNED_AWAY_TEXT, totals


class Metrics:
    """Prometheus counters of one worker, which count on from where they are.

    Args:
        enabled: whether there are any.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        texts = {**COUNTERS, TURNED_AWAY: TURNED_AWAY_TEXT}
        self._before = dict.fromkeys(texts, 0)
        self._counters: dict[str, Any] = {}
        if enabled:
            # Only now, as it reads where the files are when it is imported.
            from prometheus_client import Counter

            self._counters = {
                name: Counter(f"mac_attn:{name}", text) for name, text in texts.items()
            }

    def update(self, stats: Sequence[ReuseStats], turned_away: int) -> None:
        """Count what the rings and the slots have counted since the last time."""
        now = {**totals(stats), TURNED_AWAY: turned_away}
        for name, counter in self._counters.items():
            counter.inc(max(0, now[name] - self._before[name]))
        self._before = now
