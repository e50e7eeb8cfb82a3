"""Does the answer change? A real model with exact decode, with MAC, and with two baselines.

    python bench/quality.py perplexity [--context 8000 --steps 512]
    python bench/quality.py ruler [--lengths 2048 4096 8000 --samples 50 --tasks ...]
    python bench/quality.py generation [--context 4096 --tokens 2048]
    python bench/quality.py longbench FILE | longgenbench FILE

Every prompt is prefilled once and exactly; each way of attending then decodes from a copy of that
cache. Intervals are 95%: of a mean difference from exact decode, by bootstrap over the prompts
(perplexity: over blocks of 16 tokens). `--share` is the part of the KV cache that the baselines
read, of which `modes.py` says more; MAC's is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mac_attn import ReuseConfig
from mac_attn.info import info

if TYPE_CHECKING:
    from quality_runs import Subject

TASKS = ("single", "multikey", "multivalue", "multiquery", "vt", "cwe", "fwe")


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
    import modes
    import quality_runs as runs
    from transformers.utils import logging as transformers_logging

    from mac_attn.demo import model as models

    transformers_logging.set_verbosity_error()
    device = torch.device(options.device)
    model, tokenizer, name = models.load(options.model, getattr(torch, options.dtype), device)
    config = ReuseConfig(min_context=options.min_context)
    subject = runs.Subject(model, tokenizer, config, options.modes, options.share)
    print(f"{name}, {options.dtype}, torch {torch.__version__}, {info()['gpu'] or info()['simd']}")
    print(f"command: python {' '.join(sys.argv)}\n{config}")
    unknown = set(options.modes) - set(modes.MODES)
    if unknown or "exact" not in options.modes:
        sys.exit(f"--modes must be of {', '.join(modes.MODES)}, exact among them")
    rows = RUNS[options.run](subject, options)
    if options.json:
        command = " ".join(["python", *sys.argv])
        content = {"command": command, "machine": info(), "model": name, "rows": rows}
        options.json.write_text(json.dumps(content, indent=1))


def perplexity(subject: Subject, options: argparse.Namespace) -> list[dict[str, Any]]:
    import quality_runs as runs
    import texts

    print(
        "text       mode        perplexity  against exact     95% interval  mean KL  same token  KV"
    )
    rows = []
    for text in options.texts:
        length = options.context + options.steps
        ids = texts.token_ids(text, subject.model, subject.tokenizer, length)
        for row in runs.perplexity(subject, ids, options.steps):
            rows.append({"text": text} | row)
            low, high = row["interval"]
            print(
                f"{text:10} {row['mode']:11} {row['perplexity']:10.3f} {row['ratio'] - 1:+14.2%} "
                f"{low:+8.2%} {high:+8.2%} {row['kl']:8.4f} {row['agreement']:11.1%} "
                f"{row['kv_read']:4.0%}",
                flush=True,
            )
    return rows


def ruler(subject: Subject, options: argparse.Namespace) -> list[dict[str, Any]]:
    import quality_runs as runs

    rows: list[dict[str, Any]] = []
    for length in options.lengths:
        print(f"\n{length} tokens, score out of 100 (difference from exact, 95% interval)")
        scores: dict[str, list[list[float]]] = {mode: [] for mode in subject.modes}
        for task in options.tasks:
            found = runs.ruler(subject, task, length, options.samples)
            for mode in subject.modes:
                scores[mode] += found[mode]["scores"]
            rows += _score_rows(task, length, {m: found[m]["scores"] for m in found}, found)
        rows += _score_rows("all", length, scores, None)
    return rows


def generation(subject: Subject, options: argparse.Namespace) -> list[dict[str, Any]]:
    import quality_runs as runs
    import texts

    print("text       mode   KL to exact  same token  agree for  distinct 4-grams  repeated  KV")
    rows = []
    for text in options.texts:
        ids = texts.token_ids(text, subject.model, subject.tokenizer, options.context)
        for row in runs.generation(subject, ids, options.tokens):
            rows.append({"text": text} | row)
            print(
                f"{text:10} {row['mode']:8} {row['kl']:9.4f} {row['same_token']:11.1%} "
                f"{row['agrees_for']:10} {row['distinct_4grams']:17.1%} {row['repeated']:9.1%} "
                f"{row['kv_read']:4.0%}",
                flush=True,
            )
    return rows


def longbench(subject: Subject, options: argparse.Namespace) -> list[dict[str, Any]]:
    import longtasks
    import quality_runs as runs

    questions = longtasks.longbench_v2(options.file)[: options.samples]
    found = runs.answers(subject, [(q.prompt, q.score) for q in questions], max_new_tokens=128)
    return _score_rows("LongBench v2", 0, {m: found[m]["scores"] for m in found}, found)


def longgenbench(subject: Subject, options: argparse.Namespace) -> list[dict[str, Any]]:
    import longtasks
    import quality_runs as runs

    prompts = longtasks.longgenbench(options.file)[: options.samples]
    cases = [(p.prompt, p.completion_rate) for p in prompts]
    found = runs.answers(subject, cases, max_new_tokens=options.tokens)
    return _score_rows("LongGenBench", 0, {m: found[m]["scores"] for m in found}, found)


def _score_rows(
    task: str, length: int, scores: dict[str, list[list[float]]], found: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """A row for each mode, printed; scores are lists (prompts) of lists (their questions)."""
    from quality_runs import difference

    rows = []
    for mode, mine in scores.items():
        flat = [100 * score for prompt in mine for score in prompt]
        delta, low, high = difference(mine, scores["exact"])
        row = {"task": task, "length": length, "mode": mode, "score": sum(flat) / len(flat)}
        row |= {"samples": len(flat), "prompts": len(mine)}
        row |= {"difference": 100 * delta, "interval": [100 * low, 100 * high]}
        if found is not None:
            row |= {"kv_read": found[mode]["kv_read"], "scores": mine}
        rows.append(row)
        kv = f"  KV {row['kv_read']:4.0%}" if found is not None else ""
        print(
            f"{task:12} {mode:10} {row['score']:5.1f}  {row['difference']:+5.1f} "
            f"[{row['interval'][0]:+5.1f}, {row['interval'][1]:+5.1f}]  n = {row['samples']}{kv}",
            flush=True,
        )
    return rows


RUNS = {run.__name__: run for run in (perplexity, ruler, generation, longbench, longgenbench)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", choices=list(RUNS))
    parser.add_argument("file", type=Path, nargs="?", help="longbench, longgenbench: their JSON")
    parser.add_argument("--model", type=Path, help="a folder; default: SmolLM2 from its wheel")
    parser.add_argument("--modes", nargs="+", default=["exact", "MAC", "streaming", "quest"])
    parser.add_argument("--share", type=float, default=0.3, help="KV that the baselines read")
    parser.add_argument("--min-context", type=int, default=ReuseConfig().min_context)
    parser.add_argument("--texts", nargs="+", default=["prose", "code"])
    parser.add_argument("--context", type=int, default=7600, help="prefilled, without the steps")
    parser.add_argument("--steps", type=int, default=512, help="perplexity: tokens that count")
    parser.add_argument("--tokens", type=int, default=2048, help="generation: new tokens")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8000])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--samples", type=int, default=50, help="questions for each task")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    main()
