"""bench/quality.py and modes.py: batches, modes, small runs of each kind."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import prompts, tiny_model  # noqa: E402
from words import Words  # noqa: E402

from mac_attn import ReuseConfig  # noqa: E402

pytestmark = pytest.mark.usefixtures("bench_modules")
CPU = torch.device("cpu")
SMALL = ReuseConfig(threshold=1e6, max_drift=None, window=32, band=8, anchors=4, min_context=16)
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
        (
            "exact",
            "MAC",
            "MAC:threshold=0.1,max_reuse_depth=1,granularity=group",
            "quest",
        )
    )
    assert mac.config == SMALL and exact.config is None and exact.share == 1
    assert changed.config.threshold == 0.1
    (chains,) = parsed(["MAC:anchors=0,max_reuse_depth=null"])
    assert chains.config.max_reuse_depth is None
    assert changed.config.band == SMALL.band and quest.share == 0.5
    assert mac.seed_key == changed.seed_key != parsed(["MAC:band=9"])[0].seed_key
    assert parsed(["streaming:share=0.25"])[0].share == 0.25
    path = tmp_path / "model.json"
    Calibration((ReuseConfig(), ReuseConfig(threshold=0.3)), 0.1, 0.1, 0.5).save(path)
    (calibrated,) = parsed([f"MAC:calibration={path}"])
    assert [c.threshold for c in calibrated.config] == [ReuseConfig().threshold, 0.3]
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
