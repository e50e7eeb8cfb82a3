"""A `vllm serve` process and a client of its OpenAI API, for benchmarks and tests.

Only the standard library is needed here; vLLM is in whatever environment runs this.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Request:
    """One call of /v1/completions, greedy, without a stop at the end-of-text token.

    Attributes:
        prompt: the text, or its tokens.
        max_tokens: to generate.
        cancel_after: close the connection after as many tokens, or None.
        delay: seconds to wait before it is sent.
        logprobs: of how many of the likeliest tokens, None for none.
        sampling: further parameters of the call, instead of greedy ones.
    """

    prompt: str | list[int]
    max_tokens: int
    cancel_after: int | None = None
    delay: float = 0.0
    logprobs: int | None = 2
    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Answer:
    """What came of a request.

    Attributes:
        tokens: generated, as ids.
        top: for each of them the ids of the two likeliest and their log-probabilities.
        prompt_tokens: as vLLM counts them.
        first: seconds from sending to the first token.
        last: seconds from sending to the last.
        times: seconds from sending to each event that brought tokens.
    """

    tokens: list[int] = field(default_factory=list)
    top: list[dict[int, float]] = field(default_factory=list)
    prompt_tokens: int = 0
    first: float = 0.0
    last: float = 0.0
    times: list[float] = field(default_factory=list)


class Server:
    """A server, from `with` until its end.

    Args:
        model: a folder.
        arguments: further ones of `vllm serve`.
        environment: variables on top of this process's.
        log: a file for its output.
        start_seconds: how long it may take to start.
    """

    def __init__(
        self,
        model: Path,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        start_seconds: float = 240,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        self._start_seconds = start_seconds
        self._command = self.command(model, arguments)
        self._environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            **environment,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def command(self, model: Path, arguments: Sequence[str]) -> list[str]:
        """What starts it."""
        return [
            *(str(Path(sys.executable).with_name("vllm")), "serve", str(model)),
            *("--served-model-name", "model", "--host", "127.0.0.1", "--port", str(self.port)),
            *arguments,
        ]

    def start(self) -> None:
        """Begin to start, so that others can do so too before `with` waits for it."""
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its workers can be ended with it
            )

    def __enter__(self) -> Server:
        if self._process is None:
            self.start()
        assert self._process is not None
        try:
            self._wait(self._process)
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self._start_seconds
        while time.monotonic() < deadline:
            if process.poll() is not None:
                break
            try:
                if self._get("/health")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.3)
        raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-6000:]}")

    def end(self) -> None:
        """End the server and its workers, if it was started."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", path)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text

    def metrics(self) -> dict[str, float]:
        """The server's Prometheus metrics, the values of all labels added up."""
        totals: dict[str, float] = {}
        for line in self._get("/metrics")[1].splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = name.split("{")[0]
                totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    def settle(self) -> None:
        """On a GPU, have the plugin publish its counters: once a second, as a step begins."""
        time.sleep(1.1)
        self.complete(Request([1, 2, 3], 2, logprobs=None))

    def complete_all(self, requests: Sequence[Request]) -> list[Answer]:
        """The answers to requests that are all sent at once (after their delays)."""
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(self.complete, requests))

    def complete(self, request: Request) -> Answer:
        """Send one request and wait for its end, or cancel it."""
        time.sleep(request.delay)
        body = {
            "model": "model",
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": request.logprobs,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **request.sampling,
        }
        answer = Answer()
        start = time.perf_counter()
        with closing(self.stream("/v1/completions", body)) as events:  # also where it is cancelled
            for event in events:
                if event.get("usage"):
                    answer.prompt_tokens = event["usage"]["prompt_tokens"]
                for choice in event["choices"]:
                    answer.last = time.perf_counter() - start
                    answer.first = answer.first or answer.last
                    answer.times += [answer.last] * len(choice["token_ids"])
                    answer.tokens += choice["token_ids"]
                    answer.top += [
                        {
                            int(token.removeprefix("token_id:")): logprob
                            for token, logprob in top.items()
                        }
                        for top in (choice["logprobs"] or {"top_logprobs": []})["top_logprobs"]
                    ]
                if request.cancel_after is not None and len(answer.tokens) >= request.cancel_after:
                    break
        return answer

    def stream(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Post a request and yield the events of its answer; the connection ends with them."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(body), headers)
        with closing(connection), connection.getresponse() as response:
            if response.status != 200:
                raise RuntimeError(f"status {response.status}: {response.read().decode()}")
            for line in response:
                text = line.decode().strip()
                if text == "data: [DONE]":
                    return
                if text.startswith("data: "):
                    yield json.loads(text.removeprefix("data: "))
