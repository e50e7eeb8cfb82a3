"""The requests behind the rows of a batch, from vLLM's model runners.

Both runners keep a table of requests. Version 1 knows the request of every row at the time when
attention metadata is built; version 2 has it in a batch that it hands to the state of its model,
whose `prepare_attn` builds the metadata. `watch_batches` has it remembered meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from ..serving.slots import Row


def watch_batches(runner: Any) -> None:
    """Have a runner of version 2 remember whose rows a batch has, while metadata is built for it.

    That is read off the batch, whatever the model: the metadata of those with Mamba layers does not
    say it.
    """
    state = getattr(runner, "model_state", None)
    if state is None:
        return
    runner.mac_request_ids = []
    inner = state.prepare_attn

    def prepare_attn(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        runner.mac_request_ids = input_batch.req_ids  # names that nobody has, if it is a dummy
        try:
            return inner(input_batch, *args, **kwargs)
        finally:
            runner.mac_request_ids = []

    state.prepare_attn = prepare_attn


def rows_of(runner: Any, common: Any) -> list[Row | None]:
    """The request of every row of a batch; None for padding and dummy rows.

    Args:
        runner: the worker's model runner, `GPUModelRunner` or one derived from it, of version 1
            or 2, that one watched.
        common: the CommonAttentionMetadata of the batch. Where drafts are verified and steps are
            scheduled ahead (asynchronously), its lengths on the host count the drafts of the step
            before as if all had been accepted; else they are exact.
    """
    starts = common.query_start_loc_cpu.tolist()
    ends = common.seq_lens_cpu_upper_bound.tolist()
    found = _rows_v2(runner) if hasattr(runner, "req_states") else _rows_v1(runner)
    rows: list[Row | None] = []
    for row in range(common.num_reqs):
        length = starts[row + 1] - starts[row]
        if row >= len(found) or length <= 0 or (known := found[row]) is None:
            rows.append(None)
            continue
        key, total = known
        rows.append(Row(key, ends[row] - length, ends[row], total))
    return rows


def is_alive(runner: Any) -> Callable[[Hashable], bool]:
    """Whether a request that `rows_of` named is still one of the engine's."""
    if hasattr(runner, "req_states"):
        return lambda key: key in runner.req_states.req_id_to_index
    # An object, since a client may use the name of a request again.
    alive = {id(request) for request in runner.requests.values()}
    return lambda key: isinstance(key, ById) and id(key.value) in alive


class ById:
    """A dictionary key for an object itself, whatever it compares equal to; keeps it alive."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ById) and other.value is self.value


def _rows_v1(runner: Any) -> list[tuple[Hashable, int] | None]:
    batch = runner.input_batch
    found: list[tuple[Hashable, int] | None] = []
    for row, request_id in enumerate(batch.req_ids):
        request = runner.requests.get(request_id)
        known = None if request is None else (ById(request), int(batch.num_tokens_no_spec[row]))
        found.append(known)
    return found


def _rows_v2(runner: Any) -> list[tuple[Hashable, int] | None]:
    states = runner.req_states
    found: list[tuple[Hashable, int] | None] = []
    for request_id in runner.mac_request_ids:
        index = states.req_id_to_index.get(request_id)
        known = None if index is None else (request_id, int(states.prefill_len.np[index]))
        found.append(known)
    return found
