"""The metrics that every plugin has, from the statistics of the rings."""

from __future__ import annotations

from collections.abc import Iterable

from mac_attn import ReuseStats

COUNTERS = {
    "query_heads": "Query heads of decode steps with a ring, counted for every layer and rank.",
    "query_head_hits": "Those that reused a recent query's attention.",
    "kv_tokens_full": "Keys that exact attention would have read in those steps.",
    "kv_tokens_read": "Keys that were read.",
}

TURNED_AWAY = "requests_turned_away"
TURNED_AWAY_TEXT = "Requests that wanted a ring and had none, as others had them all."


def totals(stats: Iterable[ReuseStats]) -> dict[str, int]:
    """The counters of `COUNTERS`, added up."""
    total = dict.fromkeys(COUNTERS, 0)
    for one in stats:
        total["query_heads"] += one.steps * one.num_qo_heads
        total["query_head_hits"] += one.query_head_hits
        total["kv_tokens_full"] += one.kv_tokens_full
        total["kv_tokens_read"] += one.kv_tokens_read
    return total
