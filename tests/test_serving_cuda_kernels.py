"""The model-based test on the CUDA kernels: their own sources, compiled as C++, run on the host."""

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


def run(*planted: str) -> str:
    binaries = str(Path(sys.executable).parent)  # ninja is there
    result = subprocess.run(
        [sys.executable, str(TRAFFIC), *planted],
        env={**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout.splitlines()[-1]


def test_random_traffic_agrees_with_the_reference(capsys):
    found = run()
    with capsys.disabled():
        print(f"\nCUDA kernels: {found}")


@pytest.mark.parametrize(
    "plant", ["drop_the_history_check", "share_memory_on_fork", "truncate_off_by_one"]
)
def test_a_planted_bug_is_found(plant):
    assert run(plant).startswith("found: ")
