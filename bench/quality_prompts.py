"""The prompts of quality.py as token ids, and files of them.

Files (`quality.py prepare`) make runs on several machines, or in several processes, ask the very
same: texts and the tokenizer's time are then of the machine that wrote them. All prompts of a RULER
task and length have the same number of tokens, so that they decode in one batch.
"""

from __future__ import annotations

import json
import lzma
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import ruler
import texts
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Asked:
    """One question: what is prefilled, and what the answer must contain."""

    ids: tuple[int, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Questions:
    """Questions of one task at one length, or a part of them from number `first` on.

    Every answer has at most `max_new_tokens`.
    """

    task: str
    length: int
    max_new_tokens: int
    asked: tuple[Asked, ...]
    first: int = 0

    def part(self, start: int, end: int) -> Questions:
        """The questions from `start` up to `end`, as far as there are any."""
        return replace(self, asked=self.asked[start:end], first=self.first + start)


def file_name(task: str, length: int) -> str:
    """Where `save` puts a task's questions, or a text's windows."""
    return f"{task}-{length}.json.xz"


def save(folder: Path, questions: Questions) -> None:
    """Write questions to `folder`, under `file_name`."""
    _write(folder / file_name(questions.task, questions.length), asdict(questions))


def load(folder: Path, task: str, length: int) -> Questions:
    """What `save` wrote."""
    content = _read(folder / file_name(task, length))
    content["asked"] = tuple(
        Asked(tuple(one["ids"]), tuple(one["answers"])) for one in content["asked"]
    )
    return Questions(**content)


def save_windows(folder: Path, text: str, windows: Tensor) -> None:
    """Write windows `[W, length]` of a text."""
    _write(folder / file_name(text, windows.shape[1]), windows.tolist())


def load_windows(folder: Path, text: str, length: int) -> Tensor:
    """What `save_windows` wrote."""
    return torch.tensor(_read(folder / file_name(text, length)))


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(path, "wt") as file:
        json.dump(content, file, separators=(",", ":"))


def _read(path: Path):  # type: ignore[no-untyped-def] # JSON
    with lzma.open(path, "rt") as file:
        return json.load(file)


def windows(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, count: int
) -> Tensor:
    """`count` windows of a text, `[count, length]`, one after the other from its beginning.

    Each begins with what the tokenizer begins every text with, if anything: without it Gemma is
    lost. Raises ValueError if the text is too short for so many.
    """
    start = torch.tensor(tokenizer("").input_ids, dtype=torch.long).expand(count, -1)
    rest = length - start.shape[1]
    ids = texts.token_ids(name, model, tokenizer, rest * count).view(count, rest)
    return torch.cat([start, ids], dim=1)


def ruler_questions(
    task: str, tokenizer: PreTrainedTokenizerBase, length: int, samples: int
) -> Questions:
    """`samples` questions, each of a context of its own, in prompts of exactly `length` tokens.

    What a generated prompt lacks, up to some twenty tokens, are line breaks between the instruction
    and the text. Raises ValueError for an unknown task or a length that is too short.
    """
    template = len(tokenizer(chat(tokenizer, ""), add_special_tokens=False).input_ids)
    asked = []
    for seed in range(samples):
        # Parts that are encoded apart may take a token more each than in one piece.
        sample = ruler.make(task, tokenizer, length - template - 4, seed)
        question = sample.questions[seed % len(sample.questions)]
        ids = _of_length(tokenizer, sample.context, question, length)
        asked.append(Asked(tuple(ids), question.answers))
    return Questions(task, length, sample.max_new_tokens, tuple(asked))


def _of_length(
    tokenizer: PreTrainedTokenizerBase, context: str, question: ruler.Question, length: int
) -> list[int]:
    prompt = chat(tokenizer, context, question.text) + question.prefix
    instruction = context[: context.index("\n") + 1]
    at = prompt.index(instruction) + len(instruction)
    before, after, newline = (
        tokenizer(text, add_special_tokens=False).input_ids
        for text in (prompt[:at], prompt[at:], "\n")
    )
    lacking = length - len(before) - len(after)
    if lacking < 0 or len(newline) != 1:
        raise ValueError(f"length is {length}, the prompt has {length - lacking} tokens")
    return [*before, *(newline * lacking), *after]


def chat(tokenizer: PreTrainedTokenizerBase, context: str, question: str = "") -> str:
    """The prompt of a chat model for a context and a question, up to where its answer begins."""
    if tokenizer.chat_template is None:
        return f"{context}{question}\n"
    message = {"role": "user", "content": context + question}
    return str(tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False))
