from typing import Any

def build_info() -> dict[str, Any]:
    """Version, CUDA architectures, SIMD level, threads, compiler."""
