"""What the layers of one MacCache have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from .layout import RequestLayout

if TYPE_CHECKING:
    from .rings import Rings

Mode = Literal["reuse", "draft", "verify", "exact", "sdpa", "packed-sdpa"]
WITH_RINGS: tuple[Mode, ...] = ("reuse", "draft", "verify")


class Shared:
    """What the layers of one MacCache know in common.

    Neither it nor anything that a layer has refers back to the layers or to their cache: a cycle
    would keep the memory of a cache that nobody has any more until Python looks for cycles.
    """

    def __init__(
        self, max_length: int, batch_size: int | None, mode: Mode, float8: bool = False
    ) -> None:
        self.max_length = max_length
        self.float8 = float8  # full layers keep keys and values as float8_e4m3fn
        self.batch_size = batch_size
        self.mode: Mode = mode
        self.layout = RequestLayout(max_length)
        self.sharing: dict[int, Rings] = {}  # of those that attend to another layer's, by index
        self.length = 0  # of every layer before the current forward
        self.record: Callable[[int, Tensor], None] | None = None  # see rotation.py
