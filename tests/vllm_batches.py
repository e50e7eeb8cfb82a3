"""Batches as vLLM describes them to a metadata builder, for the tests of the plugin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 16, 4


@dataclass
class Common:
    """What plans read of vLLM's CommonAttentionMetadata."""

    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    seq_lens_cpu_upper_bound: Tensor
    num_reqs: int
    num_actual_tokens: int
    block_table_tensor: Tensor
    slot_mapping: Tensor
    max_seq_len: int
    max_query_len: int

    def replace(self, **changes: Any) -> Common:
        return replace(self, **changes)


def common_metadata(query_lens: list[int], seq_lens: list[int], blocks: int = 8) -> Common:
    """A batch whose requests have so many blocks each of their own."""
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    table = torch.arange(blocks * len(lens), dtype=torch.int32).view(-1, blocks).flip(1)
    positions = [
        torch.arange(n - length, n) for n, length in zip(seq_lens, query_lens, strict=True)
    ]
    slot_mapping = [
        table[row][p // BLOCK].long() * BLOCK + p % BLOCK for row, p in enumerate(positions)
    ]
    return Common(
        starts,
        starts,
        lens,
        lens,
        len(lens),
        int(starts[-1]),
        table,
        torch.cat(slot_mapping),
        max(seq_lens),
        max(query_lens),
    )
