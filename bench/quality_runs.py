"""The measurements of quality.py: one prefill, then every way of attending from it.

Prompts of equal length are decoded as one batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from modes import Mode, Prefill, attending
from quality_prompts import Questions, chat
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mac_attn.integrations.transformers import MacCache
from mac_attn.stats import COUNTERS

BLOCK = 16  # tokens whose losses are kept as one mean: those of neighbours are not independent
_CHECK_EVERY = 8  # steps between looks at whether all answers have ended: each waits for the GPU


class OutOfTime(Exception):
    """The time that a run was given is over."""


@dataclass
class Subject:
    """What is measured: a model, the modes (exact first) and how many prompts make a batch."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    modes: Sequence[Mode]
    batch: int
    deadline: float = float("inf")  # of time.monotonic()

    def prefill(self, ids: Tensor, room: int) -> Prefill:
        """Prompts `[B, n]` in a cache with `room` more places each."""
        windows = [
            config.window
            for mode in self.modes
            for config in (mode.config if isinstance(mode.config, tuple) else (mode.config,))
            if config is not None
        ]
        return Prefill(self.model, ids, room, max(windows, default=1))

    def step(self, cache: MacCache, tokens: Tensor) -> Tensor:
        """Feed a token `[B]` to each request; logits `[B, vocab]` float32."""
        if time.monotonic() > self.deadline:
            raise OutOfTime
        logits: Tensor = self.model(tokens[:, None], past_key_values=cache).logits
        return logits[:, -1].float()


def counters(cache: MacCache) -> Tensor:
    """Tokens read so far by each request and what exact attention would have read, `[B, 2]`."""
    layers = [layer.reuse.counters for layer in cache.layers if layer.reuse is not None]
    columns = [COUNTERS.index(name) for name in ("kv_tokens_read", "kv_tokens_full")]
    return torch.stack(layers).sum(0)[:, columns]


def kv_read(mode: Mode, cache: MacCache) -> list[float]:
    """Share of the KV that each request has read since its prefill."""
    if mode.kind != "MAC":
        return [mode.share] * cache.layers[0].batch_size
    return _share(counters(cache).tolist())


def _share(counts: list[list[int]]) -> list[float]:
    return [read / full if full else 1.0 for read, full in counts]


def batches(prompts: Sequence[Sequence[int]], most: int) -> Iterator[list[int]]:
    """Indices of prompts in a row that have equal lengths, at most so many at a time."""
    batch: list[int] = []
    for i, ids in enumerate(prompts):
        if batch and (len(batch) == most or len(prompts[batch[0]]) != len(ids)):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.no_grad()
def perplexity(subject: Subject, windows: Tensor, steps: int) -> Iterator[list[dict[str, Any]]]:
    """Feed the last `steps` tokens of windows `[W, n]` one by one, in every mode.

    Yields rows batch by batch and mode by mode, one for each window: mean losses of blocks of
    tokens, mean KL from exact, the share of steps with exact's most likely token, of the KV read.
    """
    for start in range(0, len(windows), subject.batch):
        ids = windows[start : start + subject.batch].to(subject.model.device)
        prefill = subject.prefill(ids[:, : -steps - 1], steps + 1)
        exact: list[Tensor] = []
        for mode in subject.modes:
            cache = prefill.cache(mode)
            losses, kl, same = [], [], []
            with attending(mode):
                for i in range(steps):
                    at = ids.shape[1] - steps + i
                    log_q = subject.step(cache, ids[:, at - 1]).log_softmax(-1)
                    if mode is subject.modes[0]:
                        exact.append(log_q)
                    log_p = exact[i]
                    losses.append(-log_q.gather(1, ids[:, at : at + 1])[:, 0])
                    kl.append(divergence(log_p, log_q))
                    same.append(log_p.argmax(-1) == log_q.argmax(-1))
            loss = torch.stack(losses, 1).double().cpu()  # [B, steps]
            kls = torch.stack(kl, 1).double().mean(1).tolist()
            agreement = torch.stack(same, 1).double().mean(1).tolist()
            reads = kv_read(mode, cache)
            del cache  # before the next mode's is made: rings are large
            yield [
                {
                    "window": start + b,
                    "mode": mode.name,
                    "losses": [float(block.mean()) for block in loss[b].split(BLOCK)],
                    "kl": kls[b],
                    "agreement": agreement[b],
                    "kv_read": reads[b],
                }
                for b in range(len(ids))
            ]


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL of distributions `[B, vocab]` in nats, `[B]`; rounding may not bring it below 0."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)


