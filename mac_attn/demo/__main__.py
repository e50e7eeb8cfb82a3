"""`python -m mac_attn.demo`: decode a real model with MAC-Attention and show what it does.

SmolLM2-135M-Instruct from a PyPI wheel reads some 6,000 tokens of Python's own documentation and
writes 256 more, with exact decode attention, with reuse and with torch SDPA at the same time. Works
without a network.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mac_attn import ReuseConfig
from mac_attn.info import info

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DEFAULTS = ReuseConfig()


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    # Set before transformers is imported: not even its version checks may reach for the network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging as transformers_logging

    from . import model as models
    from . import report
    from .run import Choice, measure
    from .verified import generate

    transformers_logging.set_verbosity_error()
    start = time.perf_counter()
    device = torch.device(options.device or _best_device())
    dtype = DTYPES[options.dtype or _best_dtype(device)]
    config = ReuseConfig(
        entries=options.entries,
        window=options.window,
        band=options.band,
        anchors=options.anchors,
        threshold=options.threshold,
        max_drift=options.max_drift,
        min_context=options.min_context,
    )
    print("loading the model ...", end="\r", file=sys.stderr)
    model, tokenizer, name = models.load(options.model, dtype, device)
    text = options.text.read_text("utf-8") if options.text else models.python_reference()
    ids = models.build_prompt(tokenizer, text, options.prompt_tokens)

    threads = torch.get_num_threads()
    where = f"{threads} CPU thread{'s' * (threads > 1)}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    heading = f"{name}, {str(dtype).removeprefix('torch.')}, {where}"
    settings = (
        f"{config.entries} entries, window {config.window}, band {config.band}, "
        f"anchors {config.anchors}, "
        f"threshold {config.threshold} ({config.threshold_mode})"
    )
    choice = Choice(_stop_tokens(model, tokenizer), options.repetition_penalty)
    result = measure(model, ids, options.new_tokens, config, choice)
    verified = None
    if options.lossless:
        drafts = replace(ReuseConfig.drafts(), band=config.band, min_context=config.min_context)
        verified = generate(model, ids, result.first_token, options.new_tokens, drafts, choice)
    figures = report.summary(result, verified)

    print(f"MAC-Attention demo: {heading}")
    print(f"{result.prompt_tokens:,} prompt tokens, {options.new_tokens} generated; {settings}\n")
    print(report.table(figures), end="\n\n")
    print(report.meaning(figures), end="\n\n")
    print(report.notes(figures), end="\n\n")
    print(report.texts(result, lambda tokens: str(tokenizer.decode(tokens))), end="\n\n")
    report.plot(
        result, f"{heading}\n{result.prompt_tokens:,} prompt tokens, {settings}", options.out
    )
    print(f"Plot: {options.out}")
    if options.json:
        run = {"model": name, "dtype": str(dtype), "config": asdict(config), "build": info()}
        options.json.write_text(json.dumps({**run, **figures}), "utf-8")
        print(f"Figures: {options.json}")
    seconds = time.perf_counter() - start
    print(f"Prefill took {result.prefill_seconds:.0f} s, everything {seconds:.0f} s.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mac_attn.demo",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="a local transformers model instead of SmolLM2")
    add("--text", type=Path, metavar="FILE", help="what the model reads (UTF-8)")
    add("--prompt-tokens", type=_positive, default=6000, metavar="N", help="default: %(default)s")
    add("--new-tokens", type=_positive, default=256, metavar="N", help="default: %(default)s")
    add("--device", help="cpu or cuda; default: cuda if mac_attn was built for it")
    add(
        "--dtype", choices=DTYPES, help="default: bfloat16 where the processor has it, else float32"
    )
    for option, meaning in (
        ("entries", "how many recent queries are kept"),
        ("window", "how many tokens back one may lie"),
        ("band", "newest tokens that are always attended afresh"),
        ("anchors", "sampled tokens that a hit attends exactly"),
        ("threshold", "how far apart two queries may be, relative to their length"),
        ("max_drift", "how far a hit may move logits"),
        ("min_context", "shortest context that is reused"),
    ):
        default = getattr(DEFAULTS, option)
        add(
            f"--{option.replace('_', '-')}",
            type=type(default),
            default=default,
            metavar="X" if isinstance(default, float) else "N",
            help=f"{meaning}; default: {default}",
        )
    add(
        "--repetition-penalty",
        type=float,
        default=1.1,
        metavar="X",
        help="of the greedy choice; a small model repeats itself without, which is what reuse is\n"
        "best at; 1 is none, default: %(default)s",
    )
    add(
        "--lossless",
        action="store_true",
        help="also let steps that reuse draft tokens, which an exact step verifies",
    )
    add("--out", type=Path, default=Path("mac_attn_demo.png"), help="plot; default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() and info()["cuda_arches"] else "cpu"


def _best_dtype(device: torch.device) -> str:
    # Without bfloat16 instructions a CPU converts every operand, which is slower than float32.
    has_bfloat16 = device.type == "cuda" or "bf16" in str(info()["simd"])
    return "bfloat16" if has_bfloat16 else "float32"


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that would end the text: they are left out, so that every run has the same length."""
    stop = {tokenizer.eos_token_id, model.config.eos_token_id}
    generation = getattr(model, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    stop.update(ids if isinstance(ids, list) else [ids])
    return sorted(token for token in stop if isinstance(token, int))


if __name__ == "__main__":
    main()
