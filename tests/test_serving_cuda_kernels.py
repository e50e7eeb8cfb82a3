"""Tests on the CUDA kernels: their own sources, compiled as C++, run on the host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAFFIC = Path(__file__).parent / "simt" / "torch" / "traffic.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the host execution is built for Linux"),
]


def run(*arguments: str, **environ: str) -> str:
    binaries = str(Path(sys.executable).parent)  # ninja is there
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PATH": path, "PYTHONPATH": f"{TRAFFIC.parents[3]}", **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout.splitlines()[-1]


def test_random_traffic_agrees_with_the_reference(capsys):
    found = run(str(TRAFFIC))
    with capsys.disabled():
        print(f"\nCUDA kernels: {found}")


@pytest.mark.parametrize(
    "plant", ["drop_the_history_check", "share_memory_on_fork", "truncate_off_by_one"]
)
def test_a_planted_bug_is_found(plant):
    assert run(str(TRAFFIC), plant).startswith("found: ")


@pytest.mark.parametrize("length", [300, 3])  # of one less than the queries match sees nothing
def test_seeding_a_slot_that_nobody_has(length):
    """As on a GPU, where its number is not read back: no byte outside the ring is touched."""
    code = f"""
import sys
sys.path.insert(0, {str(TRAFFIC.parent)!r})
from host_kernels import load_as_c
load_as_c()
import mac_attn, torch
sys.modules["mac_attn.seed"]._check_values = lambda *_: None
config = mac_attn.ReuseConfig(entries=4, window=64, band=16, anchors=8, min_context=1)
shape = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16)
cache = mac_attn.ReuseCache(config, num_slots=2, **shape)
kv = torch.randn(2, 40, 16, 2, 64).bfloat16()
table, slots = torch.arange(40).int()[None], torch.tensor([10**5]).int()
q = torch.randn(1, 4, 4, 64).bfloat16()
before = cache.ring.clone()
lens, marked = torch.tensor([{length}]).int(), None
try:
    mac_attn.seed(cache, q, tuple(kv), table, lens, slots=slots, q_match=q)
except ValueError as error:  # of the host execution
    marked = error
print(marked, torch.equal(cache.ring, before))
"""
    marked = "the kernels have set the error flag" if length == 300 else None
    assert run("-c", code) == f"{marked} True"


def test_a_gpu_without_code_in_the_build_is_named():
    code = f"""
import sys
sys.path.insert(0, {str(TRAFFIC.parent)!r})
from host_kernels import load_as_c
load_as_c()
import mac_attn, torch
kv, q = torch.ones(1, 2, 4, 1, 64).bfloat16(), torch.ones(1, 2, 64).bfloat16()
try:
    mac_attn.decode(q, kv, torch.zeros(1, 1).int(), torch.tensor([3]).int())
except RuntimeError as error:
    print(str(error).splitlines()[0])
"""
    assert run("-c", code, MAC_SIMT_NO_CODE="1") == (
        "GPU 0 has compute capability 7.5, but mac_attn was built for 9.0+PTX (+PTX: and any"
        " later one): build it with TORCH_CUDA_ARCH_LIST=7.5"
    )


@pytest.mark.parametrize("regime", ["threshold", "either", "priority"])
def test_samples_estimate_without_bias(regime):
    assert run(str(TRAFFIC), "estimate", regime) == f"{regime}: unbiased"


def test_float8_caches_and_sinks_equal_the_reference():
    assert run(str(TRAFFIC.parent / "steps.py")).endswith("steps equal the reference's")
