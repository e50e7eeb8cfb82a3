"""The entry point: what SGLang calls in its processes before it reads the command line."""

from __future__ import annotations

import os
from typing import Any

NAME = "mac"
PREFIX = "MAC_ATTN_SGLANG"


def register() -> None:
    """Add the attention backend `mac` to those of SGLang. It does nothing until it is chosen."""
    from sglang.srt.arg_groups.choices import (
        ATTENTION_BACKEND_CHOICES,
        add_attention_backend_choices,
    )
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    if NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([NAME])
    register_attention_backend(NAME)(_create)


def _create(runner: Any) -> Any:
    """The backend of a model runner whose model is loaded and whose KV pool is made.

    Raises:
        ValueError: a variable MAC_ATTN_SGLANG* has a value that does not fit, or the backend is
            chosen for what it cannot be. Either ends the server while it starts.
    """
    from ..serving.options import Options
    from .backend import create

    return create(runner, Options.read(os.environ, PREFIX))
