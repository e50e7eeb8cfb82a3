"""Does the answer change? A real model with exact decode, with MAC, and with two baselines.

    python bench/quality.py perplexity [--texts prose code --windows 12 --context 7680 --steps 512]
    python bench/quality.py ruler [--lengths 2048 4096 8064 --samples 96 --tasks ...]
    python bench/quality.py generation [--generation-context 4096 --tokens 2048 --windows 12]
    python bench/quality.py longbench FILE | longgenbench FILE
    python bench/quality.py prepare --prompts FOLDER     # the prompts of the first three, to files

Every prompt is prefilled once and exactly; each way of attending (`modes.py`; exact must be the
first) then decodes from that cache, prompts of equal length as one batch. `--share` is the part of
the KV cache that the baselines read; MAC's is measured. With `--prompts FOLDER` the prompts come
from files. `quality_session.py` runs all of it in several processes on one GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from quality_report import TABLES, Rows, packed

from mac_attn import ReuseConfig
from mac_attn.info import info

if TYPE_CHECKING:
    from modes import Mode
    from quality_prompts import Questions
    from quality_runs import Subject

# Fields that are the same for many rows, by run.
SAME = {
    "perplexity": ("text", "mode"),
    "ruler": ("task", "length", "mode"),
    "generation": ("text", "mode"),
}


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
    subject, name = load(options)
    if options.run == "prepare":
        prepare(subject, options)
        return
    command = " ".join(["python", *sys.argv])
    print(f"{name}, {options.dtype}, torch {torch.__version__}, {info()['gpu'] or info()['simd']}")
    print(f"command: {command}")
    rows = [row for part in RUNS[options.run](subject, options) for row in part]
    kind = options.run if options.run in SAME else "ruler"
    print(TABLES[kind](rows))
    if options.json:
        content = {"command": command, "machine": info(), "model": name}
        content[kind] = packed(rows, SAME[kind])
        options.json.write_text(json.dumps(content))


def load(options: argparse.Namespace) -> tuple[Subject, str]:
    """The model with everything that `options` say, and its name."""
    import quality_runs as runs
    from transformers.utils import logging as transformers_logging

    from mac_attn.demo import model as models

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    modes = parsed(options.modes, options)
    device = torch.device(options.device)
    model, tokenizer, name = models.load(options.model, getattr(torch, options.dtype), device)
    return runs.Subject(model, tokenizer, modes, options.batch), name


def parsed(names: Sequence[str], options: argparse.Namespace) -> list[Mode]:
    """Modes of these names; leaves with a message if one is not valid or exact is not the first."""
    from modes import Mode

    base = ReuseConfig(min_context=options.min_context)
    try:
        modes = [Mode.parse(text, base, options.share) for text in names]
        if not modes or modes[0].kind != "exact":
            raise ValueError(f"modes are {' '.join(names)}, must begin with exact")
    except ValueError as error:
        sys.exit(f"error: {error}")
    return modes


def perplexity(subject: Subject, options: argparse.Namespace) -> Iterator[Rows]:
    import quality_runs as runs

    for text in options.texts:
        found = windows(subject, options, text, options.context + options.steps)
        for rows in runs.perplexity(subject, found, options.steps):
            yield [{"text": text} | row for row in rows]


def ruler(subject: Subject, options: argparse.Namespace) -> Iterator[Rows]:
    import quality_runs as runs

    for length in options.lengths:
        for task in options.tasks:
            for rows in runs.ruler(subject, questions(subject, options, task, length)):
                yield [{"task": task, "length": length} | row for row in rows]


def generation(subject: Subject, options: argparse.Namespace) -> Iterator[Rows]:
    import quality_runs as runs

    # The texts' prompts make one batch.
    found = [windows(subject, options, text, options.generation_context) for text in options.texts]
    texts = [text for text, some in zip(options.texts, found, strict=True) for _ in some]
    for rows in runs.generation(subject, torch.cat(found), options.tokens):
        yield [{"text": texts[row["prompt"]]} | row for row in rows]


def longbench(subject: Subject, options: argparse.Namespace) -> Iterator[Rows]:
    import longtasks

    asked = longtasks.longbench_v2(options.file)[: options.samples]
    yield from _texts(subject, "LongBench v2", [(q.prompt, q.score) for q in asked], 128)


def longgenbench(subject: Subject, options: argparse.Namespace) -> Iterator[Rows]:
    import longtasks

    asked = longtasks.longgenbench(options.file)[: options.samples]
    cases = [(p.prompt, p.completion_rate) for p in asked]
    yield from _texts(subject, "LongGenBench", cases, options.tokens)


def _texts(subject: Subject, task: str, cases: list[Any], max_new_tokens: int) -> Iterator[Rows]:
    import quality_runs as runs

    prompts = runs.texts_as_prompts(subject.tokenizer, [prompt for prompt, _ in cases])
    scores = [score for _, score in cases]
    for rows in runs.answers(subject, prompts, scores, max_new_tokens):
        yield [{"task": task, "length": 0} | row for row in rows]


def windows(subject: Subject, options: argparse.Namespace, text: str, length: int) -> torch.Tensor:
    """`--windows` windows of a text, `[W, length]`, from a file if there are files."""
    import quality_prompts as prompts

    if options.prompts:
        return prompts.load_windows(options.prompts, text, length)[: options.windows]
    return prompts.windows(text, subject.model, subject.tokenizer, length, options.windows)


def questions(subject: Subject, options: argparse.Namespace, task: str, length: int) -> Questions:
    """`--samples` questions of a RULER task, or a part of them; from a file if there are files."""
    import quality_prompts as prompts

    if options.prompts:
        found = prompts.load(options.prompts, task, length)
    else:
        found = prompts.ruler_questions(task, subject.tokenizer, length, options.samples)
    start, end = getattr(options, "part", (0, options.samples))
    return found.part(start, min(end, options.samples))


def prepare(subject: Subject, options: argparse.Namespace) -> None:
    """Write the prompts of `perplexity`, `generation` and `ruler` to the folder `--prompts`."""
    import quality_prompts as prompts

    if options.prompts is None:
        sys.exit("prepare needs --prompts FOLDER, where it writes")
    for text in options.texts:
        for length in (options.context + options.steps, options.generation_context):
            found = prompts.windows(text, subject.model, subject.tokenizer, length, options.windows)
            prompts.save_windows(options.prompts, text, found)
    for task in options.tasks:
        for length in options.lengths:
            found = prompts.ruler_questions(task, subject.tokenizer, length, options.samples)
            prompts.save(options.prompts, found)
            print(f"{task}, {length} tokens: {len(found.asked)} questions", flush=True)


RUNS = {run.__name__: run for run in (perplexity, ruler, generation, longbench, longgenbench)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", choices=[*RUNS, "prepare"])
    parser.add_argument("file", type=Path, nargs="?", help="longbench, longgenbench: their JSON")
    modes = ["exact", "MAC", "streaming", "quest"]
    parser.add_argument("--modes", nargs="+", default=modes, help="see modes.py")
    batch = 16 if torch.cuda.is_available() else 1
    parser.add_argument("--batch", type=int, default=batch, help="prompts at a time")
    parser.add_argument("--json", type=Path)
    add_options(parser)
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what is measured, and on what; `quality_session.py` has them too."""
    import ruler as tasks

    standard = list(tasks.STANDARD)
    parser.add_argument("--model", type=Path, help="a folder; default: SmolLM2 from its wheel")
    parser.add_argument("--share", type=float, default=0.3, help="KV that the baselines read")
    parser.add_argument("--min-context", type=int, default=ReuseConfig().min_context)
    parser.add_argument("--texts", nargs="+", default=["prose", "code"])
    parser.add_argument("--windows", type=int, default=12, help="of each text")
    parser.add_argument("--context", type=int, default=7680, help="perplexity: tokens prefilled")
    parser.add_argument("--steps", type=int, default=512, help="perplexity: tokens that count")
    parser.add_argument("--generation-context", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=2048, help="generation: new tokens")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8064])
    parser.add_argument("--tasks", nargs="+", default=standard, choices=list(tasks.TASKS))
    parser.add_argument("--samples", type=int, default=96, help="questions for each task")
    parser.add_argument("--prompts", type=Path, help="folder of prompts that `prepare` wrote")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device)


if __name__ == "__main__":
    main()
