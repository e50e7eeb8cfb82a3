"""What `mac_attn.decode` does not have on a device; None where it has it."""

from __future__ import annotations

import torch

from mac_attn.info import info

_CUDA_HEAD_SIZES = (64, 80, 96, 128, 256)


def device_reason(device_type: str) -> str | None:
    """What keeps a kind of device from being served."""
    if device_type not in ("cpu", "cuda") or torch.version.hip:
        return f"a device of type {device_type}"
    if device_type == "cuda" and not info()["cuda_arches"]:
        return "a GPU, as mac_attn was built without CUDA,"
    return None


def heads_reason(head_dim: int, dtype: torch.dtype, device_type: str) -> str | None:
    """What keeps heads of this size and dtype from being served there."""
    cuda = device_type != "cpu"
    on_cpu = head_dim % 8 == 0 and (head_dim <= 256 or head_dim == 512)
    has = head_dim in _CUDA_HEAD_SIZES if cuda else on_cpu
    if not has:
        return f"heads of {head_dim}"
    if cuda and dtype == torch.float32:
        return f"dtype {dtype}"
    return None
