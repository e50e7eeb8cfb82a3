"""Wheels, compilers and systems: what is built for what, and what is refused.

The wheel itself is tested by `make package`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "build_support")]

from build_support.compiler import (  # noqa: E402
    check_platform,
    compiler_family,
    family,
    flags,
    links_openmp,
)
from build_support.toolkit import BuildError, check_torch  # noqa: E402
from build_support.wheels import label, make_portable, write_label  # noqa: E402

GCC = "g++ (Debian 12.2.0-14) 12.2.0\nCopyright (C) 2022 Free Software Foundation, Inc.\n"
CLANG = "Debian clang version 14.0.6\nTarget: x86_64-pc-linux-gnu\n"
APPLE = "Apple clang version 16.0.0 (clang-1600.0.26.6)\nTarget: arm64-apple-darwin24.1.0\n"


class TestCompiler:
    def test_families(self) -> None:
        assert [family(said) for said in (GCC, CLANG, APPLE)] == ["gcc", "clang", "clang"]
        with pytest.raises(BuildError, match="'Intel.*', must be GCC or Clang; CXX"):
            family("Intel(R) C++ Intel(R) 64 Compiler Classic\n")
        with pytest.raises(BuildError, match="says 'nothing', must be GCC"):
            family("")

    def test_the_one_that_cxx_names(self, tmp_path: Path) -> None:
        compiler = tmp_path / "a folder" / "my c++"
        compiler.parent.mkdir()
        compiler.write_text(f"#!/bin/sh\ncat <<'END'\n{CLANG}END\n")
        compiler.chmod(0o755)
        assert compiler_family({"CXX": f"'{compiler}' -march=native"}) == "clang"
        with pytest.raises(
            BuildError, match="no C\\+\\+ compiler 'not-there'.*install g\\+\\+, or name"
        ):
            compiler_family({"CXX": "not-there"})

    def test_openmp_is_found_by_trying(self, tmp_path: Path) -> None:
        without = tmp_path / "c++"
        without.write_text('#!/bin/sh\n[ "$1" != -fopenmp ]\n')
        without.chmod(0o755)
        assert not links_openmp({"CXX": str(without)})

    def test_flags(self) -> None:
        gcc, clang = flags("gcc", openmp=True), flags("clang", openmp=True)
        assert "-fopenmp" in gcc.compile and "-fopenmp" not in gcc.link  # torch's libgomp
        assert "-fopenmp" in clang.compile and "-fopenmp" in clang.link
        none = flags("clang", openmp=False)
        assert "-fopenmp" not in (*none.compile, *none.link) and "one thread" in none.note
        sanitized = flags("gcc", openmp=True, sanitizers="address")
        assert {"-fsanitize=address"} <= {*sanitized.compile} & {*sanitized.link}
        for chosen in (gcc, clang, none, sanitized):  # instruction sets are chosen at run time
            assert not any(flag.startswith("-m") for flag in chosen.compile)


class TestPlatform:
    def test_what_is_built_for(self) -> None:
        check_platform()
        check_platform("linux", "aarch64", "little", 64)
        check_platform("darwin", "arm64", "little", 64)

    @pytest.mark.parametrize(
        ("system", "byteorder", "bits", "said"),
        [
            ("win32", "little", 64, "the system is win32, must be Linux .* MSVC .* WSL 2"),
            (
                "linux",
                "big",
                64,
                "is s390x, 64-bit and big-endian, must be 64-bit and little-endian",
            ),
            ("linux", "little", 32, "32-bit and little-endian, must be"),
        ],
    )
    def test_what_is_refused(self, system: str, byteorder: str, bits: int, said: str) -> None:
        with pytest.raises(BuildError, match=said):
            check_platform(system, "s390x", byteorder, bits)

    def test_an_old_torch(self) -> None:
        check_torch("2.9.0+cu128"), check_torch("2.13.0"), check_torch("3.0.0a0+gitabc")
        for version in ("2.8.1+cpu", "1.13.1", "nightly"):
            with pytest.raises(
                BuildError, match=f"torch is .*{version[:3]}.*, must be 2.9 or later"
            ):
                check_torch(version)


COMPILE = ("cc", "-shared", "-fPIC", "-o")


def wheel_of(folder: Path, declarations: str, result: str, *link: str) -> Path:
    """A wheel for abi3 with one module, which answers `result`."""
    source, module = folder / "ours.c", folder / "_C.abi3.so"
    body = f"{declarations}\nint puts(const char*); int PyInit__C(void) {{ return {result}; }}\n"
    source.write_text(body)
    subprocess.run([*COMPILE, module, source, *link], check=True)
    kind, info = f"cp310-abi3-linux_{os.uname().machine}", "mac_attn-0.dist-info"
    wheel = folder / f"mac_attn-0-{kind}.whl"
    texts = {
        "METADATA": "Metadata-Version: 2.1\nName: mac-attn\nVersion: 0\n",
        "WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {kind}\n",
        "RECORD": "mac_attn/_C.abi3.so,,\n"
        + "".join(f"{info}/{name},,\n" for name in ("METADATA", "WHEEL", "RECORD")),
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(module, "mac_attn/_C.abi3.so")
        for name, text in texts.items():
            archive.writestr(f"{info}/{name}", text)
    (folder / "out").mkdir()
    return wheel


class TestWheel:
    def test_its_name_says_what_it_is_for(self, tmp_path: Path) -> None:
        assert label("2.13.0+cpu", None) == "torch2.13.0.cpu"
        assert label("2.11.0+cu130", "13.0") == label("2.11.0", "13.0") == "torch2.11.0.cu130"
        write_label(tmp_path)
        assert f"tag_build = +torch{torch.__version__.split('+')[0]}" in (
            tmp_path / "setup.cfg"
        ).read_text("utf-8")

    @pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is for Linux")
    def test_a_wheel_that_needs_another_library_is_refused(self, tmp_path: Path) -> None:
        """One that links a library of somebody's, which auditwheel would pack into it."""
        pytest.importorskip("auditwheel")
        (tmp_path / "theirs.c").write_text("int theirs(void) { return 1; }\n")
        library = tmp_path / "libtheirs.so"
        subprocess.run([*COMPILE, library, tmp_path / "theirs.c"], check=True)
        links = (f"-L{tmp_path}", "-ltheirs", f"-Wl,-rpath,{tmp_path}")
        wheel = wheel_of(tmp_path, "int theirs(void);", 'theirs() + puts("ours")', *links)
        with pytest.raises(SystemExit, match="is not portable; packed: .*libtheirs"):
            make_portable(wheel, tmp_path / "out")

    @pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is for Linux")
    @pytest.mark.parametrize("name", ["PyList_New", "_PyType_Lookup"])
    def test_a_wheel_that_calls_more_of_python_than_abi3_is_refused(
        self, tmp_path: Path, name: str
    ) -> None:
        pytest.importorskip("auditwheel"), pytest.importorskip("abi3audit")
        wheel = wheel_of(tmp_path, f"void *{name}(long);", f'puts("ours") + ({name}(1) == 0)')
        if name == "PyList_New":
            assert "-cp310-abi3-manylinux" in make_portable(wheel, tmp_path / "out").name
            return
        with pytest.raises(SystemExit, match="(?s)has non-ABI3 symbols.*_PyType_Lookup"):
            make_portable(wheel, tmp_path / "out")
