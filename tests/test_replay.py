"""bench/replay.py on a tiny model, its baselines and calibration.py."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import prompts, tiny_model  # noqa: E402

from mac_attn import ReuseConfig  # noqa: E402
from mac_attn.calibrate import capture  # noqa: E402

pytestmark = pytest.mark.usefixtures("bench_modules")
CPU = torch.device("cpu")


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
    small = {"entries": 32, "window": 32, "band": 8, "min_context": 0}
    for name, (config, _) in list(replay.CURVES.items()):
        options = ("granularity", "threshold_mode", "max_reuse_depth")
        options = {f: getattr(config, f) for f in options}
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
