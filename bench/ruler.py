"""Synthetic long-context tasks after the published definitions of RULER (arXiv:2404.06654).

Our own generator and word lists, so scores do not compare with published ones, only with each
other. A context may have several questions, of which quality.py asks one.

| task | RULER's | context | question |
|---|---|---|---|
| single | NIAH single | one needle in prose | its number |
| multikey | NIAH multi-key | eight needles of different keys | the number of each, in turn |
| multivalue | NIAH multi-value | four needles of one key | all four |
| multiquery | NIAH multi-query | four needles of different keys | all four |
| vt | variable tracking | four chains of five assignments | each chain's variables, in turn |
| cwe | common words | a list: ten words often, many seldom | the ten |
| fwe | frequent words | coded words, by Zipf's law | the three most frequent |

Easier variants, ours, for models that cannot do those (where exact attention gets nothing right,
nothing can be lost):

| task | of | what is easier |
|---|---|---|
| multikey2 | multikey | two needles instead of eight |
| multivalue2 | multivalue | two numbers of one key instead of four |
| vt1 | vt | a chain of two variables, and no other chain |
| cwe3 | cwe | three common words instead of ten, each on every 40th place of the list |
| fwe1 | fwe | only the most frequent word, which is every third |
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
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
_SLACK = 16  # tokens that a prompt may be shorter than asked for
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
    """A sample of which context and question have at most `length` tokens and nearly as many.

    Raises ValueError for an unknown task, or a length that the task cannot be made for.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, must be {' or '.join(map(repr, TASKS))}")

    def sized(size: int) -> tuple[Sample, int]:
        sample = TASKS[task](random.Random(seed), size)
        question = max(sample.questions, key=lambda q: len(q.text + q.prefix))
        text = sample.context + question.text + question.prefix
        return sample, len(tokenizer(text).input_ids)

    # False position between a size that fits and one that does not: lengths are nearly linear.
    low, (best, low_tokens) = 1, sized(1)
    if low_tokens > length:
        raise ValueError(f"length is {length}, too short for the task {task!r}")
    high, (sample, high_tokens) = 64, sized(64)
    while high_tokens <= length:
        low, low_tokens = high, high_tokens
        high = max(high + 1, round(1.02 * high * length / high_tokens))
        best, (sample, high_tokens) = sample, sized(high)
    while length - low_tokens > _SLACK and high - low > 1:
        guess = low + round((high - low) * (length - low_tokens) / (high_tokens - low_tokens))
        middle = min(max(guess, low + 1), high - 1)
        sample, count = sized(middle)
        if count <= length:
            low, low_tokens, best = middle, count, sample
        else:
            high, high_tokens = middle, count
    return best


@cache
def _prose() -> list[str]:
    return python_reference().split(" ")


@cache
def _common_pool() -> list[str]:
    words = python_reference().lower().split()
    return sorted({word for word in words if word.isalpha() and len(word) > 3})


def _needles(
    keys: int, values: int, ask_all: bool, new: int
) -> Callable[[random.Random, int], Sample]:
    def make_sample(rng: random.Random, size: int) -> Sample:
        names = rng.sample([f"{a} {n}" for a in _ADJECTIVES for n in _NOUNS], keys)
        numbers = {
            name: tuple(str(n) for n in rng.sample(range(10**6, 10**7), values)) for name in names
        }
        words = _prose()
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


