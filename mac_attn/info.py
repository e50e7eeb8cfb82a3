"""`python -m mac_attn.info`: what was built and what it runs on."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence

import torch

from . import _C


def info() -> dict[str, object]:
    """Version, compiler, SIMD level and CUDA architectures of the build; Python, torch, GPU."""
    build = _C.build_info()
    return {
        "mac_attn": build["version"],
        "compiler": build["compiler"],
        "simd": build["simd"],
        "threads": build["threads"],
        "cuda_arches": build["cuda_arches"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mac_attn.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="machine-readable")
    values = info()
    if parser.parse_args(argv).json:
        print(json.dumps(values))
        return
    for name, value in values.items():
        text = ", ".join(value) if isinstance(value, list) else value
        print(f"{name:12} {text or 'none'}")


if __name__ == "__main__":
    main()
