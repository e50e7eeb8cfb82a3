"""Throughput of `vllm serve` without the plugin, with it, and with it but without reuse.

    make vllm && .venv-vllm/bin/python bench/serve_vllm.py [--contexts 1000 3000 6000] [--json FILE]

All servers are up at once and get the same requests in turns, so that a machine that changes its
speed does so for all; those whose turn it is not are idle. A turn is a number of requests at once,
each with a prompt of its own that no server has seen, so that prefix caches are of no use.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from vllm_server import Answer, Request, Server

MODES = {
    "vLLM": None,
    "plugin, exact": {"threshold": 0},
    "plugin": {},
}


@dataclass
class Turns:
    """What a server did at one context length."""

    answers: list[list[Answer]] = field(default_factory=list)
    hits: float = 0.0
    heads: float = 0.0
    read: float = 0.0
    full: float = 0.0

    def row(self, reference: Turns) -> dict[str, Any]:
        """The figures, and how far the outputs are those of another server."""
        turns = [
            (sum(len(a.tokens) for a in turn) / max(a.last for a in turn)) for turn in self.answers
        ]
        answers = [answer for turn in self.answers for answer in turn]
        same = [
            next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y), n)
            for a, b in zip(answers, (b for turn in reference.answers for b in turn), strict=True)
            if (n := len(a.tokens))
        ]
        return {
            "prompt_tokens": median(a.prompt_tokens for a in answers),
            "tokens_per_second": median(turns),
            "first_token_s": median(a.first for a in answers),
            # The requests of a turn end their prefill one after another; what the others decode
            # meanwhile waits for it. From the last first token on, all decode together.
            "ms_per_token": median(map(_decode_ms, self.answers)),
            "hit_rate": self.hits / self.heads if self.heads else None,
            "kv_read_share": self.read / self.full if self.full else None,
            "same_tokens": sum(same) / sum(len(a.tokens) for a in answers),
        }


def _decode_ms(turn: list[Answer]) -> float:
    """Milliseconds of a step in which all requests of a turn decode."""
    together = max(answer.first for answer in turn)
    steps = max(
        sum(when > together for when in answer.times) / (answer.last - together)
        for answer in turn
        if answer.last > together
    )
    return 1e3 / steps


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
    from transformers import AutoTokenizer

    from mac_attn.demo.model import folder, python_reference

    model = folder(options.model)
    ids = AutoTokenizer.from_pretrained(model)(python_reference()).input_ids
    decoder = AutoTokenizer.from_pretrained(model)
    print(f"{model.name}, {options.dtype}; {platform.processor() or platform.machine()}")
    print(f"command: python {' '.join(sys.argv)}")
    print(
        f"{options.batch} requests at once, {options.new_tokens} tokens each, median of "
        f"{options.rounds} turns; seeded: {options.seed} tokens of a prompt"
    )
    arguments = [
        *("--dtype", options.dtype, "--max-num-seqs", str(options.batch)),
        *("--max-model-len", str(max(options.contexts) + options.new_tokens + 200)),
        *options.server_arguments,
    ]
    rows = []
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {
            name: Server(model, arguments, _environment(options, config), logs / name, 400)
            for name, config in MODES.items()
            if name in options.servers
        }
        for server in servers.values():
            stack.callback(server.end)
            server.start()
        for server in servers.values():
            stack.enter_context(server)
        for server in servers.values():  # what is compiled or allocated at first use
            server.complete(Request(decoder.decode(ids[-200:]), 8))
        print(
            "\ncontext  server         tokens/s  first token  ms/token  same tokens  KV read  hits"
        )
        begin = 0
        for context in options.contexts:
            turns = {name: Turns() for name in servers}
            for _ in range(options.rounds):
                prompts = [
                    decoder.decode(ids[begin + i * context : begin + (i + 1) * context])
                    for i in range(options.batch)
                ]
                begin += options.batch * context
                if begin + options.batch * context > len(ids):
                    begin = 7  # other cuts of the text, so that no prefix is known
                requests = [Request(prompt, options.new_tokens) for prompt in prompts]
                for name, server in servers.items():
                    take_turn(turns[name], server, requests)
            for name, turn in turns.items():
                row = {"context": context, "server": name, **turn.row(next(iter(turns.values())))}
                rows.append(row)
                print(_line(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=1))


def take_turn(
    turns: Turns,
    server: Server,
    requests: list[Request],
    settle: bool = False,
) -> None:
    """Send the requests to a server and add what came of it; `settle`: see `Server.settle`."""
    before = server.metrics()
    turns.answers.append(server.complete_all(requests))
    if settle:
        server.settle()
    after = server.metrics()

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    turns.hits += grown("mac_attn:query_head_hits_total")
    turns.heads += grown("mac_attn:query_heads_total")
    turns.read += grown("mac_attn:kv_tokens_read_total")
    turns.full += grown("mac_attn:kv_tokens_full_total")


def _environment(options: argparse.Namespace, config: dict[str, float] | None) -> dict[str, str]:
    space = {"VLLM_CPU_KVCACHE_SPACE": str(options.kv_gib), "MAC_ATTN_VLLM": "0"}
    if config is None:
        return space
    return {
        **space,
        "MAC_ATTN_VLLM": "1",
        "MAC_ATTN_VLLM_CONFIG": json.dumps(config),
        "MAC_ATTN_VLLM_SLOTS": str(options.batch),
        "MAC_ATTN_VLLM_SEED": str(options.seed),
    }


def _line(row: dict[str, Any]) -> str:
    reused = ""
    if row["hit_rate"] is not None:
        reused = f"{row['kv_read_share']:7.1%}  {row['hit_rate']:.1%}"
    return (
        f"{row['context']:7}  {row['server']:13}  {row['tokens_per_second']:8.1f}  "
        f"{row['first_token_s']:9.2f} s  {row['ms_per_token']:8.1f}  {row['same_tokens']:11.1%}  "
        f"{reused}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="folder; SmolLM2-135M-Instruct without")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1000, 3000, 6000])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0, help="MAC_ATTN_VLLM_SEED")
    parser.add_argument("--kv-gib", type=int, default=1, help="KV cache of each server")
    parser.add_argument("--servers", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument(
        "server_arguments", nargs="*", help="further ones of `vllm serve`, after --"
    )
    return parser


if __name__ == "__main__":
    main()
