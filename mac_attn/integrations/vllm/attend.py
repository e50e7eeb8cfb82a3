"""A served layer's calls of mac_attn, the same on every device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import mac_attn

from ..serving.rows import Rows
from ..serving.slots import Place, Row
from .decodes import Decode

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(frozen=True)
class Served:
    """What the impl of a layer is given.

    Attributes:
        engine: the worker's.
        ring: the layer's.
        float8: whether its KV cache is float8_e4m3fn.
        query_quant: what vLLM's own kernel needs its queries rounded to float8 by, or None.
        batch_invariant: whether vLLM promises that a request's answer has nothing to do with others
            (VLLM_BATCH_INVARIANT).
    """

    engine: Engine
    ring: mac_attn.ReuseCache
    float8: bool = False
    query_quant: Any = None
    batch_invariant: bool = False


@dataclass(frozen=True)
class Seed:
    """The last prompt tokens of one request, for `mac_attn.seed`.

    Attributes:
        first, last: tokens [first, last) of the batch.
        rows: the request.
    """

    first: int
    last: int
    rows: Rows


def decode(layer: Any, call: Decode, query: Tensor, kv_cache: Tensor, output: Tensor) -> None:
    """Attention of the tokens of some rows.

    Args:
        layer: a served `Attention`.
        call: which rows and tokens.
        query: [tokens of the batch, num_heads, head_dim].
        kv_cache: vLLM's, [num_blocks, num_kv_heads, block_size, 2 * head_dim], key then value, in
            the query's dtype or bytes of float8_e4m3fn.
        output: as query, where it is written to.
    """
    served: Served = layer.impl.mac
    rows, q, in_place = call.rows, call.take(query), isinstance(call.tokens, slice)
    reuse: dict[str, Any] = {}
    if rows.slots is not None:
        reuse = {
            "reuse": served.ring,
            "slots": rows.slots,
            "request_ids": rows.request_ids,
            "q_match": q if served.ring.rotary is None else None,
        }
    answer = mac_attn.decode(
        q,
        pages(layer, kv_cache),
        rows.block_table,
        rows.seq_lens,
        query_lens=call.query_lens,
        out=call.take(output) if in_place else None,
        sinks=_sinks(layer.impl),
        batch_invariant=served.batch_invariant,
        **reuse,
        **_scaling(layer),
    )
    assert isinstance(answer, Tensor)  # without `return_lse`
    if not in_place:
        call.put(answer, output)


def seed(layer: Any, seeds: Sequence[Seed], query: Tensor, kv_cache: Tensor) -> None:
    """Make ring entries of the last prompt tokens, whose queries are rows of `query`."""
    served: Served = layer.impl.mac
    for one in seeds:
        q = query[None, one.first : one.last]
        mac_attn.seed(
            served.ring,
            q,
            pages(layer, kv_cache),
            one.rows.block_table,
            one.rows.seq_lens,
            slots=one.rows.slots,  # type: ignore[arg-type] # a seed has a slot
            request_ids=one.rows.request_ids,
            q_match=q if served.ring.rotary is None else None,
            **_scaling(layer),
        )


def plan_seeds(
    engine: Engine,
    requests: Sequence[Row | None],
    places: Sequence[Place | None],
    starts: Sequence[int],
    rows: Rows,
) -> list[Seed]:
    """What is seeded after a step, see `Engine.seeded`.

    Args:
        engine: the worker's.
        requests, places: of every row.
        starts: the rows' first tokens, and the end.
        rows: all of them, with their slots.
    """
    seeds = []
    for row, (request, place) in enumerate(zip(requests, places, strict=True)):
        if request is None or place is None or (length := engine.seeded(request)) == 0:
            continue
        one = rows.some(slice(row, row + 1))
        seeds.append(Seed(starts[row + 1] - length, starts[row + 1], one))
    return seeds


def parts(tokens: slice, *states: Tensor | None) -> list[Any]:
    """Of some tokens; a layer that shares the KV cache of another has no keys and values."""
    return [None if one is None else one[tokens] for one in states]


def pages(layer: Any, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of vLLM's cache; what it has as bytes as the float8 numbers they are."""
    if kv_cache.dtype == torch.uint8:
        kv_cache = kv_cache.view(torch.float8_e4m3fn)
    key, value = kv_cache.split(layer.impl.head_size, dim=-1)
    return key, value


def _sinks(impl: Any) -> Tensor | None:
    sinks: Tensor | None = getattr(impl, "sinks", None)
    return None if sinks is None else sinks.float()


def _scaling(layer: Any) -> dict[str, Any]:
    impl = layer.impl
    scaling = {
        "sm_scale": impl.scale,
        "logits_soft_cap": float(impl.logits_soft_cap),
        "kv_layout": "HND",
    }
    if impl.mac.float8:
        # Looked up in every call: vLLM may put other tensors in their place.
        scaling |= {"k_scale": layer._k_scale, "v_scale": layer._v_scale}
    return scaling
