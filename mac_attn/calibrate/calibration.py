"""The outcome of a calibration: options for every layer, as a JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mac_attn._checks import check_int
from mac_attn.config import ReuseConfig

_FORMAT = "mac_attn calibration 2"
_BEFORE = "mac_attn calibration 1"  # of the heaviest tokens as anchors, and a window of entries


@dataclass(frozen=True)
class Calibration:
    """Options for every layer of a model, and what they are expected to do.

    Attributes:
        configs: one for each layer of the model; of layers that never reuse it means nothing.
        target_error: what was asked for: the mean of |out - exact| / |exact| over layers and heads.
        error, kv_read_share: what these options did on the text of the calibration.
    """

    configs: tuple[ReuseConfig, ...]
    target_error: float
    error: float
    kv_read_share: float

    def config(self, layer: int) -> ReuseConfig:
        """The options of one layer; ValueError if there is no such layer."""
        check_int("layer", layer, low=0, high=len(self.configs) - 1)
        return self.configs[layer]

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        content = {
            "format": _FORMAT,
            "target_error": self.target_error,
            "error": self.error,
            "kv_read_share": self.kv_read_share,
            "layers": [asdict(config) for config in self.configs],
        }
        Path(path).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """What `save` wrote.

        Raises ValueError if the file is not one, is one of an earlier version, whose choices do not
        carry over, or holds options that are not valid.
        """
        try:
            content: dict[str, Any] = json.loads(Path(path).read_text())
            if content["format"] == _BEFORE:
                raise ValueError(
                    "an earlier version made it: what it chose means something else now"
                )
            if content["format"] != _FORMAT:
                raise ValueError(f"format is {content['format']!r}, must be {_FORMAT!r}")
            return cls(
                configs=tuple(ReuseConfig(**layer) for layer in content["layers"]),
                target_error=float(content["target_error"]),
                error=float(content["error"]),
                kv_read_share=float(content["kv_read_share"]),
            )
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a calibration: {error!r}") from error
