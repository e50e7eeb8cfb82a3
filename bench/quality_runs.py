"""The measurements of quality.py: one prefill, then every way of attending from a copy of it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ruler as tasks
import torch
from modes import attending, fork
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mac_attn import ReuseConfig
from mac_attn.demo.run import Choice
from mac_attn.integrations.transformers import MacCache

_BLOCK = 16  # tokens: losses of neighbours are not independent


@dataclass
class Subject:
    """What is measured: a model, MAC's options, the modes and the baselines' share of the KV."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: ReuseConfig
    modes: Sequence[str]
    share: float

    def prefill(self, ids: Tensor, room: int) -> tuple[MacCache, Tensor]:
        """A cache with the prompt `[1, n]` and `room` free places; the logits after it."""
        cache = MacCache(self.model, max_length=ids.shape[1] + room, config=self.config)
        return cache, self.extend(cache, ids)

    def extend(self, cache: MacCache, ids: Tensor) -> Tensor:
        """Feed tokens `[1, t]`; the logits `[vocab]` after the last."""
        ids = ids.to(self.model.device)
        output = self.model(ids, past_key_values=cache, logits_to_keep=1)
        return output.logits[0, -1].float()

    def kv_read(self, mode: str, cache: MacCache, before: list[int]) -> float:
        """Share of the KV read since `counters(cache)` was `before`."""
        if mode != "MAC":
            return 1.0 if mode == "exact" else self.share
        read, full = (new - old for new, old in zip(counters(cache), before, strict=True))
        return read / full if full else 1.0


def counters(cache: MacCache) -> list[int]:
    """Tokens read so far, and those that exact attention would have read."""
    stats = cache.stats()
    return [stats.kv_tokens_read, stats.kv_tokens_full]


@torch.no_grad()
def perplexity(subject: Subject, ids: Tensor, steps: int) -> list[dict[str, Any]]:
    """Feed the last `steps` tokens of a text one by one, in every mode."""
    base, _ = subject.prefill(ids[:, : -steps - 1], steps + 1)
    fed, wanted = ids[0, -steps - 1 : -1].tolist(), ids[0, -steps:].tolist()
    before = counters(base)
    rows, exact = [], torch.empty(0)
    losses: dict[str, Tensor] = {}
    for mode in subject.modes:
        cache = fork(base, mode)
        with attending(mode, subject.share):
            logits = [subject.extend(cache, torch.tensor([[token]])) for token in fed]
        log_p = torch.stack(logits).log_softmax(-1).cpu()
        if mode == "exact":
            exact = log_p
        losses[mode] = -log_p[torch.arange(steps), torch.tensor(wanted)]
        blocks = (losses[mode] - losses["exact"]).split(_BLOCK)
        _, low, high = _bootstrap([[float(block.mean())] for block in blocks])
        mean = float(losses[mode].mean())
        rows.append(
            {
                "mode": mode,
                "tokens": ids.shape[1],
                "steps": steps,
                "perplexity": math.exp(mean),
                "ratio": math.exp(mean - float(losses["exact"].mean())),
                "interval": [math.exp(low) - 1, math.exp(high) - 1],
                "kl": float((exact.exp() * (exact - log_p)).sum(-1).mean()),
                "agreement": float((exact.argmax(-1) == log_p.argmax(-1)).float().mean()),
                "kv_read": subject.kv_read(mode, cache, before),
            }
        )
    return rows


def ruler(subject: Subject, task: str, length: int, samples: int) -> dict[str, dict[str, Any]]:
    """Scores of at least `samples` questions for each mode, a list for each context."""
    found = _results(subject)
    asked = 0
    while asked < samples:
        sample = tasks.make(task, subject.tokenizer, length, seed=asked)
        head, tail = _chat(subject.tokenizer, sample.context)
        questions = [(tail.format(q.text) + q.prefix, q.score) for q in sample.questions]
        _answer(subject, head, questions, sample.max_new_tokens, found)
        asked += len(questions)
    return _with_means(found)


def answers(
    subject: Subject, cases: list[tuple[str, Callable[[str], float]]], max_new_tokens: int
) -> dict[str, dict[str, Any]]:
    """Scores of prompts of their own, each with the function that scores its answer."""
    found = _results(subject)
    for prompt, score in cases:
        head, tail = _chat(subject.tokenizer, prompt)
        _answer(subject, head, [(tail.format(""), score)], max_new_tokens, found)
    return _with_means(found)


def _results(subject: Subject) -> dict[str, dict[str, Any]]:
    return {mode: {"scores": [], "kv_read": []} for mode in subject.modes}