def ruler(subject: Subject, questions: Questions) -> Iterator[list[dict[str, Any]]]:
    """Rows batch by batch, one for each question and mode: its score, and the KV read."""
    prompts = [asked.ids for asked in questions.asked]
    scores = [_all_in(asked.answers) for asked in questions.asked]
    for rows in answers(subject, prompts, scores, questions.max_new_tokens):
        for row in rows:
            row["question"] += questions.first
        yield rows


def _all_in(wanted: Sequence[str]) -> Callable[[str], float]:
    """Share of the answers that occur in the output, as RULER's string_match_all."""
    return lambda output: sum(w.lower() in output.lower() for w in wanted) / len(wanted)


def texts_as_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of texts, each as a chat's only message."""
    return [tokenizer(chat(tokenizer, text), add_special_tokens=False).input_ids for text in texts]


@torch.no_grad()
def answers(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    scores: Sequence[Callable[[str], float]],
    max_new_tokens: int,
) -> Iterator[list[dict[str, Any]]]:
    """Answer every prompt greedily in every mode; rows batch by batch."""
    for batch in batches(prompts, subject.batch):
        prefill = subject.prefill(torch.tensor([prompts[i] for i in batch]), max_new_tokens)
        rows = []
        for mode in subject.modes:
            texts, reads = _greedy(subject, mode, prefill, max_new_tokens)
            for i, tokens, read in zip(batch, texts, reads, strict=True):
                text = subject.tokenizer.decode(tokens)
                score = scores[i](text)
                row = {"question": i, "mode": mode.name, "score": score, "kv_read": read}
                rows.append(row | {"answer": text})
        yield rows


def _greedy(
    subject: Subject, mode: Mode, prefill: Prefill, max_new_tokens: int
) -> tuple[list[list[int]], list[float]]:
    """The answers of a batch, each up to its stop token, and the shares of the KV they read."""
    stop = torch.tensor(stop_tokens(subject), device=subject.model.device)
    cache, logits = prefill.cache(mode), prefill.logits
    tokens, reads = [logits.argmax(-1)], []
    ended = torch.isin(tokens[0], stop)
    with attending(mode):
        while len(tokens) < max_new_tokens:
            if len(tokens) % _CHECK_EVERY == 0 and bool(ended.all()):
                break
            tokens.append(subject.step(cache, tokens[-1]).argmax(-1))
            ended |= torch.isin(tokens[-1], stop)
            if mode.kind == "MAC":
                reads.append(counters(cache))
    text = torch.stack(tokens, 1)
    # Tokens up to the first stop token, which is included; a batch goes on for its longest answer.
    before = torch.isin(text, stop).cumsum(1) - torch.isin(text, stop).int() == 0
    lengths = before.sum(1).tolist()
    shares = [mode.share] * len(text)
    if reads:
        history = torch.stack(reads, 1).tolist()  # [B, steps, 2]; step i fed token i
        shares = _share([steps[max(0, n - 2)] for steps, n in zip(history, lengths, strict=True)])
    return [row[:n] for row, n in zip(text.tolist(), lengths, strict=True)], shares


def stop_tokens(subject: Subject) -> list[int]:
    """Tokens that end an answer."""
    config = subject.model.generation_config
    ids = config.eos_token_id if config is not None else None
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    own = subject.tokenizer.eos_token_id
    return ids if own is None else [*ids, own]


