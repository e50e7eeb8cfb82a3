"""The build: finding the toolkit, saying what was built, every instruction set, a real install."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mac_attn
from mac_attn import _C

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from build_support.toolkit import (  # noqa: E402
    OLDEST_SETUPTOOLS,
    BuildError,
    find_toolkit,
    runtime_folder,
    use_cuda,
)


def make_toolkit(home: Path, version: str = "13.0") -> Path:
    for name in ("bin/nvcc", "include/cuda_runtime.h"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.88'\n")
    nvcc.chmod(0o755)
    return home


class TestFindToolkit:
    @pytest.fixture
    def find(self, tmp_path):
        """Where torch's CUDA version and an environment lead, whatever this machine has."""
        return lambda version, environ, site=tmp_path / "none": find_toolkit(
            version, environ, site, tmp_path / "usual"
        )

    def test_cuda_home_wins_and_must_be_right(self, find, tmp_path):
        home = make_toolkit(tmp_path / "cuda", "13.1")
        other = make_toolkit(tmp_path / "other")
        environ = {"CUDA_HOME": str(home), "PATH": str(other / "bin")}
        assert find("13.0", environ) == home  # torch takes the same major version
        with pytest.raises(
            BuildError, match="CUDA_HOME is .*nowhere, must be a folder with .*nvcc"
        ):
            find("13.0", {**environ, "CUDA_HOME": str(tmp_path / "nowhere")})
        with pytest.raises(
            BuildError, match="built with CUDA 12.6, but CUDA_HOME .*cuda has 13.1: "
        ):
            find("12.6", environ)

    def test_nvcc_on_path_is_followed_through_links(self, find, tmp_path):
        home = make_toolkit(tmp_path / "cuda-13")
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
        assert find("13.0", {"PATH": str(tmp_path / "bin")}) == home

    def test_a_wrapper_script_is_no_toolkit_and_wheels_come_second(self, find, tmp_path):
        wrapper = make_toolkit(tmp_path / "wrapper")
        (wrapper / "include" / "cuda_runtime.h").unlink()
        environ = {"PATH": str(wrapper / "bin")}
        site = tmp_path / "site"
        assert find("13.0", environ, site) is None
        usual = make_toolkit(tmp_path / "usual" / "cuda")
        assert find("13.0", environ, site) == usual
        wheels = make_toolkit(site / "nvidia" / "cu13")
        assert find("13.0", environ, site) == wheels
        real = make_toolkit(tmp_path / "real")
        assert find("13.0", {"PATH": str(real / "bin")}, site) == real

    def test_the_version_of_torch_is_preferred(self, find, tmp_path):
        path = {"PATH": str(make_toolkit(tmp_path / "old", "12.4") / "bin")}
        site = tmp_path / "site"
        make_toolkit(tmp_path / "usual" / "cuda", "11.8")
        assert find("13.0", {}) is None  # nobody has asked for that one
        with pytest.raises(BuildError) as raised:
            find("13.0", path, site)
        assert re.fullmatch(
            "torch is built with CUDA 13.0, but .*old has 12.4: set CUDA_HOME to a toolkit of"
            " CUDA 13.0; MAC_ATTN_CUDA=0 builds without CUDA",
            str(raised.value),
        )
        newer = make_toolkit(tmp_path / "usual" / "cuda-13.1", "13.1")
        assert find("13.0", path, site) == newer
        wheels = make_toolkit(site / "nvidia" / "cu13", "13.0")
        assert find("13.0", path, site) == wheels
        of_12 = make_toolkit(site / "nvidia" / "cuda_nvcc", "12.6")
        assert find("12.6", path, site) == of_12
        # A torch for the CPU builds without CUDA whatever there is.
        assert not use_cuda(None, True, find(None, path, site), {})


