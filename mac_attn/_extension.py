"""A look at the compiled extension before it is opened: with another torch it may not load, or err.

The file says which torch it was built for, in `mac_attn_built_for` of csrc/describe.cpp.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from pathlib import Path

import torch

from ._version import __version__

MARK = b"mac_attn is built for torch "
HOW = "`pip install --no-build-isolation .` in the folder of its sources builds it"


def check(library: Path | None) -> None:
    """Raises ImportError if `library` is missing, or is not for the torch that is installed."""
    if library is None:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        where = ""
        if (Path(__file__).parent.parent / "setup.py").exists():
            where = ", to be used from another folder: in this one Python takes the sources"
        raise ImportError(f"mac_attn is not built for this Python {python}: {HOW}{where}")
    _, found, rest = library.read_bytes().partition(MARK)
    if not found:
        raise ImportError(
            f"{library} does not fit this mac_attn, it is from another version: delete it, then"
            f" {HOW}"
        )
    built_for = rest[: rest.index(b"\n")].decode()
    if built_for != torch.__version__:
        raise ImportError(
            f"mac_attn was built for torch {built_for}, but torch {torch.__version__} is"
            f" installed: {HOW} for that ({library})"
        )


def check_version(built: str) -> None:
    """Raises ImportError for the extension of another release: an install was not built anew."""
    if built != __version__:
        raise ImportError(
            f"the extension is of mac_attn {built}, the Python sources beside it are {__version__}:"
            f" {HOW} anew"
        )


def _open() -> None:
    # Beside this file only: an editable install elsewhere would offer its own.
    spec = PathFinder.find_spec(f"{__package__}._C", [str(Path(__file__).parent)])
    library = None if spec is None or spec.origin is None else Path(spec.origin)
    check(library)
    from . import _C

    # A MAC_ATTN_SIMD that names no level is a ValueError now, not in a decode step.
    check_version(_C.build_info()["version"])


if f"{__package__}._C" not in sys.modules:
    _open()
