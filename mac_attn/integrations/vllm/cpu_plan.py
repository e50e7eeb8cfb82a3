"""What a step on the CPU consists of, prepared once for all layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..serving.rows import Rows
from ..serving.slots import Place
from .attend import Seed, plan_seeds
from .decodes import Decode, count_decodes, plan_decodes

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(frozen=True)
class Prefill:
    """The rows in prefill, on a scratch cache in the layout of vLLM's kernels.

    Attributes:
        tokens: which of the batch are theirs.
        metadata: vLLM's, of these rows alone, with the scratch cache's block table.
        pages, places: [context tokens] int64, where each token of these requests is in the cache.
        slot_mapping: [context tokens] int64, where it goes in the scratch cache.
        num_blocks: of the scratch cache.
    """

    tokens: slice
    metadata: Any
    pages: Tensor
    places: Tensor
    slot_mapping: Tensor
    num_blocks: int


@dataclass(frozen=True)
class CpuPlan:
    """The calls of a step.

    Attributes:
        decodes: of the rows, from the first on, that compute no more tokens than decode takes.
        prefill: all other rows.
        seeds: what is seeded after it.
    """

    decodes: list[Decode]
    prefill: Prefill | None
    seeds: list[Seed]


def plan_step(
    engine: Engine, leads: bool, common: Any, block_size: int, build: Callable[[Any], Any]
) -> CpuPlan:
    """Plan a step.

    Args:
        engine: the worker's.
        leads: see `Engine.place`.
        common: CommonAttentionMetadata, the rows of decode first.
        block_size: tokens per page.
        build: makes vLLM's metadata of a CommonAttentionMetadata.
    """
    requests = engine.rows(common)
    places = engine.place(requests, leads)
    starts = common.query_start_loc_cpu.tolist()
    num_decodes = count_decodes(starts, engine.query_tokens)
    prefill = None
    if num_decodes < common.num_reqs:
        prefill = _prefill(common, num_decodes, starts, block_size, build)
    rows = _rows(common, places)
    decode = rows.some(slice(num_decodes))
    if not any(places[:num_decodes]):
        decode = Rows(decode.block_table, decode.seq_lens)
    return CpuPlan(
        plan_decodes(decode, starts[: num_decodes + 1], engine.batch_invariant),
        prefill,
        plan_seeds(engine, requests, places, starts, rows),
    )


def _rows(common: Any, places: Sequence[Place | None]) -> Rows:
    slots = [place.slot if place else -1 for place in places]
    ids = [place.number if place else 0 for place in places]
    return Rows(
        common.block_table_tensor[: len(places)],
        common.seq_lens[: len(places)],
        torch.tensor(slots, dtype=torch.int32),
        torch.tensor(ids, dtype=torch.int64),
    )


def _prefill(
    common: Any, first: int, starts: list[int], block_size: int, build: Callable[[Any], Any]
) -> Prefill:
    lens = common.seq_lens[first:].tolist()
    blocks = [-(-n // block_size) for n in lens]
    table = torch.zeros((len(lens), max(blocks)), dtype=torch.int32)
    pages, places, slots = [], [], []
    used = 0
    for row, (n, count) in enumerate(zip(lens, blocks, strict=True)):
        table[row, :count] = torch.arange(used, used + count)
        token = torch.arange(n)
        pages.append(common.block_table_tensor[first + row][token // block_size].long())
        places.append(token % block_size)
        slots.append(used * block_size + token)
        used += count
    tokens = slice(starts[first], starts[-1])
    slot_mapping = torch.cat(slots)
    part = common.replace(
        query_start_loc=common.query_start_loc[first:] - tokens.start,
        query_start_loc_cpu=common.query_start_loc_cpu[first:] - tokens.start,
        seq_lens=common.seq_lens[first:],
        num_reqs=common.num_reqs - first,
        num_actual_tokens=tokens.stop - tokens.start,
        block_table_tensor=table,
        slot_mapping=slot_mapping,
        max_seq_len=max(lens),
    )
    return Prefill(tokens, build(part), torch.cat(pages), torch.cat(places), slot_mapping, used)
