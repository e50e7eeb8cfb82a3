"""bench/quality.py, its session and replay.py: generators, scores, loaders, small runs of each."""

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
        words = re.findall(r"\n|[^\s]+", text)
        ids = [sum(word.encode()) % 99 + 1 for word in words]
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
            assert length - 160 <= len(words(text).input_ids) <= length
            for answer in question.answers:
                assert answer in sample.context
            assert question.score(" and ".join(question.answers).upper()) == 1
            assert question.score("") == 0
            if len(question.answers) > 1:
                assert question.score(question.answers[0]) == 1 / len(question.answers)
    with pytest.raises(ValueError, match="task is 'other'"):
        ruler.make("other", words, length, 0)
    with pytest.raises(ValueError, match="too short"):
        ruler.make("vt", words, 50, 0)


def test_prompts_have_one_length(tmp_path):
    import quality_prompts as prompts
    import ruler

    words = Words()
    for task in ruler.TASKS:
        found = prompts.ruler_questions(task, words, 700, 4)
        assert {len(asked.ids) for asked in found.asked} == {700}
        assert len({asked.ids for asked in found.asked}) == 4
        # What is asked is about the context of that prompt: its question stands at the end.
        sample = ruler.make(task, words, 700 - len(words("\n").input_ids) - 4, 2)
        question = sample.questions[2 % len(sample.questions)]
        assert found.asked[2].answers == question.answers
        tail = words(question.text + "\n" + question.prefix).input_ids
        assert list(found.asked[2].ids[-len(tail) :]) == tail
        prompts.save(tmp_path, found)
        assert prompts.load(tmp_path, task, 700) == found
        part = found.part(1, 3)
        assert part.asked == found.asked[1:3] and part.first == 1
        assert part.part(1, 2).first == 2
    rows = torch.arange(12).view(2, 6)
    prompts.save_windows(tmp_path, "prose", rows)
    assert torch.equal(prompts.load_windows(tmp_path, "prose", 6), rows)
    with pytest.raises(ValueError, match="too short"):
        prompts.ruler_questions("cwe", words, 60, 1)


def test_ruler_answers_are_right():
    import ruler

    words = Words()
    for task in ("vt", "vt1"):
        sample = ruler.make(task, words, 2000, seed=0)
        assigned = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", sample.context))
        for question in sample.questions:
            value = re.search(r"value (\d+)", question.text).group(1)
            assert len(question.answers) == (5 if task == "vt" else 2)
            for name in question.answers:
                while name in assigned:
                    name = assigned[name]
                assert name == value
    for task, top in (("fwe", 3), ("fwe1", 1)):
        sample = ruler.make(task, words, 2000, seed=0)
        coded = sample.context.splitlines()[-1].split()
        counts = sorted((word for word in set(coded) if word != "..."), key=coded.count)
        assert set(counts[-top:]) == set(sample.questions[0].answers)
    for task, top in (("cwe", 10), ("cwe3", 3)):
        sample = ruler.make(task, words, 2000, seed=0)
        listed = re.findall(r"\d+\. (\w+)", sample.context)
        common = sorted(set(listed), key=listed.count)[-top:]
        assert set(common) == set(sample.questions[0].answers)
    for task in ("multikey", "multikey2"):
        sample = ruler.make(task, words, 2000, seed=0)
        for question in sample.questions:
            key = re.search(r"magic number for (.*) mentioned", question.text).group(1)
            assert f"magic numbers for {key} is: {question.answers[0]}." in sample.context


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


MODES = ("exact", "sdpa", "MAC", "MAC:band=16", "streaming", "quest")


def parsed(names, share=0.5):
    from modes import Mode

    return [Mode.parse(name, SMALL, share) for name in names]


def subject(names=MODES, share=0.5, batch=4):
    from quality_runs import Subject

    torch.manual_seed(0)
    return Subject(tiny_model(CPU), Words(), parsed(names, share), batch)


def test_modes_are_parsed(tmp_path):
    from modes import Mode

    from mac_attn.calibrate import Calibration

    exact, mac, changed, quest = parsed(
        ("exact", "MAC", "MAC:threshold=0.1,max_reuse_depth=null,granularity=group", "quest")
    )
    assert mac.config == SMALL and exact.config is None and exact.share == 1
    assert changed.config.threshold == 0.1 and changed.config.max_reuse_depth is None
    assert changed.config.band == SMALL.band and quest.share == 0.5
    assert mac.seed_key == changed.seed_key != parsed(["MAC:band=9"])[0].seed_key
    assert parsed(["streaming:share=0.25"])[0].share == 0.25
    path = tmp_path / "model.json"
    Calibration((ReuseConfig(), ReuseConfig(threshold=0.3)), 0.1, 0.1, 0.5).save(path)
    (calibrated,) = parsed([f"MAC:calibration={path}"])
    assert [c.threshold for c in calibrated.config] == [0.1, 0.3]
    assert [c.min_context for c in calibrated.config] == [SMALL.min_context] * 2
    for wrong, message in (
        ("other", "mode is 'other'"),
        ("MAC:bands=3", "options are bands"),
        ("exact:share=1", "no option share"),
        ("quest:share=2", "share is 2.0"),
        ("MAC:band=0", "band is 0"),
        ("MAC:seed=2", "seed is 2"),
    ):
        with pytest.raises(ValueError, match=message):
            Mode.parse(wrong, SMALL, 0.5)


