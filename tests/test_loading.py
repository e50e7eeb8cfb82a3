"""Importing mac_attn: an extension that must not be loaded is refused, in words."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import mac_attn
from mac_attn import _C, _extension

LIBRARY = Path(_C.__file__)


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
            f"another copy of mac_attn is loaded in this process (registered at {LIBRARY}:0):"
            f" {copy / 'mac_attn' / LIBRARY.name} cannot be, too; keep one of them on sys.path"
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

    def test_an_editable_install_that_was_not_built_anew(self, copy: Path) -> None:
        version = copy / "mac_attn" / "_version.py"
        version.write_text(version.read_text("utf-8").replace(mac_attn.__version__, "7.1.0"))
        error = python("import mac_attn", copy).stderr.splitlines()[-1]
        assert error == (
            f"ImportError: the extension is of mac_attn {mac_attn.__version__}, the Python sources"
            " beside it are 7.1.0: `pip install --no-build-isolation .` in the folder of its"
            " sources builds it anew"
        )

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


class TestFreeThreading:
    def test_the_module_says_that_it_needs_no_gil(self) -> None:
        """Where there is one, nobody reads it: hence the source too."""
        source = (Path(__file__).parent.parent / "csrc" / "ops.cpp").read_text("utf-8")
        assert "{Py_mod_gil, Py_MOD_GIL_NOT_USED}" in source

    @pytest.mark.skipif(
        not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has a GIL"
    )
    def test_importing_it_brings_no_gil_back(self) -> None:
        code = """
import torch
print(sys._is_gil_enabled())
import mac_attn
print(sys._is_gil_enabled())
"""
        before, after = python(code, LIBRARY.parents[1]).stdout.split()
        if before == "True":
            pytest.skip("torch has brought the GIL back already")
        assert after == "False"

    def test_two_threads_decode_at_once(self) -> None:
        """Each on a cache of its own, what each gets alone; the ops let go of the GIL."""
        code = """
import threading, torch, mac_attn
torch.set_num_threads(1)
def steps(seed, results):
    generator = torch.Generator().manual_seed(seed)
    reuse = mac_attn.ReuseCache(
        mac_attn.ReuseConfig(min_context=0, band=16, anchors=8, threshold=0.5, max_drift=None),
        num_slots=1, num_qo_heads=4, num_kv_heads=2, head_dim=32, dtype=torch.float32,
    )
    kv = torch.randn(64, 2, 16, 2, 32, generator=generator)
    table, slots = torch.arange(64, dtype=torch.int32)[None], torch.zeros(1, dtype=torch.int32)
    for n in range(700, 1000):
        if n % 5 == 0:
            q = torch.randn(1, 4, 32, generator=generator)
        lengths = torch.tensor([n], dtype=torch.int32)
        out = mac_attn.decode(q, kv, table, lengths, reuse=reuse, slots=slots, q_match=q)
        results.append(out)
    results.append(torch.tensor(reuse.stats().kv_head_hits))
alone, together = [[], []], [[], []]
for seed in range(2):
    steps(seed, alone[seed])
threads = [threading.Thread(target=steps, args=(seed, together[seed])) for seed in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert all(torch.equal(a, b) for i in range(2) for a, b in zip(alone[i], together[i], strict=True))
print(min(int(results[-1]) for results in together))
"""
        result = python(code, LIBRARY.parents[1])
        assert result.returncode == 0, result.stderr
        assert int(result.stdout) > 300


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
