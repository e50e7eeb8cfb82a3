"""What a step on a GPU consists of, prepared once for all layers.

A step of decode alone, in which every row has as many tokens, may be the replay of a CUDA graph:
the kernels were recorded for a number of rows and read slots, request ids and lengths from buffers
that stay where they are; a row that has no ring has no slot there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..serving.rows import Buffers, Rows
from .attend import Seed, plan_seeds
from .decodes import Decode, count_decodes, plan_decodes

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(frozen=True)
class Prefill:
    """The rows in prefill: their tokens of the batch, and vLLM's metadata of these rows alone."""

    tokens: slice
    metadata: Any


@dataclass(frozen=True)
class CudaPlan:
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
    engine: Engine, leads: bool, common: Any, buffers: Buffers, build: Callable[[Any], Any]
) -> CudaPlan:
    """Plan a step. Its rows may be padded; the buffers are written for all.

    Args:
        engine: the worker's.
        leads: see `Engine.place`.
        common: CommonAttentionMetadata, the rows of decode first.
        buffers: written.
        build: makes vLLM's metadata of a CommonAttentionMetadata.
    """
    requests = engine.rows(common)
    places = engine.place(requests, leads)
    starts = common.query_start_loc_cpu.tolist()
    num_decodes = count_decodes(starts, engine.query_tokens)
    is_prefill = starts[-1] > starts[num_decodes]  # else the rows that are left are padding
    buffers.fill(places, common.seq_lens[: common.num_reqs])
    rows = buffers.rows(common.block_table_tensor[: common.num_reqs])
    decode = rows.some(slice(num_decodes))
    if not any(places[:num_decodes]):
        decode = Rows(decode.block_table, decode.seq_lens)
    return CudaPlan(
        plan_decodes(decode, starts[: num_decodes + 1], engine.batch_invariant),
        _prefill(common, num_decodes, starts, build) if is_prefill else None,
        plan_seeds(engine, requests, places, starts, rows),
    )


def plan_capture(common: Any, buffers: Buffers) -> CudaPlan:
    """The plan that a graph of `num_reqs` rows of decode is recorded with, all as many tokens."""
    rows = common.num_reqs
    buffers.fill([None] * rows, common.seq_lens[:rows])
    starts = [row * common.max_query_len for row in range(rows + 1)]
    decode = buffers.rows(common.block_table_tensor[:rows])
    return CudaPlan(plan_decodes(decode, starts, batch_invariant=False), None, [])  # one call


def _prefill(common: Any, first: int, starts: list[int], build: Callable[[Any], Any]) -> Prefill:
    # Padded rows at the end have no tokens.
    last = next(row for row in range(common.num_reqs, 0, -1) if starts[row] != starts[row - 1])
    tokens = slice(starts[first], starts[last])
    part = common.replace(
        query_start_loc=common.query_start_loc[first : last + 1] - tokens.start,
        query_start_loc_cpu=common.query_start_loc_cpu[first : last + 1] - tokens.start,
        seq_lens=common.seq_lens[first:last],
        seq_lens_cpu_upper_bound=common.seq_lens_cpu_upper_bound[first:last],
        num_reqs=last - first,
        num_actual_tokens=tokens.stop - tokens.start,
        block_table_tensor=common.block_table_tensor[first:last],
        slot_mapping=common.slot_mapping[tokens],
    )
    return Prefill(tokens, build(part))
