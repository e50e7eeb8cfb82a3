"""A server of SGLang and a client of it, as vllm_server.py has them for vLLM."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from vllm_server import Answer, Request, Server


class SGLangServer(Server):
    """A server, from `with` until its end. Args: as vLLM's, of `sglang.launch_server`."""

    def command(self, model: Path, arguments: Sequence[str]) -> list[str]:
        """What starts it."""
        return [
            *(sys.executable, "-W", "ignore", "-m", "sglang.launch_server"),
            *("--model-path", str(model), "--host", "127.0.0.1", "--port", str(self.port)),
            *("--skip-tokenizer-init", "--skip-server-warmup", "--enable-metrics", *arguments),
        ]

    def complete(self, request: Request) -> Answer:
        """Send one request, a prompt of tokens, and wait for its end, or cancel it."""
        time.sleep(request.delay)
        sampling = {"temperature": 0, "ignore_eos": True, **request.sampling}
        body = {
            "input_ids": request.prompt,
            "sampling_params": {"max_new_tokens": request.max_tokens, **sampling},
            "stream": True,
        }
        if request.logprobs is not None:
            body |= {"return_logprob": True, "top_logprobs_num": request.logprobs}
        answer = Answer()
        start = time.perf_counter()
        with closing(self.stream("/generate", body)) as events:  # also where it is cancelled
            for event in events:
                if "output_ids" not in event:
                    raise RuntimeError(f"an answer without tokens: {event}")
                meta = event["meta_info"]
                answer.last = time.perf_counter() - start
                answer.first = answer.first or answer.last
                answer.prompt_tokens = meta.get("prompt_tokens", 0)
                answer.times += [answer.last] * (len(event["output_ids"]) - len(answer.tokens))
                answer.tokens = list(event["output_ids"])  # all so far
                answer.top = [
                    {token: logprob for logprob, token, _ in top or []}
                    for top in meta.get("output_top_logprobs") or []
                ]
                if request.cancel_after is not None and len(answer.tokens) >= request.cancel_after:
                    break
        return answer