def _with_means(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    for result in found.values():
        result["kv_read"] = sum(result["kv_read"]) / len(result["kv_read"])
    return found


@torch.no_grad()
def _answer(
    subject: Subject,
    head: str,
    questions: list[tuple[str, Callable[[str], float]]],
    max_new_tokens: int,
    found: dict[str, dict[str, Any]],
) -> None:
    """Prefill the context, then each question on a copy, then answer greedily in each mode."""
    tokenizer = subject.tokenizer
    encoded = [
        tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        for text, _ in questions
    ]
    room = max(ids.shape[1] for ids in encoded) + max_new_tokens
    context = tokenizer(head, add_special_tokens=False, return_tensors="pt").input_ids
    base, _ = subject.prefill(context, room)
    for result in found.values():
        result["scores"].append([])
    for ids, (_, score) in zip(encoded, questions, strict=True):
        asked = fork(base, "MAC")  # the rings must see the question
        first = subject.extend(asked, ids)
        before = counters(asked)
        for mode in subject.modes:
            cache = fork(asked, mode)
            tokens = _greedy(subject, mode, cache, first, max_new_tokens)
            found[mode]["scores"][-1].append(score(tokenizer.decode(tokens)))
            found[mode]["kv_read"].append(subject.kv_read(mode, cache, before))


def _greedy(
    subject: Subject, mode: str, cache: MacCache, logits: Tensor, max_new_tokens: int
) -> list[int]:
    stop = _stop_tokens(subject)
    tokens: list[int] = []
    with attending(mode, subject.share):
        while True:
            tokens.append(int(logits.argmax()))
            if tokens[-1] in stop or len(tokens) == max_new_tokens:
                return tokens
            logits = subject.extend(cache, torch.tensor([tokens[-1:]]))


def _stop_tokens(subject: Subject) -> list[int]:
    config = subject.model.generation_config
    ids = config.eos_token_id if config is not None else None
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    own = subject.tokenizer.eos_token_id
    return ids if own is None else [*ids, own]


@torch.no_grad()
def generation(subject: Subject, ids: Tensor, tokens: int) -> list[dict[str, Any]]:
    """Continue a prompt for long: exact decode, then MAC on exact's tokens and on its own.

    The choice is greedy but never a stop token, with the repetition penalty of the demo.
    """
    choice = Choice(_stop_tokens(subject), repetition_penalty=1.1)
    base, logits = subject.prefill(ids, tokens + 1)
    before = counters(base)
    cache, text, exact = fork(base, "exact"), [choice(logits, [])], []
    for _ in range(tokens):
        exact.append(subject.extend(cache, torch.tensor([text[-1:]])).log_softmax(-1))
        text.append(choice(exact[-1], text))
    rows = [_statistics("exact", text, text, 0.0, 1.0, 1.0)]
    for mode in subject.modes[1:]:
        fed, own = fork(base, mode), fork(base, mode)
        divergence, same = 0.0, 0
        with attending(mode, subject.share):
            for i, log_p in enumerate(exact):
                log_q = subject.extend(fed, torch.tensor([text[i : i + 1]])).log_softmax(-1)
                divergence += max(0.0, float((log_p.exp() * (log_p - log_q)).sum()))
                same += choice(log_q, text[: i + 1]) == text[i + 1]
            free = text[:1]
            for _ in range(tokens):
                free.append(choice(subject.extend(own, torch.tensor([free[-1:]])), free))
        share = subject.kv_read(mode, own, before)
        rows.append(_statistics(mode, free, text, divergence / tokens, same / tokens, share))
    return rows


def _statistics(
    mode: str, text: list[int], exact: list[int], kl: float, same: float, kv_read: float
) -> dict[str, Any]:
    grams = [tuple(text[i : i + 4]) for i in range(len(text) - 3)]
    pairs = zip(text, exact, strict=True)
    return {
        "mode": mode,
        "tokens": len(text),
        "kl": kl,  # on exact's tokens
        "same_token": same,  # on exact's tokens
        "agrees_for": next((i for i, (a, b) in enumerate(pairs) if a != b), len(text)),
        "distinct_4grams": len(set(grams)) / len(grams),
        # Tokens that stood already 1 to 64 places before: loops show here.
        "repeated": sum(t in text[max(0, i - 64) : i] for i, t in enumerate(text)) / len(text),
        "kv_read": kv_read,
    }


def difference(scores: list[list[float]], exact: list[list[float]]) -> tuple[float, float, float]:
    """Mean difference per question and its 95% interval, by bootstrap over the prompts."""
    return _bootstrap(
        [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(scores, exact, strict=True)]
    )


def _bootstrap(groups: list[list[float]], rounds: int = 2000) -> tuple[float, float, float]:
    """Mean over all numbers, and its 95% interval when whole groups are drawn anew."""
    rng = random.Random(0)
    sums = [(sum(group), len(group)) for group in groups]

    def mean(drawn: list[tuple[float, int]]) -> float:
        return sum(total for total, _ in drawn) / sum(count for _, count in drawn)

    means = sorted(mean(rng.choices(sums, k=len(sums))) for _ in range(rounds))
    return mean(sums), means[int(0.025 * rounds)], means[int(0.975 * rounds) - 1]


def _chat(tokenizer: PreTrainedTokenizerBase, context: str) -> tuple[str, str]:
    """What comes before the question, and a format string for it and the answer's beginning."""
    mark = "\x00"
    if tokenizer.chat_template is None:
        return context, "{}\n"
    message = {"role": "user", "content": context + mark}
    chat = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    head, tail = chat.split(mark)
    return head, "{}" + tail.replace("{", "{{").replace("}", "}}")
