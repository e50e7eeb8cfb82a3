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
        by_name: the backend is vLLM's CUSTOM, for the command line to choose, and not in the place
            of vLLM's own.
    """

    seed: int = 0
    by_name: bool = False

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Options | None:
        """The options that the environment gives, or None where the plugin is off.

        Raises ValueError, naming the variable, for a value that does not fit.
        """
        switch = env.get(PREFIX, "").strip().lower()
        if switch in ("", "0", "false", "off"):
            return None
        if switch not in ("1", "true", "on", "custom"):
            raise ValueError(f"{PREFIX} is {switch!r}, must be 1, 0 or custom")
        seed = int(number(env, f"{PREFIX}_SEED", cls.seed, low=0, whole=True))
        return replace(cls.read(env, PREFIX), seed=seed, by_name=switch == "custom")
