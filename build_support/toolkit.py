"""Where the CUDA toolkit lies, and whether to build with it."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path

DEFAULT_ARCHES = "8.0;9.0a"


class BuildError(RuntimeError):
    """The build was asked for something that this machine cannot do."""


def is_toolkit(home: Path) -> bool:
    """A folder with a compiler and the headers; a wrapper script's folder is none."""
    return (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file()


def find_toolkit(
    environ: Mapping[str, str] = os.environ, site_packages: Path | None = None
) -> Path | None:
    """The toolkit by CUDA_HOME, then by the `nvcc` on PATH, then by the wheels from PyPI.

    Raises BuildError if CUDA_HOME is set but holds no toolkit: a typing error must not quietly
    give a build with another one.
    """
    if home := environ.get("CUDA_HOME"):
        if not is_toolkit(Path(home)):
            raise BuildError(
                f"CUDA_HOME is {home}, must be a folder with bin/nvcc and include/cuda_runtime.h"
            )
        return Path(home)
    if nvcc := shutil.which("nvcc", path=environ.get("PATH", "")):
        home = Path(nvcc).resolve().parent.parent
        if is_toolkit(home):
            return home
    site_packages = site_packages or Path(sysconfig.get_paths()["purelib"])
    # nvidia-cuda-nvcc and its companions for CUDA 13 share a folder; those for 12 have one each.
    for home in sorted(site_packages.glob("nvidia/cu[0-9]*"), reverse=True):
        if is_toolkit(home):
            return home
    home = site_packages / "nvidia" / "cuda_nvcc"
    return home if is_toolkit(home) else None


def runtime_folder(home: Path, scratch: Path) -> Path:
    """A folder with the `libcudart.so` that the linker asks for.

    The wheels have the library under its full name only; then `scratch` gets a link to it. Raises
    BuildError if the toolkit has none.
    """
    for folder in (home / "lib64", home / "lib"):
        if (folder / "libcudart.so").exists():
            return folder
        for library in sorted(folder.glob("libcudart.so.*")):
            scratch.mkdir(parents=True, exist_ok=True)
            link = scratch / "libcudart.so"
            link.unlink(missing_ok=True)
            link.symlink_to(library)
            return scratch
    raise BuildError(f"{home} has no lib64/libcudart.so, nor one in lib")


def use_cuda(
    torch_cuda: str | None,
    has_sources: bool,
    toolkit: Path | None,
    environ: Mapping[str, str] = os.environ,
) -> bool:
    """Whether to build the CUDA kernels; MAC_ATTN_CUDA=0 or 1 forces it.

    Raises BuildError if it is forced to 1 and something is missing, naming what.
    """
    wish = environ.get("MAC_ATTN_CUDA", "")
    if wish not in ("", "0", "1"):
        raise BuildError(f"MAC_ATTN_CUDA is {wish!r}, must be 0 or 1, or not set")
    missing = []
    if torch_cuda is None:
        missing.append("the installed torch is a CPU build")
    if toolkit is None:
        missing.append("no CUDA toolkit by CUDA_HOME, nvcc on PATH or the nvidia-cuda-nvcc wheel")
    if not has_sources:
        missing.append("there are no sources in csrc/cuda")
    if wish == "1" and missing:
        raise BuildError("MAC_ATTN_CUDA=1, but " + " and ".join(missing))
    return wish != "0" and not missing