class Choice:
    """The next tokens: the most likely, but never a stop token and rather not a used one."""

    def __init__(
        self, subject: Subject, shape: torch.Size, repetition_penalty: float = 1.1
    ) -> None:
        """For logits of this shape, `[B, vocab]`."""
        device = subject.model.device
        self.penalty = repetition_penalty
        self.used = torch.zeros(shape, dtype=torch.bool, device=device)
        self.stop = torch.zeros(shape[1], dtype=torch.bool, device=device)
        self.stop[stop_tokens(subject)] = True

    def __call__(self, logits: Tensor) -> Tensor:
        """Choice `[B]` from logits `[B, vocab]`, after the tokens that were taken."""
        penalised = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
        logits = torch.where(self.used, penalised, logits)
        return logits.masked_fill(self.stop, -torch.inf).argmax(-1)

    def take(self, tokens: Tensor) -> Tensor:
        """Count tokens `[B]` as used from now on; returns them."""
        self.used.scatter_(1, tokens[:, None], True)
        return tokens


@torch.no_grad()
def generation(subject: Subject, prompts: Tensor, tokens: int) -> Iterator[list[dict[str, Any]]]:
    """Continue prompts `[P, n]` for long: exact, then every mode on exact's tokens and on its own.

    The choice is greedy but never a stop token, with a repetition penalty of 1.1 on what was
    generated, as in the demo. Rows batch by batch and mode by mode, one for each prompt.
    """
    exact, *others = subject.modes
    for start in range(0, len(prompts), subject.batch):
        prefill = subject.prefill(prompts[start : start + subject.batch], tokens + 1)
        for mode in others:
            text, kl, same = _on_exact_text(subject, exact, mode, prefill, tokens)
            if mode is others[0]:
                yield [
                    {"prompt": start + i} | _statistics(exact.name, row, row, 0.0, 1.0, 1.0)
                    for i, row in enumerate(text)
                ]
            own, reads = _generate(subject, mode, prefill, tokens)
            parts = zip(own, text, kl, same, reads, strict=True)
            yield [
                {"prompt": start + i} | _statistics(mode.name, *part)
                for i, part in enumerate(parts)
            ]


def _generate(
    subject: Subject, mode: Mode, prefill: Prefill, count: int
) -> tuple[list[list[int]], list[float]]:
    """`count + 1` tokens of a mode's own for each request, and the shares of the KV read."""
    choice, cache = Choice(subject, prefill.logits.shape), prefill.cache(mode)
    text = [choice.take(choice(prefill.logits))]
    with attending(mode):
        for _ in range(count):
            text.append(choice.take(choice(subject.step(cache, text[-1]))))
    return torch.stack(text, 1).tolist(), kv_read(mode, cache)


def _on_exact_text(
    subject: Subject, exact: Mode, mode: Mode, prefill: Prefill, count: int
) -> tuple[list[list[int]], list[float], list[float]]:
    """Exact's `count + 1` tokens for each request, and how a mode does that is fed with them.

    That is its mean KL from exact and the share of equal choices. Both run side by side: the
    distributions of all steps would fill the memory.
    """
    choice = Choice(subject, prefill.logits.shape)
    reference, cache = prefill.cache(exact), prefill.cache(mode, copy=True)
    text = [choice.take(choice(prefill.logits))]
    kl, same = [], []
    for _ in range(count):
        with attending(exact):
            wanted = subject.step(reference, text[-1])
        with attending(mode):
            found = subject.step(cache, text[-1])
        kl.append(divergence(wanted.log_softmax(-1), found.log_softmax(-1)))
        chosen = choice(wanted)
        same.append(choice(found) == chosen)
        text.append(choice.take(chosen))
    kls, shares = (torch.stack(part, 1).double().mean(1).tolist() for part in (kl, same))
    return torch.stack(text, 1).tolist(), kls, shares


def _statistics(
    mode: str, text: list[int], exact: list[int], kl: float, same: float, read: float
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
        "kv_read": read,
    }
