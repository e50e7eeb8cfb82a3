"""What environment variables say that all plugins have, each under the prefix of its engine."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from mac_attn import ReuseConfig
from mac_attn.calibrate import Calibration

Own = TypeVar("Own", bound="Options")


@dataclass(frozen=True)
class Options:
    """Options of a plugin, checked when read.

    Attributes:
        config: what to reuse when, in every layer that `calibration` does not set.
        calibration: of `mac_attn.calibrate`, with options for each layer, or None.
        num_slots: requests that have rings at a time; those beyond them decode exactly. None is as
            many as `share` holds.
        share: of the memory that the engine gives its KV cache, how much the rings take.
        log_seconds: shortest time between two lines of statistics in the log; 0 is none.
        source: the variable that `config` or `calibration` comes from.
    """

    config: ReuseConfig = ReuseConfig()
    calibration: Calibration | None = None
    num_slots: int | None = None
    share: float = 0.1
    log_seconds: float = 10.0
    source: str = field(default="config", compare=False)

    def layer_config(self, layer: int, num_qo_heads: int, rank: int, ranks: int) -> ReuseConfig:
        """The options of reuse of one layer, counted from 0, for the heads that a rank has.

        Args:
            layer: which.
            num_qo_heads: query heads of the layer on this rank.
            rank, ranks: which of how many ranks that split the heads, in order.

        Raises ValueError, naming the variable, if they are not for such a layer.
        """
        heads = num_qo_heads * ranks
        try:
            config = self.config if self.calibration is None else self.calibration.config(layer)
            config.threshold_per_head(heads, head_dim=1)
        except ValueError as error:
            raise ValueError(
                f"{self.source} is not for layer {layer}, of {heads} query heads: {error}"
            ) from error
        if not isinstance(config.threshold, tuple) or len(config.threshold) == 1:
            return config
        first = rank * num_qo_heads
        return replace(config, threshold=config.threshold[first : first + num_qo_heads])

    @classmethod
    def read(cls: type[Own], env: Mapping[str, str], prefix: str) -> Own:
        """The options that the variables `{prefix}_*` give, the default for those that are not set.

        Raises ValueError, naming the variable, for a value that does not fit.
        """
        config, calibration = f"{prefix}_CONFIG", f"{prefix}_CALIBRATION"
        if env.get(calibration) and env.get(config):
            raise ValueError(f"{config} and {calibration} are both set, must be one or neither")
        slots, share = f"{prefix}_SLOTS", f"{prefix}_SHARE"
        if env.get(slots) and env.get(share):
            raise ValueError(f"{slots} and {share} are both set, must be one or neither")
        return cls(
            config=_config(config, env.get(config, "")),
            calibration=_calibration(calibration, env.get(calibration, "")),
            num_slots=int(number(env, slots, 1, low=1, whole=True)) if env.get(slots) else None,
            share=number(env, share, cls.share, low=0.001, high=1),
            log_seconds=number(env, f"{prefix}_LOG_SECONDS", cls.log_seconds, low=0),
            source=calibration if env.get(calibration) else config,
        )


def number(
    env: Mapping[str, str],
    name: str,
    default: float,
    *,
    low: float,
    high: float = sys.float_info.max,
    whole: bool = False,
) -> float:
    """The number that a variable holds. Raises ValueError, naming it, for what is none."""
    text = env.get(name, "").strip()
    if not text:
        return default
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        kind = "an integer" if whole else "a number"
        limits = f"of at least {low:g}" if high > 1 else f"from {low:g} to {high:g}"
        raise ValueError(f"{name} is {text!r}, must be {kind} {limits}")
    return value


def _config(name: str, text: str) -> ReuseConfig:
    if not text.strip():
        return ReuseConfig()
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is {text!r}, must be a JSON object: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{name} is {text!r}, must be a JSON object of ReuseConfig's options")
    try:
        return ReuseConfig(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {text!r}: {error}") from error


def _calibration(name: str, path: str) -> Calibration | None:
    if not path:
        return None
    if not Path(path).is_file():
        raise ValueError(f"{name} is {path!r}, must be a file")
    try:
        return Calibration.load(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} is {path!r}: {error}") from error
