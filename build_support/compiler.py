"""The compiler's flags, and the systems that there is no build for."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .toolkit import BuildError


@dataclass(frozen=True)
class Flags:
    """What the C++ compiler and the linker are given."""

    compile: tuple[str, ...]
    link: tuple[str, ...]
    note: str = ""  # for the builder's eyes


def check_platform(
    system: str = sys.platform,
    machine: str = platform.machine(),
    byteorder: str = sys.byteorder,
    pointer_bits: int = 64 if sys.maxsize > 2**32 else 32,
) -> None:
    """Raises BuildError where the sources do not compile or have never been thought to."""
    if system not in ("linux", "darwin"):
        raise BuildError(
            f"the system is {system}, must be Linux (or macOS, untested): the kernels are written"
            " in the vector extension of GCC and Clang, which MSVC does not have; on Windows use"
            " WSL 2"
        )
    if pointer_bits != 64 or byteorder != "little":
        raise BuildError(
            f"the processor is {machine}, {pointer_bits}-bit and {byteorder}-endian, must be 64-bit"
            " and little-endian"
        )


def family(said: str) -> str:
    """ "gcc" or "clang", from what `c++ --version` prints.

    Raises BuildError for another compiler.
    """
    for name, mark in (("clang", "clang version"), ("gcc", "Free Software Foundation")):
        if mark in said:
            return name
    first = said.strip().splitlines()[0] if said.strip() else "nothing"
    raise BuildError(f"the C++ compiler says {first!r}, must be GCC or Clang; CXX names it")


def compiler_family(environ: Mapping[str, str] = os.environ) -> str:
    """That of the compiler which torch builds with: `CXX`, or else `c++`."""
    command = shlex.split(environ.get("CXX", "")) or ["c++"]
    try:
        said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(
            f"there is no C++ compiler {command[0]!r} ({error.strerror}): install g++, or name one"
            " in CXX"
        ) from error
    return family(said.stdout)


def links_openmp(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a program with `-fopenmp` compiles and links."""
    command = shlex.split(environ.get("CXX", "")) or ["c++"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "openmp.cpp"
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        result = subprocess.run(
            [*command, "-fopenmp", str(source), "-o", str(source.with_suffix(""))],
            capture_output=True,
            check=False,
        )
    return result.returncode == 0


def flags(compiler: str, openmp: bool, sanitizers: str = "") -> Flags:
    """The flags for a compiler of this family.

    Args:
        compiler: "gcc" or "clang".
        openmp: whether it has OpenMP.
        sanitizers: as -fsanitize= takes them.
    """
    # The SIMD kernels choose their instructions file by file and at run time: no -march here.
    # torch's headers have unused parameters by the hundred.
    compile_, link, note = ["-O3", "-Wall", "-Wextra", "-Wno-unused-parameter"], [], ""
    # Nor is all that they leave in the library, pybind11's calls of Python outside of its stable
    # ABI among that: what nothing uses goes.
    compile_ += ["-fvisibility=hidden", "-ffunction-sections", "-fdata-sections"]
    link.append("-Wl,-dead_strip" if sys.platform == "darwin" else "-Wl,--gc-sections")
    if openmp:
        compile_.append("-fopenmp")
        # What GCC makes of it is answered by the libgomp that torch has loaded before: there must
        # not be two, and where nothing compiles there may be none. Clang's calls are others.
        if compiler != "gcc":
            link.append("-fopenmp")
    else:
        note = "this compiler has no OpenMP (libomp): the CPU kernels will run on one thread"
    if sanitizers:
        # What is found ends the process. vptr asks for type information that torch's libraries
        # hide.
        compile_ += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-sanitize=vptr"]
        compile_ += ["-fno-omit-frame-pointer", "-g1", "-O1"]
        link.append(f"-fsanitize={sanitizers}")
    return Flags(tuple(compile_), tuple(link), note)
