"""Synthetic long-context tasks after the published definitions of RULER (arXiv:2404.06654).

Our own generator and word lists, so scores do not compare with published ones, only with each
other. A context may have several questions: each is a sample, and all share one prefill.

| task | RULER's | context | question |
|---|---|---|---|
| single | NIAH single | one needle in prose | its number |
| multikey | NIAH multi-key | eight needles of different keys | the number of each, in turn |
| multivalue | NIAH multi-value | four needles of one key | all four |
| multiquery | NIAH multi-query | four needles of different keys | all four |
| vt | variable tracking | four chains of five assignments | each chain's variables, in turn |
| cwe | common words | a list: ten words often, many seldom | the ten |
| fwe | frequent words | coded words, by Zipf's law | the three most frequent |
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mac_attn.demo.model import python_reference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# fmt: off
_ADJECTIVES = (
    "amber", "brave", "calm", "distant", "eager", "faint", "gentle", "hollow", "icy", "jolly",
    "keen", "lonely", "mellow", "narrow", "odd", "plain", "quiet", "rusty", "silent", "tall",
    "upper", "vivid", "warm", "young",
)
_NOUNS = (
    "anchor", "bridge", "candle", "desert", "engine", "feather", "garden", "harbour", "island",
    "jacket", "kettle", "ladder", "mirror", "orchard", "pillow", "quarry", "ribbon", "saddle",
    "tunnel", "umbrella", "valley", "window", "yard",
)
# fmt: on
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Question:
    """What follows the context, how the answer begins, and what it must contain."""

    text: str
    prefix: str
    answers: tuple[str, ...]

    def score(self, output: str) -> float:
        """Share of the answers that occur in the output, as RULER's string_match_all."""
        output = output.lower()
        return sum(answer.lower() in output for answer in self.answers) / len(self.answers)


@dataclass(frozen=True)
class Sample:
    """One context with its questions; `max_new_tokens` is enough for the answers."""

    context: str
    questions: tuple[Question, ...]
    max_new_tokens: int


def make(task: str, tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> Sample:
    """A sample whose prompt has at most `length` tokens and nearly as many.

    Raises ValueError for an unknown task, or a length that the task cannot be made for.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, must be {' or '.join(map(repr, TASKS))}")

    def tokens(size: int) -> int:
        sample = TASKS[task](random.Random(seed), size)
        question = max(sample.questions, key=lambda q: len(q.text + q.prefix))
        return len(tokenizer(sample.context + question.text + question.prefix).input_ids)

    room = length - 48  # for the chat template
    low, high = 1, 64
    while tokens(high) < room:
        low, high = high, 2 * high
    while high - low > max(1, low // 200):
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) <= room else (low, middle)
    if tokens(low) > room:
        raise ValueError(f"length is {length}, too short for the task {task!r}")
    return TASKS[task](random.Random(seed), low)


def _needles(
    keys: int, values: int, ask_all: bool, new: int
) -> Callable[[random.Random, int], Sample]:
    def make_sample(rng: random.Random, size: int) -> Sample:
        names = rng.sample([f"{a} {n}" for a in _ADJECTIVES for n in _NOUNS], keys)
        numbers = {
            name: tuple(str(n) for n in rng.sample(range(10**6, 10**7), values)) for name in names
        }
        words = python_reference().split(" ")
        start = rng.randrange(len(words) // 2)
        text = words[start : start + size]
        needles = [
            f" One of the special magic numbers for {name} is: {number}. "
            for name in names
            for number in numbers[name]
        ]
        rng.shuffle(needles)
        for i, at in enumerate(sorted(rng.randrange(len(text)) for _ in needles)):
            text.insert(at + i, needles[i])
        context = (
            "Some special magic numbers are hidden within the following text. Make sure to "
            "memorize them. I will quiz you about the numbers afterwards.\n" + " ".join(text) + "\n"
        )
        groups = [names] if ask_all else [[name] for name in names]
        return Sample(context, tuple(_number_question(group, numbers) for group in groups), new)

    return make_sample


def _number_question(names: list[str], numbers: dict[str, tuple[str, ...]]) -> Question:
    answers = tuple(number for name in names for number in numbers[name])
    who = " and ".join(names)
    if len(answers) == 1:
        ask = f"What is the special magic number for {who} mentioned in the provided text?"
        prefix = f"The special magic number for {who} mentioned in the provided text is"
    else:
        ask = f"What are all the special magic numbers for {who} mentioned in the provided text?"
        prefix = f"The special magic numbers for {who} mentioned in the provided text are"
    return Question(ask, prefix, answers)


def _variable_tracking(rng: random.Random, size: int) -> Sample:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names = list({"".join(rng.choices(letters, k=5)): None for _ in range(40)})[:20]
    values = rng.sample(range(10000, 100000), 4)
    lines = [_NOISE] * size
    questions = []
    for value, chain in zip(values, (names[i : i + 5] for i in range(0, 20, 5)), strict=True):
        steps = [f"VAR {chain[0]} = {value}."]
        steps += [f"VAR {new} = VAR {old}." for old, new in zip(chain, chain[1:], strict=False)]
        places = sorted(rng.randrange(len(lines)) for _ in steps)
        for i, (at, step) in enumerate(zip(places, steps, strict=True)):
            lines.insert(at + i, step)
        questions.append(
            Question(
                "Question: Find all variables that are assigned the value "
                f"{value} in the text above.",
                "Answer: According to the chain(s) of variable assignment in the text above, 5 "
                f"variables are assigned the value {value}, they are:",
                tuple(chain),
            )
        )
    context = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        + "\n".join(lines)
        + "\n"
    )
    return Sample(context, tuple(questions), 30)


def _common_words(rng: random.Random, size: int) -> Sample:
    pool = sorted({w for w in python_reference().lower().split() if w.isalpha() and len(w) > 3})
    words = rng.sample(pool, 10 + size)
    common, seldom = words[:10], words[10:]
    listed = common * 30 + seldom * 3 if size > 60 else common * 10 + seldom
    rng.shuffle(listed)
    context = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
        + " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
        + "\n"
    )
    question = Question(
        "Question: What are the 10 most common words in the above list?",
        "Answer: The top 10 words that appear most often in the list are:",
        tuple(common),
    )
    return Sample(context, (question,), 80)


def _frequent_words(rng: random.Random, size: int) -> Sample:
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(200)]
    shares = [1 / (rank + 1) ** 2 for rank in range(len(words))]  # Zipf, alpha = 2
    counts = [max(1, round(size * share / sum(shares))) for share in shares]
    coded = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    coded += ["..."] * (len(coded) // 4)  # the noise, the most frequent of all
    rng.shuffle(coded)
    context = (
        "Read the following coded text and track the frequency of each coded word. Find the three "
        "most frequently appeared coded words.\n" + " ".join(coded) + "\n"
    )
    question = Question(
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the "
        "three most frequently appeared words in the above coded text?",
        "Answer: According to the coded text above, the three most frequently appeared words are:",
        tuple(words[:3]),
    )
    return Sample(context, (question,), 40)


TASKS: dict[str, Callable[[random.Random, int], Sample]] = {
    "single": _needles(1, 1, ask_all=False, new=16),
    "multikey": _needles(8, 1, ask_all=False, new=16),
    "multivalue": _needles(1, 4, ask_all=True, new=64),
    "multiquery": _needles(4, 1, ask_all=True, new=64),
    "vt": _variable_tracking,
    "cwe": _common_words,
    "fwe": _frequent_words,
}
