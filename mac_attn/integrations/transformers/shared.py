"""What the layers of one MacCache have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from .layout import RequestLayout
from .support import Refusal

if TYPE_CHECKING:
    from .layer import MacLayer
    from .rings import Rings

logger = logging.getLogger(__name__)

Mode = Literal["reuse", "draft", "verify", "exact", "sdpa", "packed-sdpa"]
WITH_RINGS: tuple[Mode, ...] = ("reuse", "draft", "verify")


class Shared:
    """What the layers of one MacCache have in common."""

    def __init__(
        self, max_length: int, batch_size: int | None, mode: Mode, float8: bool = False
    ) -> None:
        self.max_length = max_length
        self.float8 = float8  # full layers keep keys and values as float8_e4m3fn
        self.batch_size = batch_size
        self.mode: Mode = mode
        self.layout = RequestLayout(max_length)
        self.layers: list[MacLayer] = []  # those that hold keys and values
        self.sharing: dict[int, Rings] = {}  # of those that attend to another layer's, by index
        self.length = 0  # of every layer before the current forward
        self.record: Callable[[int, Tensor], None] | None = None  # see rotation.py
        self.warned: set[str] = set()

    def begin(self) -> None:
        """A forward begins: all layers must have come to the same length."""
        lengths = {layer.length for layer in self.layers}
        if len(lengths) > 1:
            raise Refusal(
                "a forward was interrupted and left the layers of this MacCache with different "
                "lengths; call reset() and prefill again"
            )
        (self.length,) = lengths
        if self.length:
            self.warn_of_strangers()

    def roll_back(self) -> None:
        """Make it as if the current forward had not begun."""
        for layer in self.layers:
            layer.shorten(self.length)

    def warn_of_strangers(self) -> None:
        """Say once which layers were attended without mac_attn in the forward that has ended."""
        reasons: dict[str, list[int]] = {}
        for layer in self.layers:
            if layer.stranger is not None:
                if layer.is_float8:
                    raise Refusal(
                        f"layer {layer.index} cannot have kv_dtype=torch.float8_e4m3fn, as "
                        f"{layer.stranger}; leave it out"
                    )
                reasons.setdefault(layer.stranger, []).append(layer.index)
        for reason, indices in reasons.items():
            if reason not in self.warned:
                self.warned.add(reason)
                logger.warning(
                    "%s of %d layers are left to SDPA, and save nothing: %s (layers %s)",
                    len(indices),
                    len(self.layers),
                    reason,
                    ", ".join(map(str, indices)),
                )
