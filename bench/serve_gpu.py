"""Time per token of a server on a GPU, against context and hits, with and without the plugin.

    python bench/serve_gpu.py [--engine sglang] [--cases 16x32768 4x126976] [--rates 0.5 0.9 1]

Needs vLLM or SGLang and mac_attn in one environment (docs/vllm.md, docs/sglang.md). The model has
the shape of Llama 3 8B and random weights; both servers run with the engine's default options, one
after the other, and get the same prompts of random tokens. How many heads hit is chosen by what is
drawn: a request's next token is with that probability one of eight, and else any other. The queries
of a token are nearly the same wherever it stands, so that one which was there before finds them in
the ring.

A turn's requests are sent at once. The first one, of 16 tokens, is the prefill; after that the
prompts are in the engine's prefix cache. "ms/token" is a step in which all requests decode, as the
client sees it; hits and keys read are the plugin's metrics of the turn.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_vllm import Turns, take_turn
from sglang_server import SGLangServer
from vllm_server import Request, Server

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
REPEATED = 8  # tokens that are drawn again and again


@dataclass(frozen=True)
class Engine:
    """How a server is started: its options by name, and what turns the plugin on."""

    name: str
    server: type[Server]
    always: tuple[str, ...]
    length: str
    batch: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    config: str  # the variable with the plugin's options


ENGINES = {
    "vllm": Engine(
        name="vLLM",
        server=Server,
        always=("--load-format", "dummy", "--skip-tokenizer-init"),
        length="--max-model-len",
        batch="--max-num-seqs",
        arguments=(),
        environment={"MAC_ATTN_VLLM": "1"},
        config="MAC_ATTN_VLLM_CONFIG",
    ),
    "sglang": Engine(
        name="SGLang",
        server=SGLangServer,
        always=("--load-format", "dummy"),
        length="--context-length",
        batch="--max-running-requests",
        arguments=("--decode-attention-backend", "mac"),
        environment={},
        config="MAC_ATTN_SGLANG_CONFIG",
    ),
}


def requests(case: tuple[int, int], tokens: int, rate: float, vocabulary: int) -> list[Request]:
    """The requests of a turn, whose tokens are with probability `rate` those that repeat."""
    draw = random.Random(str(case))
    # The logits of random weights are nearly equal: what is added to some decides their share.
    odds = rate / max(1 - rate, 1e-9) * (vocabulary - REPEATED) / REPEATED
    bias = {str(i): min(100.0, max(-100.0, math.log(odds or 1e-50))) for i in range(REPEATED)}
    sampling = {"temperature": 1.0, "logit_bias": bias}
    prompts = [[draw.randrange(vocabulary) for _ in range(case[1])] for _ in range(case[0])]
    return [Request(prompt, tokens, logprobs=None, sampling=sampling) for prompt in prompts]


def measure(
    server: Server, options: argparse.Namespace, rates: Sequence[float], vocabulary: int
) -> list[dict[str, Any]]:
    """The rows of one server."""
    rows = []
    for case in options.cases:
        # Also of what is compiled at its first use, and of steps in which all decode.
        prefill = server.complete_all(requests(case, 16, 0.5, vocabulary))
        for rate in rates:
            turns = Turns()
            take_turn(
                turns, server, requests(case, options.new_tokens, rate, vocabulary), settle=True
            )
            row = {"requests": case[0], "context": case[1], "repeated": rate, **turns.row(turns)}
            row["prefill_s"] = max(answer.first for answer in prefill)
            rows.append(row)
            print(_line(row), flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    config = (
        LLAMA_3_8B
        if options.model is None
        else json.loads((options.model / "config.json").read_text())
    )
    engine = ENGINES[options.engine]
    longest = max(context for _, context in options.cases) + options.new_tokens + 8
    common = [
        *(*engine.always, engine.length, str(longest)),
        *(engine.batch, str(max(batch for batch, _ in options.cases))),
        *options.server_arguments,
    ]
    print(f"command: python {' '.join(sys.argv)}\n{options.new_tokens} tokens each")
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config))
        for kind in options.servers:
            title, arguments = engine.name, common
            environment = dict.fromkeys(engine.environment, "0")
            rates = options.rates[-1:]  # nothing hits without the plugin: one turn is enough
            if kind == "plugin":
                title, arguments, rates = kind, [*common, *engine.arguments], options.rates
                environment = {**engine.environment, engine.config: options.config}
            print(f"\n{title}")
            print("requests  context  repeated   ms/token  tokens/s  prefill s    hits  KV read")
            with engine.server(folder, arguments, environment, folder / kind, 600) as server:
                rows[title] = measure(server, options, rates, config["vocab_size"])
    if options.json:
        options.json.write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=1))


def _line(row: Mapping[str, Any]) -> str:
    reused = ""
    if row["hit_rate"] is not None:
        reused = f"{row['hit_rate']:8.1%}{row['kv_read_share']:9.1%}"
    return (
        f"{row['requests']:8}{row['context']:9}{row['repeated']:10.0%}{row['ms_per_token']:11.2f}"
        f"{row['tokens_per_second']:10.0f}{row['prefill_s']:11.2f}{reused}"
    )


def _case(text: str) -> tuple[int, int]:
    batch, _, context = text.partition("x")
    return int(batch), int(context)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--engine", choices=ENGINES, default="vllm")
    parser.add_argument("--model", type=Path, help="folder with a config.json of another shape")
    parser.add_argument("--cases", type=_case, nargs="+", default=[(16, 32768), (4, 126976)])
    parser.add_argument("--rates", type=float, nargs="+", default=[0, 0.5, 0.9, 0.95, 1])
    parser.add_argument("--new-tokens", type=int, default=256)
    kinds = ["alone", "plugin"]
    parser.add_argument("--servers", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--config", default="{}", help="the plugin's options, as JSON")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("server_arguments", nargs="*", help="further ones of the server, after --")
    return parser


if __name__ == "__main__":
    main()
