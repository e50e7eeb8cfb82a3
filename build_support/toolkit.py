"""What the build needs: setuptools, a CUDA toolkit, and whether to build with that."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping
from pathlib import Path

# sm_80 runs on 8.6 and 8.9 too; GPUs after sm_90 compile its PTX when they load it.
DEFAULT_ARCHES = "8.0;9.0+PTX"
WITHOUT = "MAC_ATTN_CUDA=0 builds without CUDA"
OLDEST_TORCH = (2, 9)
OLDEST_SETUPTOOLS = 77  # that knows pyproject.toml's `license = "Apache-2.0"`


class BuildError(RuntimeError):
    """The build was asked for something that this machine cannot do."""


def check_setuptools(version: str) -> None:
    """Raises BuildError for a setuptools that would call pyproject.toml invalid."""
    if int(version.partition(".")[0]) < OLDEST_SETUPTOOLS:
        raise BuildError(
            f"setuptools is {version}, must be {OLDEST_SETUPTOOLS} or later:"
            f' pip install "setuptools>={OLDEST_SETUPTOOLS}"'
        )


def check_torch(version: str) -> None:
    """Raises BuildError for a torch whose headers are older than the sources expect."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise BuildError(f"torch is {version}, must be {oldest} or later")


def version_of(home: Path) -> str | None:
    """The CUDA version that a toolkit's compiler says, such as "13.0"; None if it is no toolkit.

    A toolkit is a folder with a compiler and the headers; a wrapper script's folder is none.
    """
    nvcc = home / "bin" / "nvcc"
    if not (nvcc.is_file() and (home / "include" / "cuda_runtime.h").is_file()):
        return None
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    found = re.search(r"release (\d+\.\d+)", said.stdout)
    return found[1] if found else None


def find_toolkit(
    torch_cuda: str | None,
    environ: Mapping[str, str] = os.environ,
    site_packages: Path | None = None,
    usual: Path = Path("/usr/local"),
) -> Path | None:
    """The toolkit to build with, None if there is none.

    It is CUDA_HOME if that is set. Otherwise, of the `nvcc` on PATH, the wheels from PyPI and
    `usual`/cuda*, the first of the version that torch is built with, or else of the same major
    version, which is enough for torch.

    Args:
        torch_cuda: `torch.version.cuda`; None takes a toolkit of any version.

    Raises BuildError if CUDA_HOME is set but holds no toolkit: a typing error must not quietly
    give a build with another one. And if CUDA_HOME, PATH or the wheels have one, but none of the
    major version.
    """
    given, nvcc = environ.get("CUDA_HOME"), shutil.which("nvcc", path=environ.get("PATH", ""))
    site_packages = site_packages or Path(sysconfig.get_paths()["purelib"])
    if given:
        asked, others = [Path(given)], []
    else:
        asked = [Path(nvcc).resolve().parent.parent] if nvcc else []
        # Of wheels, nvidia-cuda-nvcc and its companions for 13 share a folder, those for 12 do not.
        asked += sorted(site_packages.glob("nvidia/cu[0-9]*"), reverse=True)
        asked += [site_packages / "nvidia" / "cuda_nvcc"]
        others = [usual / "cuda", *sorted(usual.glob("cuda-[0-9]*"), reverse=True)]
    versions = {home: version for home in asked if (version := version_of(home))}
    if given and not versions:
        raise BuildError(
            f"CUDA_HOME is {given}, must be a folder with include/cuda_runtime.h and a bin/nvcc"
            f" that runs; {WITHOUT}"
        )
    if torch_cuda is None:
        return next(iter(versions), None)
    everything = versions | {home: version for home in others if (version := version_of(home))}
    for same in (torch_cuda, torch_cuda.partition(".")[0]):
        for home, version in everything.items():
            if f"{version}.".startswith(f"{same}."):
                return home
    if not versions:
        return None
    found = ", ".join(f"{home} has {version}" for home, version in versions.items())
    raise BuildError(
        f"torch is built with CUDA {torch_cuda}, but {'CUDA_HOME ' * bool(given)}{found}: set"
        f" CUDA_HOME to a toolkit of CUDA {torch_cuda}; {WITHOUT}"
    )


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
        missing.append(
            "no CUDA toolkit by CUDA_HOME, nvcc on PATH, the nvidia-cuda-nvcc wheel or /usr/local"
        )
    if not has_sources:
        missing.append("there are no sources in csrc/cuda")
    if wish == "1" and missing:
        raise BuildError("MAC_ATTN_CUDA=1, but " + " and ".join(missing))
    return wish != "0" and not missing
