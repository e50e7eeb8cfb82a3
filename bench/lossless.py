"""Drafts that reuse, verified exactly: what it takes and what it gives, beside exact decode.

    python bench/lossless.py [--model FOLDER] [--text prose] [--contexts 4096 8000] [--json FILE]

The context is prefilled once; then every way of decoding generates from a copy of that cache, in
turns. "same" counts the tokens that are those of exact decode, which all are but for ties (in
bfloat16 a verification rounds otherwise than single steps do). "KV read" is keys and values that a
token reads, over what exact decode reads; "per check" is tokens for each verification. Without
`--text` the prompt is the demo's: a question about a text, by the model's chat template.
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
from typing import Any

import texts
import torch

from mac_attn import ReuseConfig
from mac_attn.info import info

CONFIGS = {
    "drafts": ReuseConfig.drafts(),
    "default": ReuseConfig(),
}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
    from transformers.utils import logging as transformers_logging

    import mac_attn.integrations.transformers  # noqa: F401  (registers attention "mac")
    from mac_attn.demo import model as models

    transformers_logging.set_verbosity_error()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, tokenizer, name = models.load(options.model, getattr(torch, options.dtype), device)
    print(f"{name}, {options.dtype}, {info()['gpu'] or info()['simd']}; torch {torch.__version__}")
    print(f"command: python {' '.join(sys.argv)}; {options.new_tokens} tokens generated")
    print("\ncontext  drafts by  at most  accepted  per check  KV read  ms/token  exact   same")
    rows = []
    for context in options.contexts:
        if options.text is None:
            ids = models.build_prompt(tokenizer, models.python_reference(), context)
        else:
            ids = texts.token_ids(options.text, model, tokenizer, context)
        ids = ids.to(device)
        for row in measure(model, ids, options.new_tokens, options.drafts, options.configs):
            rows.append(row)
            print(
                f"{row['context']:7}  {row['config']:9}  {row['drafts']:7}  "
                f"{row['acceptance']:8.1%}  {row['tokens_per_verification']:9.2f}  "
                f"{row['kv_read']:7.1%}"
                f"  {row['ms']:8.2f}  {row['exact_ms']:5.1f}  {row['same']}/{options.new_tokens}",
                flush=True,
            )
    if options.json:
        options.json.write_text(
            json.dumps({"build": info(), "model": name, "rows": rows}, indent=1)
        )
    return rows


@torch.no_grad()
def measure(
    model: Any, ids: torch.Tensor, new_tokens: int, drafts: Sequence[int], configs: Sequence[str]
) -> list[dict[str, Any]]:
    """For every config and number of drafts (0: as many as pay) the figures of the table."""
    from mac_attn.integrations.transformers import Lossless, MacCache

    base = MacCache(model, max_length=ids.shape[1] + new_tokens, config=ReuseConfig())
    model(ids[:, :-1], past_key_values=base, logits_to_keep=1)
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}

    def generate(cache: Any, **more: Any) -> tuple[list[int], float]:
        start = time.perf_counter()
        text = model.generate(ids, past_key_values=cache, **options, **more)
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)
        return text[0, ids.shape[1] :].tolist(), 1e3 * (time.perf_counter() - start) / new_tokens

    def exact() -> tuple[list[int], float]:
        cache = copy.deepcopy(base)
        cache.mode = "exact"
        return generate(cache)

    exact()  # allocates and starts threads
    rows = []
    for name in configs:
        cache_of_config = MacCache(
            model, max_length=ids.shape[1] + new_tokens, config=CONFIGS[name]
        )
        model(ids[:, :-1], past_key_values=cache_of_config, logits_to_keep=1)
        for number in drafts:
            want, exact_ms = exact()
            cache = copy.deepcopy(cache_of_config)
            method = Lossless(number or 15, adaptive=number == 0)
            got, ms = generate(cache, custom_generate=method)
            done = method.stats
            rows.append(
                {
                    "context": ids.shape[1],
                    "config": name,
                    "drafts": number or "as pay",
                    "acceptance": done.acceptance,
                    "tokens_per_verification": done.tokens_per_verification,
                    "kv_read": done.kv_read_share,
                    "ms": ms,
                    "exact_ms": exact_ms,
                    "same": sum(a == b for a, b in zip(got, want, strict=True)),
                }
            )
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder; default: SmolLM2 from its wheel")
    parser.add_argument("--text", choices=texts.NAMES)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 8000])
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument(
        "--drafts", type=int, nargs="+", default=[3, 6, 0], help="0: as many as pay"
    )
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    main()
