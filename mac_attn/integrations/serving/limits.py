"""What `mac_attn.decode` does not have on a device; None where it has it."""

from __future__ import annotations

import torch

from mac_attn.info import info


def device_reason(device_type: str) -> str | None:
    """What keeps a kind of device from being served."""
    if device_type not in ("cpu", "cuda") or torch.version.hip:
        return f"a device of type {device_type}"
    if device_type == "cuda" and not info()["cuda_arches"]:
        return "a GPU, as mac_attn was built without CUDA,"
    return None


def heads_reason(
    head_dim: int, dtype: torch.dtype, device_type: str, float8: bool = False
) -> str | None:
    """What keeps heads of this size and dtype from being served there, with a cache of float8."""
    cuda = device_type != "cpu"
    step = 16 if cuda and float8 else 8
    if head_dim % step or (head_dim > 256 and head_dim != 512):
        return f"heads of {head_dim}"
    if cuda and dtype == torch.float32:
        return f"dtype {dtype}"
    return None
