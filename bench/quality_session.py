"""All of quality.py's measurements in several processes on one GPU, within a given time.

    python bench/quality.py prepare --prompts PROMPTS      # once, on any machine
    python bench/quality_session.py --prompts PROMPTS --out FOLDER --seconds 480
    python bench/quality_report.py FOLDER/quality.json

One process is bound by launching small kernels and leaves most of a GPU idle. The work is cut into
jobs: long ones first, and every RULER task and length once before any a second time. Each process
takes the next job that nobody has. What a job has found is written after every batch or mode, so
that time running out loses little: `quality.json` has all that is there. What an earlier session
finished in the same folder is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import quality
import ruler
import torch
from quality_report import Rows, packed

from mac_attn.info import info

if TYPE_CHECKING:
    from quality_runs import Subject

MAC = ("MAC", "MAC:threshold=0.2", "MAC:threshold=0.15", "MAC:threshold=0.06")
WIDE = "MAC:band=512,threshold=0.25"
MODES = {
    # Each group is a job for each text.
    "perplexity": [
        ["exact", "sdpa", *MAC, WIDE],
        ["exact", "MAC:band=512,threshold=0.15", "MAC:seed=0", "quest", "streaming"],
    ],
    "generation": [["exact", mode] for mode in ("MAC", MAC[1], "quest", "sdpa")],
    "ruler": [["exact", "sdpa", *MAC, WIDE, "quest", "streaming"]],
}
_GRACE = 15  # seconds that a process may take to end after the time is over


@dataclass(frozen=True)
class Job:
    """A run of quality.py with some options changed."""

    name: str
    run: str
    changed: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    began = time.monotonic()
    options = _parser().parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    for claim in options.out.glob("*.claim"):  # of an earlier session; what it finished has a .json
        claim.unlink()
    jobs = [job for run in options.runs for job in PLANS[run](options)]
    for job in jobs:
        quality.parsed(job.changed["modes"], options)  # a slip shows here, not in every process
    processes = []
    context = multiprocessing.get_context("spawn")  # a fork would share the state of CUDA
    print(f"{len(jobs)} jobs, {options.workers} processes", flush=True)
    for i in range(min(options.workers, len(jobs))):
        arguments = (jobs, options, began + options.seconds, i)
        processes.append(context.Process(target=_work, args=arguments))
        processes[-1].start()
    _watch(processes, options, began)
    content = merged(options.out)
    content |= {"command": " ".join(["python", *sys.argv]), "machine": info()}
    (options.out / "quality.json").write_text(json.dumps(content))
    took = time.monotonic() - began
    print(f"{took:.0f} s: {content['finished']} of {len(jobs)} jobs finished", flush=True)


def _watch(processes: list[Any], options: argparse.Namespace, began: float) -> None:
    """Wait for the processes; end those that go on after the time is over."""
    said = began
    while any(process.is_alive() for process in processes):
        time.sleep(0.1)
        now = time.monotonic()
        if now > said + 30:
            said = now
            claims = len(list(options.out.glob("*.claim")))
            print(f"{now - began:.0f} s: {claims} jobs begun", flush=True)
        if now > began + options.seconds + _GRACE:
            for process in processes:
                process.terminate()
    for process in processes:
        process.join()


def _perplexity(options: argparse.Namespace) -> Iterator[Job]:
    rows = _rows(options, options.context + options.steps)
    groups = [list(modes) for modes in options.modes["perplexity"]]
    if options.calibration:
        groups[-1].append(f"MAC:calibration={options.calibration}")
    for group, modes in enumerate(groups):
        for text in options.texts:
            changed = {"texts": [text], "modes": modes, "batch": rows}
            yield Job(f"perplexity-{text}-{group}", "perplexity", changed)


def _generation(options: argparse.Namespace) -> Iterator[Job]:
    rows = _rows(options, options.generation_context + options.tokens, copies=2)
    windows = min(options.windows, max(1, rows // len(options.texts)))
    for modes in options.modes["generation"]:
        changed = {"modes": modes, "batch": rows, "windows": windows}
        yield Job(f"generation-{_plain(modes[1])}", "generation", changed)


def _ruler(options: argparse.Namespace) -> Iterator[Job]:
    found = []
    for length in options.lengths:
        parts = -(-options.samples // _rows(options, length + 128))
        size = -(-options.samples // parts)
        for task in options.tasks:
            for part in range(parts):
                for modes in options.modes["ruler"]:
                    changed = {"tasks": [task], "lengths": [length], "modes": modes}
                    changed |= {"batch": size, "part": (part * size, (part + 1) * size)}
                    job = Job(f"ruler-{task}-{length}-{part}", "ruler", changed)
                    found.append((part, task in ruler.EASIER, -length, job))
    for *_, job in sorted(found, key=lambda entry: entry[:3]):
        yield job


PLANS = {"generation": _generation, "perplexity": _perplexity, "ruler": _ruler}


def _plain(mode: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in mode)


def _rows(options: argparse.Namespace, length: int, copies: int = 1) -> int:
    """Prompts whose caches, rings (twice) and activations fit into `--gib`."""
    from transformers import AutoConfig

    from mac_attn import _C, ReuseConfig
    from mac_attn.demo.model import folder

    config = AutoConfig.from_pretrained(folder(options.model), local_files_only=True)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    size = getattr(torch, options.dtype).itemsize
    kv = length * layers * 2 * config.num_key_value_heads * head_dim * size
    kv_heads, default = config.num_key_value_heads, ReuseConfig()
    sizes = (
        kv_heads,
        heads // kv_heads,
        head_dim,
        default.entries,
        default.anchors,
        size,
        head_dim,
    )
    ring = layers * _C.ring_layout(*sizes)[1]
    prefill = length * (6 * config.hidden_size + 3 * config.intermediate_size) * size
    return max(1, int(options.gib * 2**30 / (copies * kv + max(prefill, 2 * ring))))


def _work(jobs: Sequence[Job], options: argparse.Namespace, deadline: float, number: int) -> None:
    """One process: take jobs until none is left or the time is over."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(options.threads)
    options.batch, options.modes = 1, ["exact"]  # every job has its own
    subject, _ = quality.load(options)
    subject.deadline = deadline
    for job in jobs:
        path = options.out / f"{job.name}.json"
        if _is_finished(path) or not _claim(options.out / f"{job.name}.claim"):
            continue
        if time.monotonic() > deadline:
            return
        try:
            _run(job, subject, options, path)
        except Exception:  # the other jobs go on; this one's rows so far are in its file
            (options.out / f"{job.name}.error").write_text(traceback.format_exc())
            print(f"process {number}: {job.name} failed: {sys.exc_info()[1]!r}", flush=True)


