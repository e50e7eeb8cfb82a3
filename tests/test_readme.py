"""Every example in the README runs, every command in it exists, every link leads somewhere."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")

# Blocks marked as continuing share the namespace of the one before.
BLOCKS = re.findall(r"(<!-- continues -->\n)?```python\n(.*?)```", README, re.DOTALL)


def chains() -> list[list[str]]:
    chained: list[list[str]] = []
    for continues, code in BLOCKS:
        if continues:
            chained[-1].append(code)
        else:
            chained.append([code])
    return chained


def test_there_are_examples():
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize("index", range(len(chains())))
def test_examples_run(index):
    if any("transformers" in code for code in chains()[index]):
        pytest.importorskip("transformers")
    namespace: dict[str, object] = {}
    for code in chains()[index]:
        exec(compile(code, f"README.md, example {index}", "exec"), namespace)


def test_make_targets_exist():
    consoles = re.findall(r"```(?:console|bash|sh)\n(.*?)```", README, re.DOTALL)
    targets = set(re.findall(r"^make (\S+)", "\n".join(consoles), re.MULTILINE))
    assert {"demo", "test"} <= targets
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    subprocess.run(["make", "-n", *targets], cwd=ROOT, check=True, capture_output=True)


def test_links_lead_somewhere():
    names = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    names += [
        name for name in re.findall(r"`([\w./]+\.(?:md|py|txt|h|cpp))`", README) if "/" in name
    ]
    for name in names:
        assert (ROOT / name).exists(), name