def test_setup_says_what_it_cannot_build_with(tmp_path):
    """In a sentence at its end, before torch or setuptools have another to say."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "setuptools.py").write_text("__version__ = '65.5.0'\n")
    torch_13 = tmp_path / "torch-13" / "torch"
    torch_13.mkdir(parents=True)
    (torch_13 / "__init__.py").write_text("from . import version\n__version__ = '2.13.0+cu130'\n")
    (torch_13 / "version.py").write_text("cuda = '13.0'\n")
    nvcc_12 = make_toolkit(tmp_path / "cuda-12", "12.4")
    for folder, environ, said in (
        ("old", {}, 'setuptools is 65.5.0, must be 77 or later: pip install "setuptools>=77"'),
        (
            "torch-13",
            {"CUDA_HOME": str(nvcc_12)},
            f"torch is built with CUDA 13.0, but CUDA_HOME {nvcc_12} has 12.4: set CUDA_HOME to a"
            " toolkit of CUDA 13.0; MAC_ATTN_CUDA=0 builds without CUDA",
        ),
    ):
        result = subprocess.run(
            [sys.executable, str(ROOT / "setup.py"), "--version"],
            env={**os.environ, "PYTHONPATH": str(tmp_path / folder), **environ},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (result.returncode, result.stderr) == (1, f"mac_attn: {said}\n")


def test_the_oldest_setuptools_is_named_where_it_is_installed():
    for name in ("pyproject.toml", "README.md", "Makefile"):
        asked = re.findall(r'"setuptools[>=][^"]*"', (ROOT / name).read_text("utf-8"))
        assert set(asked) == {f'"setuptools>={OLDEST_SETUPTOOLS}"'}, name


def test_the_runtime_of_a_toolkit_and_of_the_wheels(tmp_path):
    home, scratch = make_toolkit(tmp_path / "cuda"), tmp_path / "scratch"
    with pytest.raises(BuildError, match="has no lib64/libcudart.so"):
        runtime_folder(home, scratch)
    (home / "lib").mkdir()
    (home / "lib" / "libcudart.so.13").touch()
    for _ in range(2):  # the second time the link is there already
        assert runtime_folder(home, scratch) == scratch
        assert (scratch / "libcudart.so").resolve() == home / "lib" / "libcudart.so.13"
    (home / "lib64").mkdir()
    (home / "lib64" / "libcudart.so").touch()
    assert runtime_folder(home, scratch) == home / "lib64"


def test_forcing_cuda(tmp_path):
    home = make_toolkit(tmp_path)
    assert use_cuda("13.0", True, home, {})
    assert not use_cuda("13.0", True, home, {"MAC_ATTN_CUDA": "0"})
    for missing in [(None, True, home), ("13.0", True, None), ("13.0", False, home)]:
        assert not use_cuda(*missing, {})
    forced = {"MAC_ATTN_CUDA": "1"}
    with pytest.raises(BuildError, match="=1, but the installed torch is a CPU build$"):
        use_cuda(None, True, home, forced)
    with pytest.raises(BuildError, match="=1, but no CUDA toolkit by CUDA_HOME"):
        use_cuda("13.0", True, None, forced)
    with pytest.raises(BuildError, match="is 'yes', must be 0 or 1"):
        use_cuda("13.0", True, home, {"MAC_ATTN_CUDA": "yes"})


def run(*args: str, **options) -> str:
    result = subprocess.run(
        [sys.executable, *args], check=True, capture_output=True, text=True, **options
    )
    return result.stdout


def test_info():
    text, data = run("-m", "mac_attn.info"), json.loads(run("-m", "mac_attn.info", "--json"))
    assert re.search(rf"^mac_attn +{re.escape(mac_attn.__version__)}$", text, re.MULTILINE)
    assert data["torch"] == torch.__version__ and data["simd"] in text


def test_versions_agree():
    assert _C.build_info()["version"] == mac_attn.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.findall(r"^## \[(\d\S+)\]", changelog, re.MULTILINE)[0] == mac_attn.__version__


SMALL_DECODE = """
import torch, mac_attn
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for heads, head_dim in ((6, 80), (3, 64), (32, 128)):
        kv = torch.randn(1, 2, 300, 1, head_dim).to(dtype)
        q = torch.randn(1, heads, head_dim).to(dtype)
        table, seq_lens = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([299]).int()
        out, lse = mac_attn.decode(q, kv, table, seq_lens, return_lse=True)
        k, v = kv[0, :, :299, 0].double()
        logits = q[0].double() @ k.T * head_dim**-0.5
        # one rounding of the output to its dtype, or float32 sums over 299 tokens
        eps = max(torch.finfo(dtype).eps, 2e-6)
        torch.testing.assert_close(out[0].double(), logits.softmax(1) @ v, rtol=eps, atol=eps)
        torch.testing.assert_close(lse[0].double(), logits.logsumexp(1), rtol=1e-5, atol=1e-5)
print(mac_attn._C.build_info()["simd"])
"""


@pytest.mark.parametrize("simd", ["generic", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set(simd):
    got = run("-c", SMALL_DECODE, env={**os.environ, "MAC_ATTN_SIMD": simd}).strip()
    cpu = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpu.exists():
        pytest.skip("these are levels of x86-64, and what the processor has is read as on Linux")
    flags = set(re.search(r"^flags\s*:(.*)$", cpu.read_text(), re.M)[1].split())
    needs = {
        "generic": set(),
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
        "avx512_bf16": {"avx512_bf16"},
    }
    expected = "generic"
    for level, wanted in needs.items():
        if not wanted <= flags:
            break
        expected = level
        if level == simd:
            break
    assert got == expected
