"""bench/quality.py and replay.py: generators, scores, loaders, and small runs of everything."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import prompts, tiny_model  # noqa: E402

from mac_attn import ReuseConfig  # noqa: E402
from mac_attn.calibrate import capture  # noqa: E402

BENCH = Path(__file__).parent.parent / "bench"
CPU = torch.device("cpu")
SMALL = ReuseConfig(threshold=1e6, window=32, band=8, anchors=4, min_context=16)


@pytest.fixture(autouse=True)
def _bench_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


class Words:
    """A tokenizer that takes each word for a token; enough of one for the generators."""

    chat_template = None
    eos_token_id = 100

    class _Encoded:
        def __init__(self, ids, as_tensor):
            self.input_ids = torch.tensor([ids]) if as_tensor else ids

    def __call__(self, text, add_special_tokens=True, return_tensors=None):
        ids = [sum(word.encode()) % 99 + 1 for word in text.split()]
        return self._Encoded(ids, return_tensors == "pt")

    def decode(self, tokens):
        return " ".join(map(str, tokens))


@pytest.mark.parametrize("length", [400, 1500])
def test_ruler_samples(length):
    import ruler

    words = Words()
    for task in ruler.TASKS:
        sample = ruler.make(task, words, length, seed=3)
        assert sample == ruler.make(task, words, length, seed=3)
        assert sample != ruler.make(task, words, length, seed=4)
        for question in sample.questions:
            text = sample.context + question.text + question.prefix
            size = len(words(text).input_ids)
            assert length - 48 - 160 <= size <= length - 48
            for answer in question.answers:
                assert answer in sample.context
            assert question.score(" and ".join(question.answers).upper()) == 1
            assert question.score("") == 0
            if len(question.answers) > 1:
                assert question.score(question.answers[0]) == 1 / len(question.answers)
    with pytest.raises(ValueError, match="task is 'other'"):
        ruler.make("other", words, length, 0)
    with pytest.raises(ValueError, match="too short"):
        ruler.make("vt", words, 100, 0)


def test_ruler_answers_are_right():
    import ruler

    words = Words()
    sample = ruler.make("vt", words, 2000, seed=0)
    assigned = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", sample.context))
    for question in sample.questions:
        value = re.search(r"value (\d+)", question.text).group(1)
        for name in question.answers:
            while name in assigned:
                name = assigned[name]
            assert name == value
    sample = ruler.make("fwe", words, 2000, seed=0)
    coded = sample.context.splitlines()[-1].split()
    counts = sorted((word for word in set(coded) if word != "..."), key=coded.count)
    assert set(counts[-3:]) == set(sample.questions[0].answers)
    sample = ruler.make("cwe", words, 2000, seed=0)
    listed = re.findall(r"\d+\. (\w+)", sample.context)
    common = sorted(set(listed), key=listed.count)[-10:]
    assert set(common) == set(sample.questions[0].answers)
    sample = ruler.make("multikey", words, 2000, seed=0)
    for question in sample.questions:
        key = re.search(r"magic number for (.*) mentioned", question.text).group(1)
        assert f"magic numbers for {key} is: {question.answers[0]}." in sample.context


def test_bootstrap_interval():
    from quality_runs import difference

    rng = random.Random(1)
    exact = [[float(rng.random() < 0.5) for _ in range(2)] for _ in range(200)]
    worse = [[max(0.0, score - float(rng.random() < 0.2)) for score in pair] for pair in exact]
    mean, low, high = difference(worse, exact)
    assert low < mean < high < 0
    # Half of the answers were right, a fifth of those is lost: 0.1, of 400 with sigma 0.3.
    assert abs(mean + 0.1) < 0.06 and abs((high - low) / 2 - 1.96 * 0.3 / 20) < 0.012
    assert difference(exact, exact) == (0, 0, 0)


def subject(modes=("exact", "MAC", "streaming", "quest"), share=0.5):
    from quality_runs import Subject

    return Subject(tiny_model(CPU), Words(), SMALL, modes, share)


def test_perplexity_run():
    import quality_runs as runs

    rows = runs.perplexity(subject(), prompts(CPU, 1, 96), 32)
    assert [row["mode"] for row in rows] == ["exact", "MAC", "streaming", "quest"]
    exact, *others = rows
    assert exact["ratio"] == 1 and exact["kl"] == 0 and exact["kv_read"] == 1
    for row in others:
        assert row["kl"] > 1e-3 and row["kv_read"] < 1 and row["ratio"] != 1
        low, high = row["interval"]
        assert low < row["ratio"] - 1 < high
    # With nothing left out the baselines are exact; float32 sums in another order.
    for row in runs.perplexity(subject(share=1.0), prompts(CPU, 1, 96), 32)[2:]:
        assert abs(row["ratio"] - 1) < 1e-3 and row["kl"] < 1e-4


def test_ruler_and_generation_runs():
    import quality_runs as runs

    found = runs.ruler(subject(), "multikey", 320, 10)
    for mode, result in found.items():
        assert [len(scores) for scores in result["scores"]] == [8, 8]
        assert (result["kv_read"] == 1) == (mode == "exact")
    rows = runs.generation(subject(("exact", "MAC")), prompts(CPU, 1, 60), 24)
    exact, mac = rows
    assert exact["agrees_for"] == exact["tokens"] == 25 and exact["same_token"] == 1
    assert mac["kl"] > 1e-3 and mac["kv_read"] < 1 and mac["agrees_for"] < 25
    assert 0 < mac["distinct_4grams"] <= 1


def test_longbench_v2_loader(tmp_path):
    import longtasks

    item = {"_id": "a1", "domain": "x", "difficulty": "easy", "length": "short"}
    item |= {"question": "Why?", "context": "Because.", "answer": "C"}
    item |= {f"choice_{letter}": f"reason {letter}" for letter in "ABCD"}
    path = tmp_path / "data.json"
    path.write_text(json.dumps([item, item | {"_id": "a2", "answer": "A"}]))
    first, second = longtasks.longbench_v2(path)
    assert (first.id, first.answer, second.answer) == ("a1", "C", "A")
    assert "Because." in first.prompt and "(D) reason D" in first.prompt
    assert first.score("**The correct answer is (C)**") == 1
    assert first.score("The correct answer is B") == first.score("C") == 0
    path.write_text(json.dumps([item | {"answer": "E"}]))
    with pytest.raises(ValueError, match="answer is 'E'"):
        longtasks.longbench_v2(path)
    path.write_text(json.dumps([{"_id": "a"}]))
    with pytest.raises(ValueError, match="lacks context, question"):
        longtasks.longbench_v2(path)


def test_longgenbench_loader(tmp_path):
    import longtasks

    item = {"prompt": "Write a diary.", "type": "Week", "prefix": "#*# Week 1:", "number": 4}
    item |= {"checks_once": {"2": "a birthday"}, "checks_range": {"2": "a trip", "3": "a trip"}}
    path = tmp_path / "Dataset_short.json"
    path.write_text(json.dumps([item | {"checks_periodic": {"4": "a class"}}]))
    (writing,) = longtasks.longgenbench(path)
    assert writing.checks == {2: ("a birthday", "a trip"), 3: ("a trip",), 4: ("a class",)}
    assert writing.completion_rate("rain #*# Week 2 (x): sun #*# Week 3: snow") == 0.75
    assert writing.completion_rate("#*# Week 2 #*# Week 2 #*# Week 9") == 0.5


@pytest.fixture(scope="module")
def captured():
    torch.manual_seed(0)
    return capture(tiny_model(CPU), prompts(CPU, 1, 90), steps=40, seeded=32)


def test_baselines(captured):
    import baselines

    torch.manual_seed(2)
    shares = [0.3, 0.6, 1.0]
    found = baselines.errors(captured, shares)
    for name, error in found.items():
        assert error.shape == (3, 2, 4)
        means = error.mean((1, 2))
        if name == "h2o":  # its budget is that of the mean length, so at last it lacks some
            assert means[2] < means[0]
        else:
            assert means[2] < 1e-5  # everything is kept: exact
        assert means[0] > means[1] > means[2] or name == "h2o"
    # Whoever sees the weights chooses best.
    for name in ("streaming", "quest", "h2o", "random"):
        assert found["oracle"].mean((1, 2))[0] < found[name].mean((1, 2))[0]


def test_baselines_keep_what_they_say(captured):
    import baselines

    view = baselines._Layer(captured, 0)
    lens = view.lens
    for share in (0.3, 0.5):
        masks = dict(view.masks(share, torch.Generator().manual_seed(0)))
        masks["h2o"] = view.h2o([share])[0]
        for name, mask in masks.items():
            assert mask.shape == (2, 40, 90)
            assert not (mask & (torch.arange(90) >= lens[:, None])).any(), name  # no future
            newest = mask[:, torch.arange(40), lens - 1]
            assert name == "oracle" or newest.all()
            kept = mask.sum(-1).float().mean() / lens.float().mean()
            assert abs(kept - share) < 0.11, name  # a page is a sixth of this context
    h2o = view.h2o([0.5])[0]
    for step in range(1, 40):  # what is evicted never comes back
        assert not (h2o[:, step, : lens[step] - 1] & ~h2o[:, step - 1, : lens[step] - 1]).any()


def test_quest_bound_is_a_bound(captured):
    import baselines

    view = baselines._Layer(captured, 1)
    pages = -(-90 // baselines.PAGE)
    logits = view.queries @ view.keys.transpose(1, 2)[:, None]
    low, high = (
        torch.stack([part.amin(1) if low else part.amax(1) for part in view.keys.split(16, 1)], 1)
        for low in (True, False)
    )
    bound = torch.maximum(
        view.queries[..., None, :] * low[:, None, None],
        view.queries[..., None, :] * high[:, None, None],
    ).sum(-1)
    best = torch.stack([part.amax(-1) for part in logits.split(16, 3)], 3)
    assert (bound >= best - 1e-4).all()
    # The last page is not full, and padding with zeros may widen its bounds only.
    expected = bound.log_softmax(-1).amax(1)
    order = view._page_bounds(pages)
    assert torch.equal(order[..., :-1].argmax(-1), expected[..., :-1].argmax(-1))


def test_replay_quick(captured, tmp_path, monkeypatch):
    import replay

    monkeypatch.setattr(replay, "load_capture", lambda *_: captured)
    small = {"window": 32, "band": 8, "min_context": 0}
    for name, (config, _) in list(replay.CURVES.items()):
        options = {f: getattr(config, f) for f in ("granularity", "threshold_mode")}
        anchors = min(4, config.anchors)
        monkeypatch.setitem(
            replay.CURVES,
            name,
            (ReuseConfig(**small, **options, anchors=anchors), replay.CURVES[name][1]),
        )
    path, png = tmp_path / "replay.json", tmp_path / "replay.png"
    replay.main(["--quick", "--texts", "prose", "--json", str(path), "--png", str(png)])
    result = json.loads(path.read_text())["texts"]["prose"]
    assert set(result["curves"]) == set(replay.QUICK)
    for row in (*result["curves"]["MAC"], result["equal"]["paper"]):
        assert 0 <= row["full_reads"] <= 1 and 0 < row["kv_read"] <= 1 and row["error"] >= 0
    tables = result["equal"]["MAC"]
    assert len(tables["error_per_head"]) == 2 and len(tables["error_per_head"][0]) == 4
    assert len(tables["kv_read_per_kv_head"][0]) == 2
    assert sum(count for _, count in tables["error_by_depth"].values()) == 40 * 2 * 4
    assert png.stat().st_size > 5000


def test_calibration_comparison():
    import calibration

    torch.manual_seed(0)
    tables = {}
    for text in ("a", "b"):
        slope = 0.05 + 0.3 * torch.rand(1, 1, 2, 2, dtype=torch.float64)
        read = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2], dtype=torch.float64)
        read = read[None, :, None, None].expand(1, 5, 2, 2)
        tables[text] = (slope * (1 - read) ** 2, read)
    rows = calibration.compare(tables, [0.05])
    assert [(row["chosen_on"], row["measured_on"]) for row in rows] == [
        ("a", "a"), ("a", "b"), ("b", "a"), ("b", "b")
    ]  # fmt: skip
    for row in rows:
        if row["chosen_on"] == row["measured_on"]:
            assert row["error"] <= 0.05 and row["single_error"] <= 0.05
            assert row["kv_read"] <= row["single_at_equal_error"] + 1e-9
