"""What is reused within vLLM where drafts are verified, by the number of tokens of a step.

    python bench/vllm_drafts.py [--requests 8] [--context 2500] [--json FILE]

Needs vLLM and mac_attn in one environment (docs/vllm.md). Prompts are parts of Python's
documentation. Each row is a process of its own, in which vLLM runs without a server; the calls of
the plugin are counted. Of steps of one token and of those of more: hits of KV heads, and keys read,
over those that an exact step reads, once for all of its tokens. "KV read" is all keys read, over
those that exact steps of one token would read for as many tokens. The model that drafts is the
model itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NGRAM = {"method": "ngram", "prompt_lookup_min": 3, "prompt_lookup_max": 4}
# How drafts are made, and what the plugin is told besides.
ROWS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "no drafts": (None, {}),
    "n-gram, exact": (NGRAM, {"threshold": 0}),
    "n-gram": (NGRAM, {}),
    "draft model, exact": ({"method": "draft_model"}, {"threshold": 0}),
    "draft model": ({"method": "draft_model"}, {}),
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One row, in this process, whose environment says what the plugin is told."""
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    from mac_attn.demo.model import folder, python_reference

    model, (speculative, _) = folder(options.model), ROWS[options.one]
    ids = AutoTokenizer.from_pretrained(model)(python_reference()).input_ids
    if speculative is not None:
        speculative = {**speculative, "num_speculative_tokens": options.drafts}
        if speculative["method"] == "draft_model":
            speculative["model"] = str(model)
    llm = LLM(
        model=str(model),
        skip_tokenizer_init=True,
        dtype=options.dtype,
        max_model_len=options.context + options.new_tokens + options.drafts + 1,
        max_num_seqs=options.batch,
        speculative_config=speculative,
        enforce_eager=True,
    )
    counts = count_calls()
    prompts = [ids[i * options.context :][: options.context] for i in range(options.requests)]
    answers = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(
            max_tokens=options.new_tokens, temperature=0, ignore_eos=True, detokenize=False
        ),
        use_tqdm=False,
    )
    # The first token comes from the prompt.
    new = [len(answer.outputs[0].token_ids) - 1 for answer in answers]
    exact = sum(options.context + i + 1 for count in new for i in range(count))
    return counts.row(sum(new), exact)


class Calls:
    """What the plugin's calls have done, of steps of one token and of several."""

    def __init__(self) -> None:
        self.counters: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
        self.rings: dict[int, Any] = {}

    def add(self, call: Any, ring: Any, grown: Sequence[int]) -> None:
        """A call of a layer, by which its ring's counters have grown."""
        from mac_attn.stats import COUNTERS

        self.rings[id(ring)] = ring
        found = self.counters[call.width > 1]
        found.update(dict(zip(COUNTERS, grown, strict=True)))
        found["rows"] += len(call.rows.seq_lens)
        found["context"] += int(call.rows.seq_lens.sum()) * ring.num_kv_heads

    def row(self, new_tokens: int, exact: int) -> dict[str, Any]:
        """The figures; `exact` is keys that a KV head reads in exact steps of one token."""
        layers, heads = len(self.rings), sum(ring.num_kv_heads for ring in self.rings.values())
        one, several = self.counters[False], self.counters[True]
        both = one + several
        steps = both["rows"] // layers
        return {
            "steps": steps,
            "steps_of_drafts": several["rows"] // layers,
            "drafted": both["steps"] // layers - steps,
            "accepted": new_tokens - steps,
            "hits_of_one": one["kv_head_hits"] / max(1, one["kv_head_steps"]),
            "hits_of_several": several["kv_head_hits"] / max(1, several["kv_head_steps"]),
            "read_by_one": one["kv_tokens_read"] / max(1, one["context"]),
            "read_by_several": several["kv_tokens_read"] / max(1, several["context"]),
            "kv_read": both["kv_tokens_read"] / (exact * heads),
        }


def count_calls() -> Calls:
    """Count every call of the plugin from now on."""
    from mac_attn.integrations.vllm import attend

    calls, decode = Calls(), attend.decode

    def counted(layer: Any, call: Any, *states: Any) -> None:
        ring = layer.impl.mac.ring
        before = ring.counters.sum(0)
        decode(layer, call, *states)
        calls.add(call, ring, (ring.counters.sum(0) - before).tolist())

    attend.decode = counted
    return calls


def run(arguments: Sequence[str], config: dict[str, Any], slots: int) -> dict[str, Any]:
    """A row, from a process whose vLLM has the plugin with `config`."""
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "MAC_ATTN_VLLM": "1",
        "MAC_ATTN_VLLM_CONFIG": json.dumps(config),
        "MAC_ATTN_VLLM_SLOTS": str(slots),
    }
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{command}: vLLM ended\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    row: dict[str, Any] = json.loads(lines[-1])
    return row


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    if options.one:
        print("\n" + json.dumps(measure(options)))
        return
    arguments = []
    for name in ("requests", "batch", "context", "new_tokens", "drafts", "dtype", "model"):
        if (value := getattr(options, name)) is not None:
            arguments += ["--" + name.replace("_", "-"), str(value)]
    print(
        f"{options.requests} prompts of {options.context} tokens, {options.batch} at once, "
        f"{options.new_tokens} tokens each, {options.dtype}\n"
    )
    print(
        f"{'':20}{'accepted':>14}{'steps of one':>14}{'hits':>7}{'read':>7}"
        f"{'of more':>10}{'hits':>7}{'read':>7}{'KV read':>10}"
    )
    rows = {}
    for name in options.rows:
        told = ROWS[name][1] | ({"anchors": options.anchors} if options.anchors else {})
        row = run(["--one", name, *arguments], told, options.batch)
        rows[name] = row
        accepted = f"{row['accepted']} of {row['drafted']}"
        print(
            f"{name:20}{accepted:>14}{row['steps'] - row['steps_of_drafts']:14}"
            f"{row['hits_of_one']:7.1%}{row['read_by_one']:7.1%}"
            f"{row['steps_of_drafts']:10}{row['hits_of_several']:7.1%}{row['read_by_several']:7.1%}"
            f"{row['kv_read']:10.1%}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder; SmolLM2-135M-Instruct without")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument(
        "--batch", type=int, default=4, help="requests at once, which all have slots"
    )
    parser.add_argument("--context", type=int, default=2500)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--drafts", type=int, default=3)
    parser.add_argument("--anchors", type=int, help="that hits read; the default has 1024")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=ROWS, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
