"""Builds the extension whose CPU ops are the CUDA kernels on the host execution (tests/simt)."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[3]
SIMT = ROOT / "tests" / "simt"
FOLDER = ROOT / "build" / "simt-torch"


def load_as_c() -> ModuleType:
    """Build it if needed and make it `mac_attn._C`; call this before mac_attn is imported."""
    from torch.utils.cpp_extension import load

    assert "mac_attn" not in sys.modules, "too late: mac_attn has its ops already"
    FOLDER.mkdir(parents=True, exist_ok=True)
    names = ("fiber", "fiber_scheduler", "launch", "machine", "shared_memory", "thread_scheduler")
    module = load(
        "_C",
        [
            str(path)
            for path in (
                ROOT / "csrc" / "ops.cpp",
                ROOT / "csrc" / "describe.cpp",
                ROOT / "csrc" / "python_tensor.cpp",
                ROOT / "csrc" / "unrotate.cpp",
                ROOT / "csrc" / "backend_cuda.cpp",
                SIMT / "torch" / "glue.cpp",
                SIMT / "launch_bf16.cpp",
                SIMT / "launch_bf16_fp8.cpp",
                *(SIMT / f"{name}.cpp" for name in names),
            )
        ],
        extra_include_paths=[
            str(folder)
            for folder in (
                SIMT / "torch",
                SIMT,
                SIMT / "no_toolkit",
                ROOT / "csrc",
                ROOT / "csrc/cuda",
            )
        ],
        extra_cflags=[
            "-O1",
            "-Wno-unknown-pragmas",
            "-DMAC_SIMT",
            "-DMAC_ATTN_WITH_CUDA",
            '-DMAC_ATTN_VERSION=\\"simt\\"',
            '-DMAC_ATTN_TORCH=\\"simt\\"',
            '-DMAC_ATTN_CUDA_ARCHES=\\"9.0+PTX\\"',
        ],
        extra_ldflags=["-ldl", "-pthread"],
        build_directory=str(FOLDER),
    )
    sys.modules["mac_attn._C"] = module
    return module


if __name__ == "__main__":
    load_as_c()
