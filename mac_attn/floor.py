"""The least memory traffic of a decode step: what no kernel that computes this step can avoid.

Every byte is counted once, as if what has been read stayed on the chip for the rest of the step.
Time over `Floor.total_bytes / bandwidth` tells how far a kernel is from the limit of its machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ._checks import check_heads
from .config import ReuseConfig

_INT32, _INT64, _FLOAT32 = 4, 8, 4
_MISS = -1
_COUNTERS = 8  # mac_attn.stats.COUNTERS, int64 each


@dataclass(frozen=True)
class Floor:
    """Bytes and floating-point operations of one decode step, summed over its requests.

    Attributes:
        kv_bytes: K and V rows of [s, n), once per KV head, from the earliest start s of its query
            heads on (s = E(c) = c + 1 - band for a hit on the entry of position c, else 0).
        anchor_bytes: K and V rows of the anchors of hits, their positions and weights.
        block_table_bytes: entries for the pages of the longest [s, n) of each request.
        ring_query_bytes: stored queries that match cannot decide without, and their tags: the first
            head of every candidate with group decisions, all heads with decisions per head.
        ring_query_bytes_max: the same if no candidate is left early: all heads.
        state_read_bytes: reused states: mean of values, log-sum-exp and depth of every hit, with
            anchors the entry's query after its rotation, too.
        state_write_bytes: the new entries, and the history and counters of the slots.
        query_bytes: q, q_match, out and its log-sum-exp.
        flops: logits and weighted values, 2 * (head_dim + head_dim_v) for every query head and
            token, and the squared distances of match, 3 * head_dim for every stored query it looks
            at. A hit's anchors are attended by the entry's query, too.
    """

    kv_bytes: int
    anchor_bytes: int
    block_table_bytes: int
    ring_query_bytes: int
    ring_query_bytes_max: int
    state_read_bytes: int
    state_write_bytes: int
    query_bytes: int
    flops: int

    @property
    def total_bytes(self) -> int:
        """All parts, with the lower figure for match."""
        return (
            self.kv_bytes
            + self.anchor_bytes
            + self.block_table_bytes
            + self.ring_query_bytes
            + self.state_read_bytes
            + self.state_write_bytes
            + self.query_bytes
        )

    @property
    def total_bytes_max(self) -> int:
        """All parts, with the upper figure for match."""
        return self.total_bytes - self.ring_query_bytes + self.ring_query_bytes_max


def step_floor(
    seq_lens: Sequence[int],
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    itemsize: int,
    page_size: int,
    kv_itemsize: int | None = None,
    head_dim_v: int | None = None,
    cfg: ReuseConfig | None = None,
    sources: Sequence[Sequence[int]] | None = None,
) -> Floor:
    """The floor of one decode step.

    Args:
        seq_lens: [B] tokens of each request, the current one included; 0 is a padding row.
        num_qo_heads, num_kv_heads, head_dim: of the model.
        itemsize: bytes of an element of the queries.
        page_size: tokens per page.
        kv_itemsize: bytes of an element of the KV cache; None is `itemsize`.
        head_dim_v: elements of a value; None is `head_dim`.
        cfg: the options of reuse; None is exact decode.
        sources: `[B][num_qo_heads]`, with `cfg`: the position of the entry that a query head
            reuses, or -1 for a miss, as `mac_attn.match` answers. Rings count as full, of entries
            within the window, and those of hits as full of anchors; a new entry is stored where it
            may be reused.

    Raises:
        ValueError: the numbers of rows or heads do not fit one another.
    """
    group_size = check_heads(num_qo_heads, num_kv_heads)
    if (cfg is None) != (sources is None):
        raise ValueError("cfg and sources: one is None, must be given both or neither")
    if sources is None:
        sources = [[_MISS] * num_qo_heads for _ in seq_lens]
    if len(sources) != len(seq_lens):
        raise ValueError(f"sources has {len(sources)} rows, must have {len(seq_lens)} as seq_lens")

    values = head_dim if head_dim_v is None else head_dim_v
    row, out_row = head_dim * itemsize, values * itemsize  # bytes of one query and output of a head
    pair = head_dim + values  # elements of a key and its value
    kv_pair = pair * (itemsize if kv_itemsize is None else kv_itemsize)
    state = values * _FLOAT32 + _FLOAT32 + _INT32  # mean of values, log-sum-exp, depth
    kv = anchors = table = ring = ring_max = states_read = states_write = queries = flops = 0
    for n, source in zip(seq_lens, sources, strict=True):
        if len(source) != num_qo_heads:
            raise ValueError(f"sources has {len(source)} heads, must have {num_qo_heads}")
        if n == 0:
            continue
        band = cfg.band if cfg is not None else 0
        starts = [0 if c == _MISS else max(0, c + 1 - band) for c in source]
        groups = [starts[h : h + group_size] for h in range(0, num_qo_heads, group_size)]
        kv += sum(n - min(group) for group in groups) * kv_pair
        table += ((n - 1) // page_size - min(starts) // page_size + 1) * _INT32
        queries += num_qo_heads * (row + out_row + _FLOAT32)
        flops += sum(n - start for start in starts) * 2 * pair
        if cfg is None:
            continue
        # Anchors belong to a KV head, of which all heads hit or none: its first one tells.
        hits = [c for c in source[::group_size] if c != _MISS] if cfg.anchors else []
        listed = sum(sample_size(c, cfg) for c in hits)
        anchors += listed * (kv_pair + _INT32 + _FLOAT32)
        flops += listed * 2 * group_size * 2 * pair
        states_read += len(hits) * group_size * row
        stored = num_candidates(n, cfg)
        first = num_qo_heads if cfg.granularity == "head" else num_kv_heads
        # Tags belong to a KV head.
        ring += stored * (first * row + num_kv_heads * _INT32)
        ring_max += stored * (num_qo_heads * row + num_kv_heads * _INT32)
        flops += stored * first * 3 * head_dim
        states_read += sum(c != _MISS for c in source) * state
        new = stores_entry(n, source, cfg, group_size)
        entry = group_size * (row + state) + _INT32  # with its tag
        if cfg.anchors:
            entry += group_size * row + sample_size(n - 1, cfg) * (_INT32 + _FLOAT32)
        states_write += sum(new) * entry
        # slot_end and slot_request, and per KV head how many entries there are; with anchors what
        # samples are drawn by. The counters are read and written.
        states_write += _INT32 + _INT64 + num_kv_heads * _INT32 + 2 * _COUNTERS * _INT64
        if cfg.anchors:
            states_write += (num_kv_heads + num_qo_heads) * _FLOAT32
        queries += num_qo_heads * row
    return Floor(
        kv_bytes=kv,
        anchor_bytes=anchors,
        block_table_bytes=table,
        ring_query_bytes=ring,
        ring_query_bytes_max=ring_max,
        state_read_bytes=states_read,
        state_write_bytes=states_write,
        query_bytes=queries,
        flops=flops,
    )


def sample_size(position: int, cfg: ReuseConfig) -> int:
    """Most anchors of an entry of this position: a sixth of its old tokens (csrc/sample.h)."""
    return min(cfg.anchors, max(1, (position + 1 - cfg.band) // 6))


def num_candidates(seq_len: int, cfg: ReuseConfig) -> int:
    """Entries that match may choose from: of positions c with p - window <= c < p and E(c) > 0.

    With anchors only those with which a hit reads at most half of the tokens.
    """
    position = seq_len - 1
    if seq_len < max(1, cfg.min_context):
        return 0
    reach = cfg.window
    if cfg.anchors:
        reach = min(reach, seq_len // 2 - cfg.band - sample_size(position, cfg))
    oldest = max(position - reach, cfg.band)
    return max(0, min(cfg.entries, position - oldest))


def stores_entry(
    seq_len: int, source: Sequence[int], cfg: ReuseConfig, group_size: int
) -> list[bool]:
    """Whether a KV head stores the step: it has old tokens, and may be reused.

    With a depth limit above 1 that hangs on how deep the source was; a hit then counts as stored.
    """
    old = seq_len > cfg.band
    groups = (source[h : h + group_size] for h in range(0, len(source), group_size))
    if cfg.max_reuse_depth != 1:
        return [old for _ in groups]
    return [old and any(c == _MISS for c in group) for group in groups]
