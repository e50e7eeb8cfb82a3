"""Measures the time spent inside the attention function of a model, step by step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_active: ContextVar[AttentionTimer | None] = ContextVar("mac_attn_attention_timer", default=None)


class AttentionTimer:
    """Sums the time inside the "mac" attention function, over all layers, while it is entered.

    What counts is the attention alone: a torch SDPA call, or `mac_attn.decode` with everything that
    it needs (match, amend, complete). Projections, rotary embedding and the write of the new token
    into the cache are outside. On a GPU CUDA events take the time, so that only `lap` synchronises.
    Attention in what torch.compile has compiled is not seen.

        with AttentionTimer() as timer:
            model(token, past_key_values=cache)
            seconds = timer.lap()
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> AttentionTimer:
        self._token = _active.set(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        _active.reset(self._token)

    def lap(self) -> float:
        """Seconds spent in attention since the last lap, or since the start."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1e3
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    @contextmanager
    def _measure(self, device: torch.device) -> Iterator[None]:
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            start_time = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start_time


@contextmanager
def measured(device: torch.device) -> Iterator[None]:
    """Let the entered timer, if there is one, measure the enclosed attention."""
    timer = None if torch.compiler.is_compiling() else _active.get()
    if timer is None:
        yield
    else:
        with timer._measure(device):
            yield