def _claim(path: Path) -> bool:
    """Whether this process was the first to ask for it."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _is_finished(path: Path) -> bool:
    return path.exists() and bool(json.loads(path.read_text())["finished"])


def _run(job: Job, subject: Subject, options: argparse.Namespace, path: Path) -> None:
    import quality_runs as runs

    began = time.monotonic()
    options = copy.copy(options)
    vars(options).update(job.changed)
    subject.modes, subject.batch = quality.parsed(options.modes, options), options.batch
    rows: Rows = []
    finished = False
    while not finished:
        try:
            for part in quality.RUNS[job.run](subject, options):
                rows += part
                _write(path, {"run": job.run, "rows": rows, "finished": False})
            finished = True
        except runs.OutOfTime:
            break
        except (torch.OutOfMemoryError, MemoryError):  # the latter is a ReuseCache's
            if subject.batch == 1:
                raise
            # Again from the start: batches of another size have other rows.
            subject.batch, rows = (subject.batch + 1) // 2, []
            print(f"{job.name}: out of memory, now {subject.batch} prompts a batch", flush=True)
            torch.cuda.empty_cache()
    seconds = round(time.monotonic() - began, 1)
    _write(path, {"run": job.run, "rows": rows, "finished": finished, "seconds": seconds})


def _write(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all, if the process is ended meanwhile."""
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(content))
    aside.rename(path)


def merged(folder: Path) -> dict[str, Any]:
    """The rows of all jobs in a folder, as `quality.py --json` writes them."""
    found: dict[str, Rows] = {run: [] for run in PLANS}
    seconds, finished = {}, 0
    seen = set()
    for path in sorted(folder.glob("*-*.json")):
        job = json.loads(path.read_text())
        finished += job["finished"]
        seconds[path.stem] = job.get("seconds")
        for row in job["rows"]:
            row.pop("answer", None)
            # Groups of modes have each run exact, with the same result but for rounding.
            which = ("text", "task", "length", "mode", "window", "question", "prompt")
            key = (job["run"], *(row.get(name) for name in which))
            if key not in seen:
                seen.add(key)
                found[job["run"]].append(row)
    content: dict[str, Any] = {run: packed(rows, quality.SAME[run]) for run, rows in found.items()}
    return content | {"finished": finished, "seconds": seconds}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--seconds", type=float, default=480.0, help="from the start")
    parser.add_argument("--workers", type=int, default=8, help="processes")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, for each process")
    parser.add_argument("--gib", type=float, default=8.0, help="memory for each process's caches")
    parser.add_argument("--runs", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--modes", type=json.loads, default=MODES, help="JSON as MODES")
    parser.add_argument("--calibration", type=Path, help="of the model: a mode more in perplexity")
    quality.add_options(parser)
    parser.set_defaults(tasks=list(ruler.TASKS))
    return parser


if __name__ == "__main__":
    main()
