"""What the environment variables MAC_ATTN_VLLM* say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..serving import options
from ..serving.options import number

PREFIX = "MAC_ATTN_VLLM"


@dataclass(frozen=True)
class Options(options.Options):
    """Options of the plugin, checked when read; see its base class too.

    Attributes:
        seed: of this many last prompt tokens ring entries are made in prefill; 0 is none.
    """

    seed: int = 0

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Options | None:
        """The options that the environment gives, or None where the plugin is off.

        Raises ValueError, naming the variable, for a value that does not fit.
        """
        switch = env.get(PREFIX, "").strip().lower()
        if switch in ("", "0", "false", "off"):
            return None
        if switch not in ("1", "true", "on"):
            raise ValueError(f"{PREFIX} is {switch!r}, must be 1 or 0")
        seed = int(number(env, f"{PREFIX}_SEED", cls.seed, low=0, whole=True))
        return replace(cls.read(env, PREFIX), seed=seed)
