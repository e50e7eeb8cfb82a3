"""Loaders of LongBench v2 (arXiv:2412.15204) and LongGenBench (arXiv:2409.02076) from local files.

Nothing is downloaded: give the file as its authors publish it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

_CHOICES = ("A", "B", "C", "D")


@dataclass(frozen=True)
class Choice:
    """One question of LongBench v2: a prompt and the letter of the right answer."""

    id: str
    prompt: str
    answer: str
    length: str  # "short", "medium" or "long"

    def score(self, output: str) -> float:
        """1 if the output names the right letter, as LongBench v2's own evaluation finds it."""
        text = output.replace("*", "")
        found = re.search(r"The correct answer is \(?([A-D])\)?", text)
        return float(found is not None and found.group(1) == self.answer)


@dataclass(frozen=True)
class Writing:
    """One prompt of LongGenBench: what to write, in numbered sections, and what must come where.

    `checks` maps the number of a section to what it must tell; whether it does, LongGenBench asks
    another language model.
    """

    prompt: str
    kind: str  # what a section is called, "Week" for example
    number: int  # of sections that are asked for
    checks: dict[int, tuple[str, ...]]

    def completion_rate(self, output: str) -> float:
        """Share of the sections that are there, the first of which the prompt begins itself."""
        found = {1} | {int(n) for n in re.findall(rf"#\*#\s*{re.escape(self.kind)} (\d+)", output)}
        return len(found & set(range(1, self.number + 1))) / self.number


def longbench_v2(path: Path) -> list[Choice]:
    """The questions of LongBench v2's `data.json`: a list of objects."""
    template = (
        "Please read the following text and answer the question below.\n\n<text>\n{context}\n"
        "</text>\n\nWhat is the correct answer to this question: {question}\n"
        "Choices:\n{choices}\n\n"
        'Answer in this form: "The correct answer is (insert answer here)".'
    )
    questions = []
    for i, item in enumerate(_items(path)):
        _require(path, i, item, ["_id", "context", "question", "answer", "length"])
        _require(path, i, item, [f"choice_{letter}" for letter in _CHOICES])
        if item["answer"] not in _CHOICES:
            raise ValueError(
                f"{path}, item {i}: answer is {item['answer']!r}, must be A, B, C or D"
            )
        choices = "\n".join(f"({letter}) {item[f'choice_{letter}']}" for letter in _CHOICES)
        prompt = template.format(
            context=item["context"].strip(), question=item["question"].strip(), choices=choices
        )
        questions.append(Choice(item["_id"], prompt, item["answer"], item["length"]))
    return questions


def longgenbench(path: Path) -> list[Writing]:
    """The prompts of LongGenBench's `Dataset_short.json` or `Dataset_long.json`."""
    kinds = ["checks_once", "checks_range", "checks_periodic"]
    prompts = []
    for i, item in enumerate(_items(path)):
        _require(path, i, item, ["prompt", "type", "number", *kinds])
        checks: dict[int, tuple[str, ...]] = {}
        for kind in kinds:
            for section, text in item[kind].items():
                checks[int(section)] = (*checks.get(int(section), ()), text)
        prompts.append(Writing(item["prompt"], item["type"], int(item["number"]), checks))
    return prompts


def _items(path: Path) -> list[dict]:
    """A JSON list, or JSON lines."""
    text = path.read_text()
    if text.lstrip().startswith("["):
        return list(json.loads(text))
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _require(path: Path, index: int, item: dict, names: list[str]) -> None:
    if missing := [name for name in names if name not in item]:
        raise ValueError(f"{path}, item {index}: lacks {', '.join(missing)}")
