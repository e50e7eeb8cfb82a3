"""The benchmarks run from end to end on the CPU and count what they planted."""

import json

import pytest
import torch

pytestmark = pytest.mark.usefixtures("bench_modules")
TINY = ["--device", "cpu", "--contexts", "2304", "--head-dim", "64", "--layouts", "8/2"]


def test_hit_curve(tmp_path):
    import hit_curve

    path = tmp_path / "curve.json"
    arguments = [*TINY, "--quick", "--batches", "3", "--rates", "0", "0.3", "0.9", "1"]
    hit_curve.main(
        [*arguments, "--rounds", "5", "--json", str(path), "--csv", str(tmp_path / "c.csv")]
    )
    result = json.loads(path.read_text())
    assert result["machine"]["torch"] == torch.__version__
    assert "--quick" in result["command"]
    (case,) = result["cases"]
    assert (case["layout"], case["batch"], case["context"]) == ("8/2", 3, 2304)

    peers = {peer["name"]: peer for peer in case["peers"]}
    assert peers["torch SDPA"]["us"] > 0
    for peer in peers.values():  # timed, or named with the reason
        assert (peer["us"] is None) == (not peer["variants"])
        assert peer["variants"] or peer["problems"]

    hits = {(p["granularity"], p["anchors"], p["rate"]): p["hits"] for p in case["points"]}
    # 24 query heads decide for themselves, or 6 KV heads for four query heads each.
    assert hits == {
        ("head", 0, 0.0): 0,
        ("head", 0, 0.3): 7,
        ("head", 0, 0.9): 22,
        ("head", 0, 1.0): 24,
        **{
            ("group", anchors, rate): 4 * kv_heads
            for anchors in (0, 1024)
            for rate, kv_heads in ((0.0, 0), (0.3, 2), (0.9, 5), (1.0, 6))
        },
    }
    for point in case["points"]:
        assert 0 < point["mac_us_low"] <= point["mac_us"] <= point["mac_us_high"]
        assert point["speedup_flashinfer"] is None and point["speedup_authors"] is None
        assert point["over_floor"] >= point["over_floor_max"] > 0
    for setting in (("head", 0), ("group", 0), ("group", 1024)):
        shares = [
            point["bytes_over_exact"]
            for point in case["points"]
            if (point["granularity"], point["anchors"]) == setting
        ]
        assert shares[0] > 1 > shares[-1]  # a miss searches the ring besides
        assert shares == sorted(shares, reverse=True)
    rows = (tmp_path / "c.csv").read_text().splitlines()
    assert len(rows) == 1 + len(case["points"])


def test_the_authors_setting(tmp_path):
    import hit_curve

    result = hit_curve.main([*TINY, "--authors", "--batches", "1", "--rounds", "3"])
    options = result["options"]
    assert (options["age"], options["entries"], options["page_size"]) == (64, 2048, 1)
    assert options["warm"] is True
    (case,) = result["cases"]
    (peer,) = case["peers"]  # their FlashInfer alone, timed or named with the reason
    assert peer["name"] == "FlashInfer" and (peer["variants"] or peer["problems"])
    assert {(p["granularity"], p["anchors"]) for p in case["points"]} == {("head", 0), ("group", 0)}
    # A hit attends afresh to band and age, keys and values of 2 KV heads of 64 in two bytes each.
    (all_hit,) = (p for p in case["points"] if p["granularity"] == "group" and p["rate"] == 1)
    fresh = (256 + 64) * 2 * 2 * 64 * 2
    assert fresh < all_hit["bytes"] < 2305 * 2 * 2 * 64 * 2


def test_stages(tmp_path):
    import stages

    path = tmp_path / "stages.json"
    arguments = [*TINY, "--batches", "1", "--anchors", "16", "--rounds", "5", "--json", str(path)]
    arguments += ["--chain", "2"]
    stages.main(arguments)
    rows = json.loads(path.read_text())["rows"]
    assert [row["heads"] for row in rows] == ["miss", "long", "hit"]
    for row in rows:
        assert set(row["us"]) == set(row["floor_us"]) == {*stages.COLUMNS}
        assert all(timing["us"] > 0 for timing in row["us"].values())


@pytest.mark.parametrize("rate, hits", [(0.0, 0), (0.05, 26), (0.95, 486), (1.0, 512)])
@pytest.mark.parametrize("spread", ["run", "even"])
def test_quota_is_exact(rate, hits, spread):
    from workload import Case, hit_mask

    case = Case(32, 4, 4096, batch=16)
    mask = hit_mask(case, "head", rate, spread)
    assert mask.shape == (16, 32) and int(mask.sum()) == hits
    grouped = hit_mask(case, "group", rate, spread).view(64, 8)
    assert torch.equal(grouped.any(1), grouped.all(1))
    assert int(grouped.all(1).sum()) == int(rate * 64 + 0.5)