def _decoded(model, cache, mode, tokens):
    from modes import attending

    with attending(mode), torch.no_grad():
        return torch.stack(
            [model(t[:, None], past_key_values=cache).logits[:, -1] for t in tokens.T], 1
        )


def test_prefill_serves_every_mode():
    """What comes from a shared prefill is what a MacCache of its own gives, in any order."""
    from modes import Prefill

    from mac_attn.integrations.transformers import MacCache

    asked = subject()
    rows, tokens = prompts(CPU, 3, 60), prompts(CPU, 3, 12)
    with torch.no_grad():
        prefill = Prefill(asked.model, rows, 12, window=40)
    mac = [mode for mode in asked.modes if mode.kind == "MAC"]
    expected = {}
    for mode in mac:
        cache = MacCache(asked.model, max_length=80, config=mode.config)
        with torch.no_grad():
            logits = asked.model(rows, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        assert torch.equal(logits, prefill.logits)
        expected[mode.name] = _decoded(asked.model, cache, mode, tokens)
        assert cache.stats().kv_head_hits > 0
    for mode in (*mac, *reversed(mac)):
        found = _decoded(asked.model, prefill.cache(mode), mode, tokens)
        assert torch.equal(found, expected[mode.name])
    first, second = expected.values()
    assert not torch.equal(first, second)
    # Side by side on a copy: neither disturbs the other.
    one, other = prefill.cache(mac[0]), prefill.cache(mac[1], copy=True)
    for i in range(12):
        for mode, cache in ((mac[0], one), (mac[1], other)):
            step = _decoded(asked.model, cache, mode, tokens[:, i : i + 1])
            assert torch.equal(step[:, 0], expected[mode.name][:, i])
    # Both exact modes are what one forward over everything gives.
    with torch.no_grad():
        whole = asked.model(torch.cat([rows, tokens], 1)).logits[:, 60:]
    for mode in asked.modes[:2]:
        found = _decoded(asked.model, prefill.cache(mode), mode, tokens)
        torch.testing.assert_close(found, whole, rtol=0, atol=5e-4)


def test_a_ring_that_is_not_seeded():
    """`MAC:seed=0` is exact until what it decoded itself can be reused."""
    from modes import Prefill

    asked = subject(("exact", "MAC", "MAC:seed=0"))
    rows, tokens = prompts(CPU, 3, 60), prompts(CPU, 3, 12)
    with torch.no_grad():
        prefill = Prefill(asked.model, rows, 12, window=40)
    exact, *others = asked.modes
    wanted = _decoded(asked.model, prefill.cache(exact), exact, tokens)
    for mode, at_once in zip(others, (True, False), strict=True):
        cache = prefill.cache(mode)
        first = _decoded(asked.model, cache, mode, tokens[:, :1])
        hits = cache.stats().kv_head_hits
        assert (hits > 0) == at_once
        assert ((first - wanted[:, :1]).abs().max() > 5e-4) == at_once
        rest = _decoded(asked.model, cache, mode, tokens[:, 1:])
        assert cache.stats().kv_head_hits > hits
        assert (rest - wanted[:, 1:]).abs().max() > 5e-4


def test_batches_are_their_rows():
    """Every mode answers a request in a batch as it does alone."""
    from modes import Prefill

    asked = subject()
    rows, tokens = prompts(CPU, 3, 60), prompts(CPU, 3, 12)
    with torch.no_grad():
        together = Prefill(asked.model, rows, 12)
        for b in range(3):
            alone = Prefill(asked.model, rows[b : b + 1], 12)
            for mode in asked.modes:
                found = _decoded(asked.model, together.cache(mode), mode, tokens)[b]
                expected = _decoded(asked.model, alone.cache(mode), mode, tokens[b : b + 1])[0]
                torch.testing.assert_close(found, expected, rtol=0, atol=5e-4)


def test_perplexity_run():
    import quality_runs as runs

    asked = subject()
    windows = prompts(CPU, 3, 96)
    parts = list(runs.perplexity(asked, windows, 32))
    assert [len(part) for part in parts] == [3] * len(MODES)
    rows = {part[0]["mode"]: part for part in parts}
    with torch.no_grad():
        logits = asked.model(windows).logits[:, -33:-1].log_softmax(-1)
    wanted = -logits.gather(2, windows[:, -32:, None])[..., 0].unflatten(1, (2, 16)).mean(2)
    for name in ("exact", "sdpa"):
        losses = torch.tensor([row["losses"] for row in rows[name]])
        torch.testing.assert_close(losses, wanted, rtol=0, atol=5e-4)
        for row in rows[name]:
            assert row["kl"] < 1e-6 and row["agreement"] == 1 and row["kv_read"] == 1
    for name in MODES[2:]:
        for row in rows[name]:
            assert row["kl"] > 1e-3 and row["kv_read"] < 1 and row["agreement"] < 1
    # With nothing left out the baselines are exact; batches of another size change nothing.
    asked = subject(("exact", "streaming", "quest"), share=1.0, batch=2)
    parts = list(runs.perplexity(asked, windows, 32))
    assert [len(part) for part in parts] == [2, 2, 2, 1, 1, 1]
    for row in (row for part in parts for row in part):
        expected = torch.tensor(rows["exact"][row["window"]]["losses"])
        torch.testing.assert_close(torch.tensor(row["losses"]), expected, rtol=0, atol=1e-3)
        assert row["kl"] < 1e-4


def test_ruler_run():
    import quality_prompts
    import quality_runs as runs

    questions = quality_prompts.ruler_questions("multikey", Words(), 320, 6)
    asked = subject()
    (first, second) = runs.ruler(asked, questions.part(1, 6))  # a batch of four and one of one
    assert [row["question"] for row in first] == [1, 2, 3, 4] * len(MODES)
    assert [row["question"] for row in second] == [5] * len(MODES)
    rows = {(row["mode"], row["question"]): row for row in (*first, *second)}
    # An answer is what generate() says, up to its stop token, whatever the others of its batch do.
    for number in range(1, 6):
        ids = torch.tensor([questions.asked[number].ids])
        whole = asked.model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=100)
        text = Words().decode(whole[0, 320:].tolist())
        for mode in ("exact", "sdpa"):
            assert rows[mode, number]["answer"] == text
        for mode in MODES:
            assert (rows[mode, number]["kv_read"] == 1) == (mode in ("exact", "sdpa"))


