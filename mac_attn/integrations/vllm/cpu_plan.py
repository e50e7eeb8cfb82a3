"""What a step on the CPU consists of, prepared once for all layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .slots import Place, Row


@dataclass(frozen=True)
class DecodePart:
    """Rows of one call of `mac_attn.decode`: those with ring slots, or those without.

    Attributes:
        count: how many.
        rows: [count] int64, which of the batch; None is the first `count`.
        block_table, seq_lens: theirs.
        slots, request_ids: theirs, None where they are attended exactly.
    """

    count: int
    rows: Tensor | None
    block_table: Tensor
    seq_lens: Tensor
    slots: Tensor | None = None
    request_ids: Tensor | None = None


@dataclass(frozen=True)
class Prefill:
    """The rows in prefill, on a scratch cache in the layout of vLLM's kernels.

    Attributes:
        tokens: first and last + 1 of their tokens in the batch.
        metadata: vLLM's, of these rows alone, with the scratch cache's block table.
        pages, places: [context tokens] int64, where each token of these requests is in the KV cache.
        slot_mapping: [context tokens] int64, where it goes in the scratch cache.
        num_blocks: of the scratch cache.
    """

    tokens: tuple[int, int]
    metadata: Any
    pages: Tensor
    places: Tensor
    slot_mapping: Tensor
    num_blocks: int


@dataclass(frozen=True)
class Seed:
    """The last prompt tokens of one request, for `mac_attn.seed`: [first, last) of the batch."""

    first: int
    last: int
    block_table: Tensor
    seq_lens: Tensor
    slots: Tensor
    request_ids: Tensor


@dataclass(frozen=True)
class CpuPlan:
    """Calls of decode, the prefill, and then what is seeded."""

    decode: list[DecodePart]
    prefill: Prefill | None
    seeds: list[Seed]


def plan_step(engine: Any, common: Any, block_size: int, build: Callable[[Any], Any]) -> CpuPlan:
    """Plan a step.

    Args:
        engine: the worker's `Engine`.
        common: CommonAttentionMetadata, the rows that compute one token first.
        block_size: tokens per page.
        build: makes vLLM's metadata of a CommonAttentionMetadata.
    """
    rows = engine.rows(common)
    places = engine.place(rows)
    starts = common.query_start_loc_cpu.tolist()
    num_decodes = next(
        (row for row in range(common.num_reqs) if starts[row + 1] - starts[row] != 1),
        common.num_reqs,
    )
    prefill = None
    if num_decodes < common.num_reqs:
        prefill = _prefill(common, num_decodes, starts, block_size, build)
    return CpuPlan(
        _decode_parts(common, places[:num_decodes]),
        prefill,
        _seeds(engine, common, rows, places, num_decodes, starts),
    )


def _decode_parts(common: Any, places: Sequence[Place | None]) -> list[DecodePart]:
    with_slot = [row for row, place in enumerate(places) if place is not None]
    without = [row for row, place in enumerate(places) if place is None]
    parts = []
    for some in (with_slot, without):
        if not some:
            continue
        rows = None if len(some) == len(places) else torch.tensor(some)
        select = slice(len(some)) if rows is None else rows
        slots = ids = None
        if some is with_slot:
            kept = [place for place in places if place is not None]
            slots = torch.tensor([place.slot for place in kept], dtype=torch.int32)
            ids = torch.tensor([place.number for place in kept])
        parts.append(
            DecodePart(
                len(some),
                rows,
                common.block_table_tensor[select],
                common.seq_lens[select],
                slots,
                ids,
            )
        )
    return parts


def _prefill(
    common: Any, first: int, starts: list[int], block_size: int, build: Callable[[Any], Any]
) -> Prefill:
    lens = common.seq_lens[first:].tolist()
    needed = [-(-n // block_size) for n in lens]
    table = torch.zeros((len(lens), max(needed, default=0)), dtype=torch.int32)
    pages, places, slots = [], [], []
    used = 0
    for row, (n, count) in enumerate(zip(lens, needed, strict=True)):
        table[row, :count] = torch.arange(used, used + count)
        token = torch.arange(n)
        pages.append(common.block_table_tensor[first + row][token // block_size].long())
        places.append(token % block_size)
        slots.append(used * block_size + token)
        used += count
    begin, end = starts[first], starts[-1]
    slot_mapping = torch.cat(slots)
    part = common.replace(
        query_start_loc=common.query_start_loc[first:] - begin,
        query_start_loc_cpu=common.query_start_loc_cpu[first:] - begin,
        seq_lens=common.seq_lens[first:],
        num_reqs=common.num_reqs - first,
        num_actual_tokens=end - begin,
        block_table_tensor=table,
        slot_mapping=slot_mapping,
        max_seq_len=max(lens),
    )
    return Prefill(
        (begin, end), build(part), torch.cat(pages), torch.cat(places), slot_mapping, used
    )


def _seeds(
    engine: Any,
    common: Any,
    rows: Sequence[Row | None],
    places: Sequence[Place | None],
    first: int,
    starts: list[int],
) -> list[Seed]:
    seeds = []
    for row in range(first, common.num_reqs):
        request, place = rows[row], places[row]
        if request is None or place is None or (length := engine.seeded(request)) == 0:
            continue
        seeds.append(
            Seed(
                starts[row + 1] - length,
                starts[row + 1],
                common.block_table_tensor[row : row + 1],
                common.seq_lens[row : row + 1],
                torch.tensor([place.slot], dtype=torch.int32),
                torch.tensor([place.number]),
            )
        )
    return seeds