def test_spreads():
    from workload import Case, hit_mask

    # The authors' masks at batch 64, 32/4 heads, hit rate 0.95, as published: of 256 KV heads one
    # misses with its last query head, twelve as a whole and one with its first five.
    case = Case(32, 4, 4096, batch=64)
    misses = (~hit_mask(case, "head", 0.95, "run")).view(256, 8)
    assert misses[0].tolist() == [False] * 7 + [True]
    assert misses[1:13].all() and misses[13].tolist() == [True] * 5 + [False] * 3
    assert not misses[14:].any()
    # Spread evenly the same misses touch every request.
    misses = ~hit_mask(case, "head", 0.95, "even")
    assert set(misses.sum(1).tolist()) <= {1, 2}


@pytest.mark.parametrize("age", [1, 2, "half", "oldest"])
def test_a_put_back_step_can_be_repeated(age):
    from workload import Case, PlantedRing, Workload, hit_mask, reuse_config

    import mac_attn

    case = Case(8, 2, 2304, batch=2, head_dim=64)
    work = Workload(case, torch.device("cpu"))
    cfg = reuse_config("group", 16)
    age = {"half": cfg.entries // 2, "oldest": cfg.entries}.get(age, age)
    ring = PlantedRing(work, cfg, age)
    mask = hit_mask(case, "group", 0.5, "even")
    outs = []
    for _ in range(3):
        ring.put_back(ring.on_device(mask))
        ring.check_match(work, ring.on_device(mask))
        outs.append(work.mac(ring.reuse))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    assert ring.reuse.stats().query_head_hits == 3 * int(mask.sum())
    # Where heads miss, the step is exact.
    exact = mac_attn.decode(work.q, work.kv, work.block_table, work.seq_lens)
    torch.testing.assert_close(outs[0][~mask], exact[~mask], rtol=0.02, atol=1e-3)


def test_end_to_end():
    pytest.importorskip("transformers")
    import end_to_end
    from tiny_models import prompts, tiny_model

    from mac_attn import ReuseConfig

    config = ReuseConfig(
        threshold=1e6, max_drift=None, window=16, band=8, anchors=2, min_context=16
    )
    cpu = torch.device("cpu")
    rows = end_to_end.measure(tiny_model(cpu), prompts(cpu, 1, 40), 5, 1, config)
    assert [row["mode"] for row in rows] == list(end_to_end.MODES)
    for row in rows:
        assert row["context"] == 40
        assert 0 < row["attention_ms"] < row["ms"]
        # 5 tokens take 5 steps: the last prompt token and 4 new ones. All queries hit.
        assert row["hit_rate"] == (1 if row["mode"] == "reuse" else 0)
        assert (row["kv_read_share"] < 1) == (row["mode"] == "reuse")


def test_serving_figures():
    from serve_vllm import Turns
    from vllm_server import Answer

    def answer(first: float, step: float, tokens: list[int]) -> Answer:
        times = [first + step * i for i in range(len(tokens))]
        return Answer(tokens, [], 100, first, times[-1], times)

    # Prefill until 3 s; then both decode, a token every 0.5 s.
    slow = Turns([[answer(1.0, 0.5, [1, 2, 3, 4, 5, 6, 7]), answer(3.0, 0.5, [1, 2, 3])]])
    row = slow.row(slow)
    assert row["ms_per_token"] == pytest.approx(500)
    assert row["tokens_per_second"] == pytest.approx(10 / 4)
    assert row["first_token_s"] == 2.0
    assert row["same_tokens"] == 1
    assert row["hit_rate"] is None
    other = Turns(
        [[answer(1.0, 0.5, [1, 2, 9, 4, 5, 6, 7]), answer(3.0, 0.5, [1, 2, 3])]], 3.0, 4.0, 1.0, 2.0
    )
    assert other.row(slow)["same_tokens"] == pytest.approx(5 / 10)  # up to a first difference
    assert (other.row(slow)["hit_rate"], other.row(slow)["kv_read_share"]) == (0.75, 0.5)


def test_float8(tmp_path):
    import float8

    path = tmp_path / "float8.json"
    float8.main([*TINY, "--batches", "2", "--rounds", "1", "--json", str(path)])
    (row,) = json.loads(path.read_text())
    steps = {f"{cache}{step}" for cache in ("", "float8 ") for step in float8.STEPS}
    assert row["us"].keys() == steps and all(step["us"] > 0 for step in row["us"].values())


def test_query_tokens(tmp_path):
    import query_tokens

    path = tmp_path / "tokens.json"
    options = ["--batches", "2", "--tokens", "1", "3", "--hits", "1", "0.5", "--anchors", "16"]
    query_tokens.main([*TINY, *options, "--rounds", "1", "--json", str(path)])
    (row,) = json.loads(path.read_text())
    assert row["us"].keys() == {"1", "1 1.0", "1 0.5", "3", "3 1.0", "3 0.5"}
    assert all(step["us"] > 0 for step in row["us"].values())


def test_lossless():
    pytest.importorskip("transformers")
    import lossless
    from tiny_models import prompts, tiny_model

    cpu = torch.device("cpu")
    rows = lossless.measure(tiny_model(cpu), prompts(cpu, 1), 12, [2, 0], ["drafts"])
    assert [row["drafts"] for row in rows] == [2, "as pay"]
    for row in rows:
        # No context is long enough to reuse: drafts are exact, and read as much as a token does.
        assert row["same"] == 12 and row["acceptance"] == 1
        assert row["tokens_per_verification"] > 1 and 0.8 < row["kv_read"] < 1.2