@pytest.mark.parametrize("name", ["MAC", "quest"])
def test_answers_end_on_their_own(name, monkeypatch):
    """A request that stops early has the tokens and the share of a batch that was stopped there."""
    import quality_runs as runs

    asked = subject(("exact", name))
    (mode,) = asked.modes[1:]
    with torch.no_grad():
        prefill = asked.prefill(prompts(CPU, 3, 60), 24)
        monkeypatch.setattr(runs, "stop_tokens", lambda subject: [])
        texts, _ = runs._greedy(asked, mode, prefill, 24)
        assert [len(text) for text in texts] == [24] * 3
        at, stop = next(
            (i, token)
            for i, token in enumerate(texts[0])
            if i > 2 and token not in texts[0][:i] and token not in texts[1]
        )
        short, expected = runs._greedy(asked, mode, prefill, at + 1)
        monkeypatch.setattr(runs, "stop_tokens", lambda subject: [stop])
        found, reads = runs._greedy(asked, mode, prefill, 24)
    assert found[0] == short[0] == texts[0][: at + 1] and found[1] == texts[1]
    assert reads[0] == expected[0] and (name == "quest" or reads[1] != expected[1])


def test_score_needs_every_answer():
    from quality_runs import _all_in

    score = _all_in(("17", "Abc"))
    assert score("it is 17, ABC") == 1 and score("abc") == 0.5 and score("1 7") == 0


def test_generation_run(monkeypatch):
    import quality_runs as runs

    asked = subject(("exact", "sdpa", "MAC", "quest"))
    rows = [row for part in runs.generation(asked, prompts(CPU, 3, 60), 24) for row in part]
    assert len(rows) == 4 * 3
    for row in rows:
        assert row["tokens"] == 25 and 0 < row["distinct_4grams"] <= 1
        if row["mode"] in ("exact", "sdpa"):
            assert row["agrees_for"] == 25 and row["same_token"] == 1 and row["kl"] < 1e-6
        else:
            assert row["kl"] > 1e-3 and row["kv_read"] < 1
            # Its own text leaves exact's where, on exact's text, it would have chosen otherwise.
            assert (row["agrees_for"] == 25) == (row["same_token"] == 1)
    assert any(row["agrees_for"] < 25 for row in rows)
    monkeypatch.setattr(runs, "stop_tokens", lambda subject: [2])
    choice = runs.Choice(asked, torch.Size([2, 4]), repetition_penalty=2.0)
    logits = torch.tensor([[1.5, 2.0, 9.0, -1.0], [-3.0, -2.0, 0.0, -5.0]])
    assert choice(logits).tolist() == [1, 1]
    choice.take(torch.tensor([1, 1]))
    assert choice(logits).tolist() == [0, 0]  # 2.0 became 1.0, -2.0 became -4.0
    assert logits[0, 2] == 9


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
