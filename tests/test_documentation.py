"""Every example in the README and in docs/ runs, every command and file that they name exists."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mac_attn

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "bench" / "README.md")
}
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def chains(text: str) -> list[list[str]]:
    """The examples of a page: those marked as continuing share a namespace with the one before.

    One marked as a fragment stands for lines in somebody's program, and does not run alone.
    """
    chained: list[list[str]] = []
    marked = re.findall(r"(?:<!-- (\w+) -->\n)?```python\n(.*?)```", text, re.DOTALL)
    for mark, code in marked:
        assert mark in ("", "continues", "fragment"), mark
        if mark == "continues":
            chained[-1].append(code)
        elif not mark:
            chained.append([code])
    return chained


EXAMPLES = [(page, i) for page, text in PAGES.items() for i in range(len(chains(text)))]


def test_there_are_examples():
    counts = {page: sum(map(len, chains(text))) for page, text in PAGES.items()}
    assert counts["README.md"] >= 2
    assert counts["docs/guide.md"] >= 4 and counts["docs/transformers.md"] >= 1


@pytest.mark.parametrize(("page", "index"), EXAMPLES)
def test_examples_run(page, index):
    blocks = chains(PAGES[page])[index]
    if any("transformers" in code for code in blocks):
        pytest.importorskip("transformers")
    namespace: dict[str, object] = {"__name__": "example"}
    for code in blocks:
        exec(compile(code, f"{page}, example {index}", "exec"), namespace)


def test_the_readme_can_be_read_in_five_minutes():
    words = re.findall(r"\w[\w'.-]*", re.sub(r"```.*?```", "", PAGES["README.md"], flags=re.DOTALL))
    assert len(words) < 5 * 200  # words a minute


def test_make_targets_exist():
    consoles = re.findall(r"```(?:console|bash|sh)\n(.*?)```", "\n".join(PAGES.values()), re.DOTALL)
    targets = set(re.findall(r"^make (\S+)", "\n".join(consoles), re.MULTILINE))
    targets |= set(re.findall(r"`make ([a-z0-9]+)`", "\n".join(PAGES.values())))
    assert {"demo", "test", "docs", "simt", "cuda", "vllm"} <= targets
    for target in targets:
        assert re.search(rf"^([a-z ]+ )?{target}( [a-z ]+)?:", MAKEFILE, re.MULTILINE), target
    subprocess.run(["make", "-n", "demo", "test"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_somewhere(page):
    """As they stand in the repository; in the site mkdocs looks (`make docs`)."""
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", PAGES[page]):
        assert (folder / link).exists(), link
    for name in re.findall(r"`([\w./]+\.(?:md|py|txt|h|cuh|cu|cpp|sh|csv|json))`", PAGES[page]):
        first = name.partition("/")[0]
        if "/" in name and first in ("csrc", "mac_attn", "tests", "docs", "bench", "examples"):
            assert (ROOT / name).exists(), name


def test_every_public_name_is_in_the_api():
    named = {line.split(".")[-1] for line in PAGES["docs/api.md"].splitlines() if ":::" in line}
    assert set(mac_attn.__all__) - {"__version__"} <= named


def test_commands_of_scripts_exist():
    for page, text in PAGES.items():
        for name in re.findall(r"python3? ((?:bench|examples|build_support|tests)/\S+\.py)", text):
            assert (ROOT / name).exists(), f"{page}: {name}"


def test_the_picture_of_the_gain_is_what_its_table_says(tmp_path):
    """The README's picture can be made again by the command that stands beside it."""
    pytest.importorskip("matplotlib")
    script, table = ROOT / "bench" / "gain.py", ROOT / "bench" / "results" / "h200.csv"
    picture = tmp_path / "gain.png"
    subprocess.run([sys.executable, script, table, picture], check=True, capture_output=True)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    missing = [sys.executable, script, table, picture, "--batch", "3"]
    result = subprocess.run(missing, capture_output=True, text=True, check=False)
    assert "has no 32/8, batch 3, 126976 tokens" in result.stderr


def test_the_figures_of_servers_on_a_gpu_are_those_measured(tmp_path):
    """docs/vllm.md has every row of the file, in its order, and the picture can be made again."""
    table = ROOT / "bench" / "results" / "serve_h200.json"
    rows = json.loads(table.read_text())["rows"]
    text = PAGES["docs/vllm.md"]
    for own in rows["plugin"]:
        (vllm,) = (row for row in rows["vLLM"] if row["context"] == own["context"])
        speed = vllm["ms_per_token"] / own["ms_per_token"]
        line = f"| {own['ms_per_token']:.1f} | {speed:.2f} | {own['hit_rate']:.1%} | "
        assert line + f"{own['kv_read_share']:.0%} |" in text, line
    pytest.importorskip("matplotlib")
    picture = tmp_path / "serve.png"
    script = ROOT / "bench" / "serve_plot.py"
    subprocess.run([sys.executable, script, table, picture], check=True, capture_output=True)
    assert picture.read_bytes()[:4] == b"\x89PNG"