def _variable_tracking(
    chains: int, variables: int, new: int
) -> Callable[[random.Random, int], Sample]:
    def make_sample(rng: random.Random, size: int) -> Sample:
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        drawn = list({"".join(rng.choices(letters, k=5)): None for _ in range(40)})
        values = rng.sample(range(10000, 100000), chains)
        lines = [_NOISE] * size
        questions = []
        for i, value in enumerate(values):
            names = drawn[i * variables : (i + 1) * variables]
            steps = [f"VAR {names[0]} = {value}."]
            steps += [f"VAR {to} = VAR {of}." for of, to in zip(names, names[1:], strict=False)]
            places = sorted(rng.randrange(len(lines)) for _ in steps)
            for j, (at, step) in enumerate(zip(places, steps, strict=True)):
                lines.insert(at + j, step)
            questions.append(
                Question(
                    "Question: Find all variables that are assigned the value "
                    f"{value} in the text above.",
                    "Answer: According to the chain(s) of variable assignment in the text above, "
                    f"{variables} variables are assigned the value {value}, they are:",
                    tuple(names),
                )
            )
        context = (
            "Memorize and track the chain(s) of variable assignment hidden in the following "
            "text.\n\n" + "\n".join(lines) + "\n"
        )
        return Sample(context, tuple(questions), new)

    return make_sample


def _common_words(count: int, every: int, new: int) -> Callable[[random.Random, int], Sample]:
    """`every` is on how many places of the list each common word stands once; 0 is RULER's."""

    def make_sample(rng: random.Random, size: int) -> Sample:
        words = rng.sample(_common_pool(), count + size)
        if every:
            listed = words[:count] * max(2, size // every) + words[count:]
        else:
            often, seldom = (30, 3) if size > 60 else (10, 1)
            listed = words[:count] * often + words[count:] * seldom
        rng.shuffle(listed)
        context = (
            "Below is a numbered list of words. In these words, some appear more often than "
            "others. Memorize the ones that appear most often.\n"
            + " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
            + "\n"
        )
        question = Question(
            f"Question: What are the {count} most common words in the above list?",
            f"Answer: The top {count} words that appear most often in the list are:",
            tuple(words[:count]),
        )
        return Sample(context, (question,), new)

    return make_sample


def _frequent_words(top: int, new: int) -> Callable[[random.Random, int], Sample]:
    number = {1: "one", 3: "three"}[top]
    plural = "words" if top > 1 else "word"

    def make_sample(rng: random.Random, size: int) -> Sample:
        words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(200)]
        shares = [1 / (rank + 1) ** 2 for rank in range(len(words))]  # Zipf, alpha = 2
        counts = [max(1, round(size * share / sum(shares))) for share in shares]
        coded = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
        coded += ["..."] * (len(coded) // 4)  # the noise, the most frequent of all
        rng.shuffle(coded)
        context = (
            "Read the following coded text and track the frequency of each coded word. Find the "
            f"{number} most frequently appeared coded {plural}.\n" + " ".join(coded) + "\n"
        )
        verb = "are" if top > 1 else "is"
        question = Question(
            "Question: Do not provide any explanation. Please ignore the dots '....'. What "
            f"{verb} the {number} most frequently appeared {plural} in the above coded text?",
            f"Answer: According to the coded text above, the {number} most frequently appeared "
            f"{plural} {verb}:",
            tuple(words[:top]),
        )
        return Sample(context, (question,), new)

    return make_sample


STANDARD: dict[str, Callable[[random.Random, int], Sample]] = {
    "single": _needles(1, 1, ask_all=False, new=16),
    "multikey": _needles(8, 1, ask_all=False, new=16),
    "multivalue": _needles(1, 4, ask_all=True, new=64),
    "multiquery": _needles(4, 1, ask_all=True, new=64),
    "vt": _variable_tracking(4, 5, new=30),
    "cwe": _common_words(10, every=0, new=80),
    "fwe": _frequent_words(3, new=40),
}
EASIER: dict[str, Callable[[random.Random, int], Sample]] = {
    "multikey2": _needles(2, 1, ask_all=False, new=16),
    "multivalue2": _needles(1, 2, ask_all=True, new=32),
    "vt1": _variable_tracking(1, 2, new=16),
    "cwe3": _common_words(3, every=40, new=24),
    "fwe1": _frequent_words(1, new=16),
}
TASKS = STANDARD | EASIER
