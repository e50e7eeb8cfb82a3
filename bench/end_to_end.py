"""transformers' `generate` with a real model: exact decode, reuse, and SDPA; time for each token.

    python bench/end_to_end.py [--model FOLDER] [--contexts 1024 2048 4096 8000] [--json FILE]

Each context is prefilled once; every way of attending then generates from a copy of that cache, in
turns, so that a machine that changes its speed does so for all. The prefill is not timed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from mac_attn import ReuseConfig
from mac_attn.info import info

MODES = {"exact": "exact", "reuse": "MAC reuse", "packed-sdpa": "SDPA, heads packed"}


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
    from transformers.utils import logging as transformers_logging

    import mac_attn.integrations.transformers  # noqa: F401  (registers attention "mac")
    from mac_attn.demo import model as models

    transformers_logging.set_verbosity_error()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, tokenizer, name = models.load(options.model, getattr(torch, options.dtype), device)
    print(f"{name}, {options.dtype}, {info()['gpu'] or info()['simd']}; torch {torch.__version__}")
    print(f"command: python {' '.join(sys.argv)}")
    print(f"{options.new_tokens} tokens generated, median of {options.rounds} rounds")
    print("\ncontext  attention            tokens/s  ms/token  of it attention  KV read  hit rate")
    rows = []
    for context in options.contexts:
        ids = models.build_prompt(tokenizer, models.python_reference(), context).to(device)
        for row in measure(model, ids, options.new_tokens, options.rounds, ReuseConfig()):
            rows.append(row)
            reused = (
                f"{row['kv_read_share']:8.1%}  {row['hit_rate']:8.1%}" if row["hit_rate"] else ""
            )
            print(
                f"{row['context']:7}  {MODES[row['mode']]:18}  {1e3 / row['ms']:9.1f}  "
                f"{row['ms']:8.2f}  {row['attention_ms'] / row['ms']:15.0%}  {reused}",
                flush=True,
            )
    if options.json:
        options.json.write_text(
            json.dumps({"build": info(), "model": name, "rows": rows}, indent=1)
        )


@torch.no_grad()
def measure(
    model, ids: torch.Tensor, new_tokens: int, rounds: int, config: ReuseConfig
) -> list[dict]:
    """For every mode the medians over the rounds: milliseconds a token, and in attention."""
    from mac_attn.integrations.transformers import AttentionTimer, MacCache

    base = MacCache(model, max_length=ids.shape[1] + new_tokens, config=config)
    model(ids[:, :-1], past_key_values=base, logits_to_keep=1)
    before = base.stats()
    times: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    shares = {}
    for round_ in range(rounds + 1):  # the first one allocates and starts threads
        for mode in MODES:
            cache = copy.deepcopy(base)
            cache.mode = mode
            with AttentionTimer() as timer:
                start = time.perf_counter()
                model.generate(
                    ids,
                    past_key_values=cache,
                    max_new_tokens=new_tokens,
                    min_new_tokens=new_tokens,
                    do_sample=False,
                )
                attention = timer.lap()
                if ids.is_cuda:
                    torch.cuda.synchronize(ids.device)
                seconds = time.perf_counter() - start
            if round_ > 0:
                times[mode].append((1e3 * seconds / new_tokens, 1e3 * attention / new_tokens))
            if mode == "reuse":
                stats = cache.stats()
                heads = (stats.steps - before.steps) * stats.num_qo_heads
                full = stats.kv_tokens_full - before.kv_tokens_full
                shares = {
                    "hit_rate": (stats.query_head_hits - before.query_head_hits) / heads
                    if heads
                    else 0,
                    "kv_read_share": (stats.kv_tokens_read - before.kv_tokens_read) / full
                    if full
                    else 1,
                }
    return [
        {
            "context": ids.shape[1],
            "mode": mode,
            "ms": median(ms for ms, _ in times[mode]),
            "attention_ms": median(ms for _, ms in times[mode]),
            **(shares if mode == "reuse" else {"hit_rate": 0, "kv_read_share": 1}),
        }
        for mode in MODES
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder; default: SmolLM2 from its wheel")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 4096, 8000])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    main()
