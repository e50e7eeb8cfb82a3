"""bench/quality_session.py and quality_report.py: all runs in processes, and their tables."""

from __future__ import annotations

import json
import random

import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import tiny_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("bench_modules")
CPU = torch.device("cpu")


def test_bootstrap_interval():
    from intervals import mean_interval

    rng = random.Random(1)
    lost = [[-float(rng.random() < 0.1) for _ in range(2)] for _ in range(200)]
    mean, low, high = mean_interval(lost)
    assert low < mean < high < 0
    assert abs(mean + 0.1) < 0.06 and abs((high - low) / 2 - 1.96 * 0.3 / 20) < 0.012
    # Numbers of a group go together: twice the same ones tell no more than once.
    assert mean_interval([pair * 2 for pair in lost])[1:] == pytest.approx((low, high))
    assert mean_interval([[0.0]] * 9) == (0, 0, 0)
    # Groups of different sizes: a mean over numbers, not over groups.
    assert mean_interval([[1.0, 1.0, 1.0], [0.0]])[0] == 0.75
    with pytest.raises(ValueError, match="groups is empty"):
        mean_interval([[], []])


@pytest.mark.slow
def test_session_and_report(tmp_path, monkeypatch, capsys):
    """Every run in two processes, merged; cut off, and gone on with."""
    import quality
    import quality_report
    import quality_session
    import transformers
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    tiny_model(CPU).save_pretrained(tmp_path / "model")
    words = {f"w{i}": i for i in range(99)} | {"<eos>": 100, "\n": 99}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\n|[^\\s]+"), "removed", invert=True)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>"
    ).save_pretrained(tmp_path / "model")
    small = [*("--model", str(tmp_path / "model")), *("--dtype", "float32", "--device", "cpu")]
    small += [*("--windows", "2", "--context", "288", "--steps", "32", "--min-context", "64")]
    small += [*("--generation-context", "288", "--tokens", "20", "--lengths", "300", "320")]
    small += [*("--tasks", "single", "multikey2", "--samples", "3")]
    small += ["--prompts", str(tmp_path / "prompts")]
    quality.main(["prepare", *small])
    capsys.readouterr()
    modes = {
        "perplexity": [["exact", "MAC"], ["exact", "quest"]],
        "generation": [["exact", "MAC:threshold=2"]],
        "ruler": [["exact", "MAC", "streaming"]],
    }
    out = tmp_path / "out"
    command = [*small, "--out", str(out), "--workers", "2", "--modes", json.dumps(modes)]
    # Rows of 320 tokens so that a batch has two.
    monkeypatch.setattr(quality_session, "_rows", lambda *_, **__: 2)
    quality_session.main([*command, "--seconds", "0"])  # no time at all
    cut_off = json.loads((out / "quality.json").read_text())
    assert cut_off["finished"] == 0 and not cut_off["ruler"]
    quality_session.main([*command, "--seconds", "300"])
    assert not list(out.glob("*.error"))
    content = json.loads((out / "quality.json").read_text())
    assert content["finished"] == 4 + 1 + 2 * 2 * 2
    rows = {run: quality_report.unpacked(content[run]) for run in quality_report.TABLES}
    found = {(r["text"], r["window"], r["mode"]) for r in rows["perplexity"]}
    assert found == {
        (text, w, m)
        for text in ("prose", "code")
        for w in (0, 1)
        for m in ("exact", "MAC", "quest")
    }
    assert len(found) == len(rows["perplexity"])  # exact, which both groups ran, counts once
    found = {(r["task"], r["length"], r["question"], r["mode"]) for r in rows["ruler"]}
    assert len(found) == len(rows["ruler"]) == 2 * 2 * 3 * 3
    assert {(r["text"], r["prompt"]) for r in rows["generation"]} == {("prose", 0), ("code", 1)}
    # What is finished is not run again.
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*-*.json")}
    quality_session.main([*command, "--seconds", "300"])
    assert {path: path.stat().st_mtime_ns for path in out.glob("*-*.json")} == stamps
    capsys.readouterr()
    quality_report.main([str(out / "quality.json")])
    printed = capsys.readouterr().out
    for line in ("| prose | MAC |", "| single | 300 | 3 |", "| all | all | 12 |", "| exact | 2 |"):
        assert line in printed
    # The same without a session and without files.
    capsys.readouterr()
    alone = tmp_path / "alone.json"
    run = ["perplexity", *small[:-2], "--modes", "exact", "MAC", "--json", str(alone)]
    quality.main(run)
    assert "| code | MAC |" in capsys.readouterr().out
    lone = quality_report.unpacked(json.loads(alone.read_text())["perplexity"])
    for row in lone:
        (twin,) = (
            r for r in rows["perplexity"] if all(r[f] == row[f] for f in ("text", "mode", "window"))
        )
        assert twin["losses"] == pytest.approx(row["losses"], abs=1e-3)


def test_report_differences():
    """Differences are paired, scores are of 100, and an interval is of questions."""
    import quality_report

    rows = [
        {"task": "single", "length": 64, "mode": mode, "question": q, "score": s, "kv_read": 0.25}
        for mode, scores in (("exact", (1.0, 0.0, 1.0, 1.0)), ("MAC", (0.0, 0.0, 1.0, 1.0)))
        for q, s in enumerate(scores)
    ]
    packed = quality_report.packed(rows, ("task", "length", "mode"))
    assert len(packed) == 2 and quality_report.unpacked(packed) == rows
    line = quality_report.ruler(rows).splitlines()[2]
    assert line == "| single | 64 | 4 | 75.0 | -25.0 [-75.0, +0.0], 25% |"
    losses = {"exact": [1.0, 2.0], "MAC": [1.5, 2.5]}
    rows = [
        {"text": "prose", "mode": mode, "window": w, "losses": losses[mode], "kl": 0.1}
        | {"agreement": 0.9, "kv_read": 0.25}
        for mode in losses
        for w in range(3)
    ]
    line = quality_report.perplexity(rows).splitlines()[3]
    # exp(0.5) - 1 = 64.87% in every window
    assert line.startswith("| prose | MAC | 25% | 7.389 | +64.87% [+64.87%, +64.87%] | 0.1000 |")
