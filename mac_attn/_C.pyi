from typing import Any

from torch import Tensor

# The ops without the boxing of torch.ops, their arguments in the order of the schemas.
def decode_exact(*args: Any) -> tuple[Tensor, Tensor]: ...
def decode_exact_into(*args: Any) -> Tensor: ...
def decode_reuse(*args: Any) -> tuple[Tensor, Tensor, Tensor]: ...
def decode_reuse_into(*args: Any) -> tuple[Tensor, Tensor]: ...
def ring_layout(
    num_kv_heads: int,
    group_size: int,
    head_dim: int,
    entries: int,
    anchors: int,
    itemsize: int,
    head_dim_v: int,
) -> tuple[dict[str, tuple[int, str, list[int], list[int]]], int]:
    """Parts of a slot of a ring: (byte offset, type, sizes, byte strides); and its bytes."""

def build_info() -> dict[str, Any]:
    """Version, CUDA architectures, SIMD level, threads, compiler."""
