"""What reuse has saved: the counters of a `ReuseCache`, read and put into rates."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# Columns of ReuseCache.counters; csrc/ring.h lists them in this order.
COUNTERS = (
    "steps",
    "kv_head_steps",
    "kv_head_hits",
    "query_head_hits",
    "kv_tokens_read",
    "kv_tokens_full",
    "anchors_read",
    "entries_stored",
)


@dataclass(frozen=True, eq=False)
class ReuseStats:
    """Totals over all slots as ints and rates, and the same for every slot as tensors `[N]`.

    Without a step the hit rates are 0 and the share of KV read is 1.

    Attributes:
        per_slot: [N, 8] int64 on the CPU, the columns of `COUNTERS`.
        num_qo_heads, num_kv_heads: those of the cache.
    """

    per_slot: Tensor
    num_qo_heads: int
    num_kv_heads: int

    def _total(self, counter: str) -> int:
        return int(self.per_slot[:, COUNTERS.index(counter)].sum())

    @property
    def steps(self) -> int:
        """Query tokens, one per request and call or, in a step of several, as many."""
        return self._total("steps")

    @property
    def kv_head_steps(self) -> int:
        """(step, KV head) pairs."""
        return self._total("kv_head_steps")

    @property
    def kv_head_hits(self) -> int:
        """(step, KV head) pairs of which every query head hit: the KV head was not read in full."""
        return self._total("kv_head_hits")

    @property
    def query_head_hits(self) -> int:
        """(step, query head) pairs that hit."""
        return self._total("query_head_hits")

    @property
    def kv_tokens_read(self) -> int:
        """Tokens whose key and value were read, counted for every (step, KV head) pair; where a KV
        head has missed with several query tokens, once for all of them."""
        return self._total("kv_tokens_read")

    @property
    def kv_tokens_full(self) -> int:
        """Tokens that exact attention would have read."""
        return self._total("kv_tokens_full")

    @property
    def anchors_read(self) -> int:
        """Of the tokens read, those that hits have read as anchors."""
        return self._total("anchors_read")

    @property
    def entries_stored(self) -> int:
        """Entries that decode steps have left in the rings, one for a KV head at a time."""
        return self._total("entries_stored")

    @property
    def hit_rate(self) -> float:
        """Share of (step, query head) pairs that hit."""
        return self.query_head_hits / max(1, self.steps * self.num_qo_heads)

    @property
    def kv_head_hit_rate(self) -> float:
        """Share of (step, KV head) pairs that did not read the KV head in full."""
        return self.kv_head_hits / max(1, self.kv_head_steps)

    @property
    def kv_read_share(self) -> float:
        """Keys and values read, as a share of what exact attention reads."""
        return self.kv_tokens_read / self.kv_tokens_full if self.kv_tokens_full else 1.0

    def slot(self, index: int) -> ReuseStats:
        """The statistics of one slot alone."""
        return ReuseStats(self.per_slot[index][None], self.num_qo_heads, self.num_kv_heads)

    def __str__(self) -> str:
        return (
            f"{self.steps} steps: {self.hit_rate:.1%} of query heads and "
            f"{self.kv_head_hit_rate:.1%} of KV heads hit, {self.kv_read_share:.1%} of the KV read"
        )
