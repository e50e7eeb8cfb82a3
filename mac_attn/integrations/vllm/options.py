"""What the environment variables MAC_ATTN_VLLM* say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mac_attn import ReuseConfig

ENABLE = "MAC_ATTN_VLLM"
CONFIG = "MAC_ATTN_VLLM_CONFIG"
CALIBRATION = "MAC_ATTN_VLLM_CALIBRATION"
SLOTS = "MAC_ATTN_VLLM_SLOTS"
SEED = "MAC_ATTN_VLLM_SEED"
LOG_SECONDS = "MAC_ATTN_VLLM_LOG_SECONDS"


@dataclass(frozen=True)
class Options:
    """Options of the plugin, checked when read.

    Attributes:
        config: what to reuse when, in every layer that `calibration` does not set.
        calibration: a file of `mac_attn.calibrate`, with options for each layer, or None.
        num_slots: requests that have rings at a time; those beyond them decode exactly.
        seed: of this many last prompt tokens ring entries are made in prefill; 0 is none.
        log_seconds: shortest time between two lines of statistics in the log; 0 is none.
    """

    config: ReuseConfig = ReuseConfig()
    calibration: Path | None = None
    num_slots: int = 16
    seed: int = 0
    log_seconds: float = 10.0

    def layer_config(self, layer: int) -> ReuseConfig:
        """The options of reuse of one layer, counted from 0."""
        if self.calibration is None:
            return self.config
        return ReuseConfig.from_calibration(self.calibration, layer)

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Options | None:
        """The options that the environment gives, or None where the plugin is off.

        Raises ValueError, naming the variable, for a value that does not fit.
        """
        switch = env.get(ENABLE, "").strip().lower()
        if switch in ("", "0", "false", "off"):
            return None
        if switch not in ("1", "true", "on"):
            raise ValueError(f"{ENABLE} is {switch!r}, must be 1 or 0")
        calibration = Path(env[CALIBRATION]) if env.get(CALIBRATION) else None
        if calibration is not None and env.get(CONFIG):
            raise ValueError(f"{CONFIG} and {CALIBRATION} are both set, must be one or neither")
        if calibration is not None and not calibration.is_file():
            raise ValueError(f"{CALIBRATION} is {str(calibration)!r}, must be a file")
        return cls(
            config=_config(env.get(CONFIG, "")),
            calibration=calibration,
            num_slots=int(_number(env, SLOTS, cls.num_slots, low=1, whole=True)),
            seed=int(_number(env, SEED, cls.seed, low=0, whole=True)),
            log_seconds=_number(env, LOG_SECONDS, cls.log_seconds, low=0),
        )


def _config(text: str) -> ReuseConfig:
    if not text.strip():
        return ReuseConfig()
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{CONFIG} is {text!r}, must be a JSON object: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{CONFIG} is {text!r}, must be a JSON object of ReuseConfig's options")
    try:
        return ReuseConfig(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{CONFIG} is {text!r}: {error}") from error


def _number(
    env: Mapping[str, str], name: str, default: float, *, low: float, whole: bool = False
) -> float:
    text = env.get(name, "").strip()
    if not text:
        return default
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        number = low - 1
    if not low <= number < float("inf"):
        kind = "an integer" if whole else "a number"
        raise ValueError(f"{name} is {text!r}, must be {kind} of at least {low:g}")
    return number
