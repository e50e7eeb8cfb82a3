"""Importing mac_attn: an extension that must not be loaded is refused, in words."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mac_attn
from mac_attn import _C, _extension

LIBRARY = Path(_C.library)


def python(code: str, *paths: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process that finds modules in `paths` first."""
    code = f"import sys; sys.path[:0] = {[str(path) for path in paths]}\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with a copy of the package, its extension included."""
    package = Path(mac_attn.__file__).parent
    shutil.copytree(package, tmp_path / "mac_attn", ignore=shutil.ignore_patterns("*.so", "__py*"))
    shutil.copy(LIBRARY, tmp_path / "mac_attn" / LIBRARY.name)
    return tmp_path


class TestTwoCopies:
    FIRST = """
import mac_attn, torch
for name in [name for name in sys.modules if name.split(".")[0] == "mac_attn"]:
    del sys.modules[name]
"""
    WORKS = """
kv = torch.ones(1, 2, 4, 1, 16)
table, lengths = torch.zeros(1, 1).int(), torch.tensor([3]).int()
print("result", float(mac_attn.decode(torch.ones(1, 2, 16), kv, table, lengths).sum()))
"""

    def test_a_second_copy_of_the_package(self, copy: Path) -> None:
        code = f"""
first = mac_attn
sys.path.insert(0, {str(copy)!r})
try:
    import mac_attn
except ImportError as error:
    print(error)
mac_attn = first
"""
        result = python(self.FIRST + code + self.WORKS, LIBRARY.parents[1])
        assert result.returncode == 0, (result.returncode, result.stderr)
        said, works = result.stdout.splitlines()
        assert said == (
            f"another copy of mac_attn is loaded in this process ({LIBRARY}), so"
            f" {copy / 'mac_attn' / LIBRARY.name} cannot be: keep one of them on sys.path"
        )
        assert works == "result 32.0"

    def test_a_copy_of_the_extension_under_another_name(self, copy: Path) -> None:
        code = f"""
import importlib.util, mac_attn
spec = importlib.util.spec_from_file_location(
    "elsewhere._C", {str(copy / "mac_attn" / LIBRARY.name)!r}
)
try:
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
except ImportError as error:
    print(error)
"""
        result = python(code, LIBRARY.parents[1])
        assert result.returncode == 0, (result.returncode, result.stderr)
        assert "another copy of mac_attn is loaded in this process" in result.stdout
        assert str(LIBRARY) in result.stdout and str(copy) in result.stdout

    def test_the_same_copy_again(self) -> None:
        result = python(f"{self.FIRST}import mac_attn{self.WORKS}", LIBRARY.parents[1])
        assert result.stdout == "result 32.0\n", result.stderr


class TestAnotherTorch:
    def test_it_is_refused_before_the_library_is_opened(self, copy: Path) -> None:
        # No library at all: opening it would be another error.
        library = copy / "mac_attn" / LIBRARY.name
        library.write_bytes(b"\0\0" + _extension.MARK + b"2.0.1+cu118\n\0\0")
        error = python("import mac_attn", copy).stderr.splitlines()[-1]
        assert error == (
            "ImportError: mac_attn was built for torch 2.0.1+cu118, but torch"
            f" {torch.__version__} is installed: `pip install --no-build-isolation .` in the folder"
            f" of its sources builds it for that ({library})"
        )

    def test_a_library_that_would_load_all_the_same(self, copy: Path) -> None:
        library = copy / "mac_attn" / LIBRARY.name
        version = torch.__version__.encode()
        other = b"1" + version[1:]
        built = library.read_bytes()
        assert _extension.MARK + version + b"\n" in built
        library.write_bytes(built.replace(_extension.MARK + version, _extension.MARK + other))
        error = python("import mac_attn", copy).stderr
        assert f"built for torch {other.decode()}, but torch {version.decode()} is" in error

    def test_of_another_state_of_the_sources(self, tmp_path: Path) -> None:
        library = tmp_path / "_C.so"
        library.write_bytes(b"\x7fELF")
        with pytest.raises(ImportError, match="_C.so does not fit this mac_attn"):
            _extension.check(library)

    def test_not_built(self, copy: Path) -> None:
        (copy / "mac_attn" / LIBRARY.name).unlink()
        error = python("import mac_attn", copy).stderr.splitlines()[-1]
        assert error.startswith("ImportError: mac_attn is not built for this Python 3.")
        assert "pip install --no-build-isolation ." in error


class TestSimd:
    @pytest.mark.parametrize("name", ["AVX2", "avx3"])
    def test_an_unknown_level_is_refused(self, name: str) -> None:
        result = python("import mac_attn", LIBRARY.parents[1], MAC_ATTN_SIMD=name)
        assert result.stderr.splitlines()[-1] == (
            f"ValueError: MAC_ATTN_SIMD is '{name}', must be generic, avx2, avx512 or avx512_bf16"
        )

    def test_empty_is_not_set(self) -> None:
        code = "import mac_attn.info; print(mac_attn.info.info()['simd'])"
        unset = {key: value for key, value in os.environ.items() if key != "MAC_ATTN_SIMD"}
        found = [
            subprocess.run(
                [sys.executable, "-c", code],
                env={**unset, **{"PYTHONPATH": str(LIBRARY.parents[1])}, **extra},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for extra in ({}, {"MAC_ATTN_SIMD": ""})
        ]
        assert found[0] == found[1]


def test_a_forked_child_with_one_thread_can_decode() -> None:
    """docs/serving.md says so of a child whose parent has run a parallel region."""
    code = """
import os, torch, mac_attn
kv, q = torch.randn(1, 2, 4000, 4, 64), torch.randn(1, 16, 64)
call = (q, kv, torch.zeros(1, 1).int(), torch.tensor([3999]).int())
out = mac_attn.decode(*call)
if (child := os.fork()) == 0:
    torch.set_num_threads(1)
    torch.testing.assert_close(mac_attn.decode(*call), out)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    result = python(code, LIBRARY.parents[1])
    assert result.stdout == "7\n", result.stderr
