"""SGLang's real scheduler and model runner with the backend `mac` (`make sglang` runs this).

Everything is SGLang's but its kernels, for which torch's operations stand (tests/sglang_platform):
requests, radix cache, retraction, pools, model, and the runner of its decode graphs with recorded
operations in place of CUDA's (sglang_tape.py). In float32 all outputs with a threshold of 0 are to
be those of SGLang's torch_native, token for token.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_traffic import random_model, request, traffic

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is not installed; `make sglang` has it", allow_module_level=True)

pytestmark = pytest.mark.slow

SMALL = {"entries": 64, "min_context": 64, "window": 64, "band": 16, "anchors": 8}
EXACT = {**SMALL, "threshold": 0}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("llama"))


def run(
    folder: Path,
    model: Path,
    rounds: list[list[dict[str, Any]]],
    config: dict[str, Any] | None,
    *,
    page_size: int = 1,
    graphs: bool = False,
    slots: int | None = 3,
    one_number: bool = False,
    options: dict[str, Any] | None = None,
    **environment: str,
) -> dict[str, Any]:
    """The answers of a scheduler; without a `config` that of SGLang's own backend."""
    server = {
        "model_path": str(model),
        "skip_tokenizer_init": True,
        "device": "cpu",
        "dtype": "float32",
        "attention_backend": "torch_native",
        "decode_attention_backend": None if config is None else "mac",
        "page_size": page_size,
        "max_total_tokens": 2048,
        "max_running_requests": 6,
        "mem_fraction_static": 0.5,
        "chunked_prefill_size": 256,
        "disable_overlap_schedule": True,
        "cuda_graph_bs_decode": [1, 2, 4, 6],
        **(options or {}),
    }
    job = {"server": server, "rounds": rounds, "graphs": graphs, "one_number": one_number}
    (folder / "job.json").write_text(json.dumps(job))
    environment = {
        **os.environ,
        "MAC_ATTN_SGLANG_CONFIG": json.dumps(config or {}),
        "MAC_ATTN_SGLANG_SLOTS": "" if slots is None else str(slots),
        "OMP_NUM_THREADS": "2",
        **environment,
    }
    script = Path(__file__).with_name("sglang_scheduler.py")
    command = [sys.executable, "-W", "ignore", str(script), "job.json", "answers.json"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    answers: dict[str, Any] = json.loads((folder / "answers.json").read_text())
    answers["log"] = done.stdout + done.stderr
    return answers


@pytest.fixture(scope="session")
def native(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """The tokens that SGLang's own backend answers the traffic with."""
    answers = run(tmp_path_factory.mktemp("native"), llama, [traffic()], None)
    tokens: list[list[int]] = answers["rounds"][0]["tokens"]
    assert len({tuple(some) for some in tokens}) == len(tokens)  # it does not answer all alike
    return tokens


def check_exact(native: list[list[int]], answers: dict[str, Any]) -> None:
    (seen,) = answers["rounds"]
    for one, expected, tokens in zip(traffic(), native, seen["tokens"], strict=True):
        if one["cancel"] is None:
            assert len(tokens) == one["length"]
        length = min(len(tokens), len(expected))  # a cancelled one may stop a token later
        assert tokens[:length] == expected[:length], one["rid"]
    assert seen["cached"] > 0, "the radix cache had no part in it"
    assert seen["most_running"] > 3, "there were slots for all"
    rings = answers["rings"]
    assert rings["layers"] == 2
    assert rings["steps"] > 100
    assert rings["hits"] == 0
    assert rings["read_share"] == 1


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_exact_reuse_answers_what_sglang_answers(
    llama: Path, native: list[list[int]], tmp_path: Path, page_size: int, graphs: bool
) -> None:
    """Shared prefixes, chunked prefill, cancelled requests, more requests than slots."""
    answers = run(tmp_path, llama, [traffic()], EXACT, page_size=page_size, graphs=graphs)
    check_exact(native, answers)
    assert "MAC-Attention serves 2 of 2 layers: 3 slots of" in answers["log"]
    assert answers["log"].count("all 3 slots are in use: further requests are exact") == 1
    if graphs:  # every step of decode but none of prefill
        assert answers["replays"] > 40
    else:
        assert answers["replays"] == 0


def test_batches_of_prefill_and_decode(
    llama: Path, native: list[list[int]], tmp_path: Path
) -> None:
    """Tokens that are decoded beside a prompt's are SGLang's; a ring starts anew after them."""
    mixed = {"enable_mixed_chunk": True}
    answers = run(tmp_path, llama, [traffic()], EXACT, graphs=True, options=mixed)
    check_exact(native, answers)
    assert answers["rounds"][0]["mixed"] > 5


def test_slots_by_a_share_of_the_kv_cache(
    llama: Path, native: list[list[int]], tmp_path: Path
) -> None:
    """2,048 tokens of 4 KV heads of 32 in two layers are 4 MiB; of a half of it the log tells."""
    share = {"MAC_ATTN_SGLANG_SHARE": "0.5"}
    answers = run(tmp_path, llama, [traffic()], EXACT, slots=None, **share)
    check_exact(native, answers)
    found = re.search(r"(\d+) slots of ([\d.]+) MiB, ([\d.]+) MiB in all, 50% of", answers["log"])
    assert found is not None
    assert int(found[1]) == int(2 / float(found[2]))
    assert 0.9 < float(found[3]) <= 2.1  # the rings, and a little beside them
    assert "further requests are exact" in answers["log"]


def test_retracted_requests(llama: Path, native: list[list[int]], tmp_path: Path) -> None:
    """Every third step takes a request's KV cache away; it is computed anew, as its ring is."""
    answers = run(tmp_path, llama, [traffic()], EXACT, graphs=True, SGLANG_TEST_RETRACT="1")
    check_exact(native, answers)
    assert answers["rounds"][0]["retracted"] > 5


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_reuse_keeps_to_the_request(llama: Path, tmp_path: Path, graphs: bool) -> None:
    """With hits, a request in the crowd is answered as it is alone, in whatever slot."""
    requests = [{**one, "length": 60} for one in traffic()]
    alone = [i for i, one in enumerate(requests) if one["cancel"] is None][1:7:2]
    rounds = [[{**requests[i], "rid": f"alone {i}", "turn": 0}] for i in alone] + [requests]
    config = {**SMALL, "threshold": 0.6}
    answers = run(tmp_path, llama, rounds, config, page_size=16, graphs=graphs, slots=6)
    *first, crowd = [one["tokens"] for one in answers["rounds"]]
    assert [crowd[i] for i in alone] == [one[0] for one in first]
    rings = answers["rings"]
    print(f"\n{rings['hits']} hits, {rings['read_share']:.1%} of the keys read")
    assert rings["hits"] > 200
    assert rings["read_share"] < 0.95


@pytest.mark.parametrize("one_number", [False, True])
def test_a_request_never_finds_the_ring_of_another(
    llama: Path, tmp_path: Path, one_number: bool
) -> None:
    """One slot, one name, and lengths that continue those of the request before.

    Everything in a ring would be hit. Each request decodes one token, so that only entries of
    another could be; where all have one number they are, which the test must notice.
    """
    draw = random.Random(1)
    # A request decodes one token at length n + 1; the next one's prompt has n + 1 tokens.
    rounds = [
        [request([draw.randrange(512) for _ in range(200 + i)], 2, "the same")] for i in range(6)
    ]
    config = {**SMALL, "anchors": 0, "threshold": 1e6, "max_drift": None}
    answers = run(tmp_path, llama, rounds, config, slots=1, one_number=one_number)
    assert answers["rings"]["steps"] == 6 * 2
    if one_number:
        assert answers["rings"]["hits"] > 0
        return
    assert answers["rings"]["hits"] == 0
    expected = run(tmp_path, llama, rounds, None)
    assert [r["tokens"] for r in answers["rounds"]] == [r["tokens"] for r in expected["rounds"]]
