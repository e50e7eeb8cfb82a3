"""The entry point: what vLLM calls in each of its processes before it does anything else."""

from __future__ import annotations

import os

from .options import Options

_registered = False


def register() -> None:
    """Put the backends of this package in the place of vLLM's, if MAC_ATTN_VLLM is 1.

    If it is "custom", the one for GPUs becomes vLLM's backend CUSTOM instead, for its command line
    to choose. vLLM may call it several times in a process.

    Raises:
        ValueError: a variable MAC_ATTN_VLLM* has a value that does not fit.
    """
    global _registered
    options = Options.from_env(os.environ)
    if options is None or _registered:
        return
    _registered = True

    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from . import metrics
    from .worker import watch_workers

    # By name: a backend is imported when vLLM chooses it, and needs what its platform has.
    flash = f"{__package__}.cuda.MacFlashBackend"
    if options.by_name:
        register_backend(AttentionBackendEnum.CUSTOM, flash)
    else:
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__package__}.cpu.MacCpuBackend")
        register_backend(AttentionBackendEnum.FLASH_ATTN, flash)
    watch_workers(options)
    metrics.register_collector()
