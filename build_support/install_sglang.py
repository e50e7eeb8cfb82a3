"""Installs SGLang into the environment that runs this, which has its torch already.

    .venv-sglang/bin/python build_support/install_sglang.py sglang==0.5.23

The wheel of PyPI is installed without its requirements, and then those that its server for text
imports on a machine without a GPU: not the kernels for CUDA, and not torch, which is there. Then
tests/sglang_platform, with which SGLang runs on any CPU. Ends with status 1 and the reason where
the package index has no such wheel.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

# Kernels for CUDA; torch and what comes with it; what SGLang imports only when it is used.
LEFT_OUT = {
    *("cuda-python", "flash-attn-4", "flashinfer_python", "humming-kernels", "nvshmem4py-cu13"),
    *("nvidia-cutlass-dsl", "nvidia-mathdx", "nvidia-ml-py", "quack-kernels", "tilelang"),
    *("sgl-deep-ep", "sgl-deep-gemm", "sgl-flash-mla", "sglang-kernel", "kernels"),
    *("torch", "torchaudio", "torchcodec", "torchvision", "torch_memory_saver", "timm"),
    *("av", "blobfile", "datasets", "decord2", "deepseek-recipe", "llguidance", "modelscope"),
    *("outlines", "py-spy", "smg-grpc-servicer", "tml-renderers"),
}
# What it imports and gets with those.
ADDED = ["triton", "dill"]
PLATFORM = Path(__file__).parent.parent / "tests" / "sglang_platform"


def main() -> None:
    (wheel,) = sys.argv[1:]
    name = Requirement(wheel).name
    if not pip("--no-deps", "--only-binary", ":all:", wheel):
        raise SystemExit(f"the package index has no {wheel} for this Python and machine")
    needed = [Requirement(text) for text in importlib.metadata.requires(name) or []]
    chosen = [
        str(need)
        for need in needed
        if need.name not in LEFT_OUT
        and (need.marker is None or need.marker.evaluate({"extra": ""}))
    ]
    if not pip(*chosen, *ADDED):
        raise SystemExit(f"a requirement of {wheel} cannot be installed")
    if not pip("--no-build-isolation", "--no-deps", str(PLATFORM)):
        raise SystemExit(f"{PLATFORM} cannot be installed")


def pip(*arguments: str) -> bool:
    """Whether `pip install` succeeded."""
    command = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install")
    return subprocess.run((*command, *arguments), check=False).returncode == 0


if __name__ == "__main__":
    main()
