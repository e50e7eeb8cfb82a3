"""A real SGLang server with the backend `mac` answers what it answers without it.

`make sglang` runs this: `python -m sglang.launch_server` with its default options (overlapped
scheduling, radix cache, chunked prefill) on the CPU, with torch's operations for its kernels
(tests/sglang_platform) and in float32.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from engine_traffic import random_model, traffic

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is not installed; `make sglang` has it", allow_module_level=True)

pytestmark = pytest.mark.slow

REQUESTS = traffic(24)
SMALL = {"entries": 64, "min_context": 64, "window": 64, "band": 16, "anchors": 8}


@contextmanager
def server(
    model: Path, log: Path, arguments: list[str], environment: Mapping[str, str]
) -> Iterator[int]:
    """The port of a server, which is stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    options = {
        "--model-path": str(model),
        "--port": str(port),
        "--device": "cpu",
        "--dtype": "float32",
        "--attention-backend": "torch_native",
        "--page-size": "16",
        "--max-total-tokens": "4096",
        "--max-running-requests": "8",
        "--chunked-prefill-size": "256",
        "--mem-fraction-static": "0.5",
    }
    command = [sys.executable, "-W", "ignore", "-m", "sglang.launch_server"]
    command += [part for pair in options.items() for part in pair]
    command += ["--skip-tokenizer-init", "--skip-server-warmup", "--enable-metrics", *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "2", **environment}
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=log.parent,  # not the sources', whose mac_attn may not be built
            env=variables,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        started = time.monotonic()
        while not answers(port):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() - started < 240, log.read_text()[-4000:]
            time.sleep(0.5)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(port: int) -> bool:
    try:
        return get(port, "/health") is not None
    except OSError:
        return False


def get(port: int, path: str) -> str | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    text = answer.read().decode()
    return text if answer.status == 200 else None


def generate(port: int, request: dict[str, Any]) -> list[int]:
    """The tokens of a request; of a cancelled one those until its connection is closed."""
    time.sleep(0.02 * request["turn"])
    body = {
        "input_ids": request["prompt"],
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": request["length"],
            "ignore_eos": True,
        },
        "stream": request["cancel"] is not None,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=240)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/generate", json.dumps(body), headers)
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    if request["cancel"] is None:
        tokens: list[int] = json.loads(answer.read())["output_ids"]
        return tokens
    tokens = []
    for line in answer:
        if line.startswith(b"data: {"):
            tokens = json.loads(line[len(b"data: ") :])["output_ids"]
        if len(tokens) >= request["cancel"]:
            break
    connection.close()
    return tokens


def generate_all(port: int) -> list[list[int]]:
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        return list(pool.map(lambda request: generate(port, request), REQUESTS))


def metrics(port: int) -> dict[str, float]:
    """The plugin's metrics, whatever their labels."""
    found: dict[str, float] = {}
    for line in (get(port, "/metrics") or "").splitlines():
        if line.startswith("mac_attn:"):
            name, value = line.split("{")[0].split(" ")[0], line.rsplit(" ", 1)[1]
            found[name] = found.get(name, 0.0) + float(value)
    return found


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def native(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What a server without the plugin answers."""
    with server(llama, tmp_path_factory.mktemp("native") / "log", [], {}) as port:
        tokens = generate_all(port)
        assert metrics(port) == {}
    assert len({tuple(some) for some in tokens}) > 20  # it does not answer all alike
    return tokens


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_server_answers_what_it_answers_without(
    llama: Path, native: list[list[int]], tmp_path: Path, ranks: int
) -> None:
    """24 requests at once, 8 running, 3 slots; what is read is at its endpoint and in its log."""
    cores = sorted(os.sched_getaffinity(0))[:ranks]
    if len(cores) < ranks:
        pytest.skip("SGLang wants a core for every rank")
    environment = {
        "MAC_ATTN_SGLANG_CONFIG": json.dumps({**SMALL, "threshold": 0}),
        "MAC_ATTN_SGLANG_SLOTS": "3",
        "MAC_ATTN_SGLANG_LOG_SECONDS": "1",
    }
    arguments = ["--decode-attention-backend", "mac"]
    if ranks > 1:
        arguments += ["--tp-size", str(ranks)]
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(map(str, cores))
    with server(llama, tmp_path / "mac", arguments, environment) as port:
        tokens = generate_all(port)
        counted: dict[str, float] = {}
        # Counts are read with a step of decode, once a second. A fast server is done with each of
        # those requests before the next one comes: these are more than there are slots, at once.
        long = [{"prompt": [5 + i] * 80, "length": 90, "turn": 0, "cancel": None} for i in range(6)]
        for _ in range(60):
            with ThreadPoolExecutor(len(long)) as pool:
                list(pool.map(partial(generate, port), long))
            counted = metrics(port)
            if counted.get("mac_attn:requests_turned_away_total"):
                break
            time.sleep(0.2)
    for request, want, have in zip(REQUESTS, native, tokens, strict=True):
        if request["cancel"] is None:
            assert len(have) == request["length"]
        length = min(len(want), len(have))
        assert have[:length] == want[:length], request["rid"]
    assert counted["mac_attn:query_heads_total"] > 0
    assert counted["mac_attn:query_head_hits_total"] == 0
    assert counted["mac_attn:requests_turned_away_total"] > 0
    read, full = (counted[f"mac_attn:kv_tokens_{part}_total"] for part in ("read", "full"))
    assert read == full > 0
    log = (tmp_path / "mac").read_text()
    assert "MAC-Attention serves 2 of 2 layers: 3 slots of" in log
    assert "MAC-Attention, 2 layers: " in log
    assert "decode_backend=mac, prefill_backend=torch_native" in log


def test_a_wrong_option_ends_the_start(llama: Path, tmp_path: Path) -> None:
    arguments = ["--decode-attention-backend", "mac"]
    environment = {"MAC_ATTN_SGLANG_SLOTS": "many"}
    with (
        pytest.raises(AssertionError, match="MAC_ATTN_SGLANG_SLOTS is 'many', must be an integer"),
        server(llama, tmp_path / "log", arguments, environment),
    ):
        pass
