"""Time of a decode step within vLLM, without the plugin and with it, without hits and with all.

    python bench/vllm_decode.py [--batch 16] [--context 32000] [--json FILE]

Needs vLLM and mac_attn in one environment (docs/vllm.md). Without `--model` the model has the
shape of Llama 3 8B and random weights: a step takes as long as with any others, and what is reused
does not matter here. Each row is a process of its own, in which vLLM runs without a server.

Prompts are random tokens, prefilled once and then kept by vLLM's prefix cache. Two generations
that differ only in their number of tokens tell what a step takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# What the plugin is told, None without it. The squared distance of two unrelated queries is about
# twice the squared length of one, so that with a threshold of 4 any finds its match.
ROWS: dict[str, dict[str, Any] | None] = {
    "vLLM": None,
    "nothing hits": {"threshold": 0},
    "nothing hits, no anchors": {"threshold": 0, "anchors": 0},
    "all hit": {"threshold": 4, "max_drift": None},
}
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
FIRST, LAST = 17, 145  # tokens of the two generations
LOW, HIGH = 10, 30000  # of the prompts' tokens: below any vocabulary's size


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One row, in this process, whose environment says whether the plugin is on."""
    import torch
    from vllm import LLM, SamplingParams

    cuda = torch.cuda.is_available()
    # Full graphs without compilation: it starts in seconds, and attention is the same.
    graphs = {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [options.batch],
    }
    folder = options.model or _folder_of_shape()
    llm = LLM(
        model=str(folder),
        load_format="auto" if options.model else "dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=options.context + LAST + 1,
        max_num_seqs=options.batch,
        compilation_config=graphs if cuda else {"mode": 0},
        enforce_eager=not cuda,
        **({"attention_backend": "FLASH_ATTN", "max_num_batched_tokens": 16384} if cuda else {}),
    )
    generator = torch.Generator().manual_seed(0)
    size = (options.batch, options.context)
    prompts = torch.randint(LOW, HIGH, size, generator=generator).tolist()

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False),
            use_tqdm=False,
        )
        return time.perf_counter() - start

    prefill = seconds(1)
    times = {n: sorted(seconds(n) for _ in range(options.rounds)) for n in (FIRST, LAST)}
    first, last = (t[len(t) // 2] for t in times.values())
    row = {"prefill_s": prefill, "ms": 1e3 * (last - first) / (LAST - FIRST)}
    engine = _plugin_engine()
    if engine is not None:
        counters = sum(ring.counters.sum(0).cpu() for ring in engine.rings.values())
        _, _, _, hits, read, full, _, _ = counters.tolist()
        heads = sum(
            int(ring.counters[:, 0].sum()) * ring.num_qo_heads for ring in engine.rings.values()
        )
        row |= {"hit_rate": hits / heads, "kv_read_share": read / full}
    return row


def _folder_of_shape() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="llama-shape-"))
    (folder / "config.json").write_text(json.dumps(LLAMA_3_8B))
    return folder


def _plugin_engine() -> Any:
    """The plugin's engine of this process, None without one."""
    import gc

    from mac_attn.integrations.vllm.engine import Engine

    gc.unfreeze()  # vLLM hides what there is at its start
    return next((o for o in gc.get_objects() if type(o) is Engine), None)


def run(
    script: str, arguments: Sequence[str], config: dict[str, Any] | None, slots: int
) -> dict[str, Any]:
    """What a script answers as JSON, from a process whose vLLM has the plugin with `config`."""
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "MAC_ATTN_VLLM": "0" if config is None else "1",
        "MAC_ATTN_VLLM_CONFIG": json.dumps(config or {}),
        "MAC_ATTN_VLLM_SLOTS": str(slots),
    }
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{command}: vLLM ended\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    row: dict[str, Any] = json.loads(lines[-1])
    return row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder; default: random weights")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=3, help="the middle one counts")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        print("\n" + json.dumps(measure(options)))
        return
    print(f"{options.batch} requests of {options.context} tokens; milliseconds of a decode step\n")
    print(f"{'':26}{'ms':>7}{'prefill s':>11}{'hits':>8}{'KV read':>9}")
    arguments = ["--one", "--batch", str(options.batch)]
    arguments += ["--context", str(options.context), "--rounds", str(options.rounds)]
    arguments += ["--model", str(options.model)] if options.model else []
    rows = {}
    for name in options.rows:
        rows[name] = row = run(__file__, arguments, ROWS[name], options.batch)
        shares = "".join(
            f"{row[key]:{width}.1%}"
            for key, width in (("hit_rate", 8), ("kv_read_share", 9))
            if key in row
        )
        print(f"{name:26}{row['ms']:7.2f}{row['prefill_s']:11.1f}{shares}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
