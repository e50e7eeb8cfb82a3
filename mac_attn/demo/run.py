"""The demo's measurement: four ways to attend, step by step over the same tokens."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from mac_attn import ReuseConfig
from mac_attn.integrations.transformers import AttentionTimer, MacCache, Mode
from mac_attn.integrations.transformers.rotation import cache_name

EXACT: Final = "exact"
REUSE: Final = "reuse"
SDPA: Final = "sdpa"
PACKED: Final = "packed-sdpa"
MODES: tuple[Mode, ...] = (EXACT, REUSE, SDPA, PACKED)


@dataclass
class Trace:
    """What one mode did, per step; every mode was fed the tokens that exact decode chose."""

    attention_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)  # nats, of this distribution from the exact one
    tokens: list[int] = field(default_factory=list)  # greedy choice


@dataclass
class Result:
    """Everything that the demo measured."""

    prompt_tokens: int
    prefill_seconds: float
    traces: dict[str, Trace]
    hit_rate: list[float]  # per step, over layers and query heads
    kv_read_share: list[float]  # per step
    total_hit_rate: float
    total_kv_read_share: float
    search_share: float  # bytes of the queries that a match looks through, against the KV cache's
    first_token: int  # chosen after the prefill
    free_tokens: list[int]  # reuse, fed with its own tokens

    @property
    def free_agreement(self) -> int:
        """How many tokens the two texts have in common at their beginning."""
        return common_beginning(self.traces[EXACT].tokens, self.free_tokens)


def common_beginning(first: list[int], second: list[int]) -> int:
    """How many tokens two texts of one length begin with in common."""
    pairs = zip(first, second, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(first))


class _Decoder:
    """One mode, with a cache of its own: every mode computes its own keys and values."""

    def __init__(self, model: PreTrainedModel, prefilled: MacCache, mode: Mode) -> None:
        self.model = model
        self.name = cache_name(model.forward)
        self.cache = copy.deepcopy(prefilled)
        self.cache.mode = mode
        self.trace = Trace()

    def step(self, token: int) -> Tensor:
        """Logits `[vocab]` after one more token, timed."""
        ids = torch.tensor([[token]], device=self.model.device)
        with AttentionTimer() as timer:
            start = time.perf_counter()
            logits: Tensor = self.model(ids, **{self.name: self.cache}).logits[0, -1].float()
            attention_seconds = (
                timer.lap()
            )  # on a GPU this waits for the attention of the last layer
            if logits.is_cuda:
                torch.cuda.synchronize(logits.device)
            self.trace.step_seconds.append(time.perf_counter() - start)
        self.trace.attention_seconds.append(attention_seconds)
        return logits


@dataclass(frozen=True)
class Choice:
    """The next token: the most likely one, but never a stop token and rather not a used one."""

    stop_tokens: list[int]
    repetition_penalty: float  # as transformers' option of that name, for generated tokens only

    def __call__(self, logits: Tensor, text: list[int]) -> int:
        """Choice from logits `[vocab]`, after the tokens generated so far."""
        return int(self.adjusted(logits, text).argmax())

    def adjusted(self, logits: Tensor, text: list[int]) -> Tensor:
        """The logits of which the greatest is chosen."""
        logits = logits.clone()
        used = sorted(set(text))
        some, penalty = logits[used], self.repetition_penalty
        logits[used] = torch.where(some > 0, some / penalty, some * penalty)
        logits[self.stop_tokens] = -torch.inf
        return logits


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    ids: Tensor,
    new_tokens: int,
    config: ReuseConfig,
    choice: Choice,
) -> Result:
    """Prefill once, then decode `new_tokens` tokens in all modes in turn.

    At every step all modes get the same token, the greedy choice of exact decode, one right after
    the other, so that a disturbance of the machine meets all of them.
    """
    ids = ids.to(model.device)
    base = MacCache(model, max_length=ids.shape[1] + new_tokens, config=config)
    with _layer_progress(model, f"prefill {ids.shape[1]:,} tokens"):
        start = time.perf_counter()
        output = model(ids, **{cache_name(model.forward): base}, logits_to_keep=1)
        logits = output.logits[0, -1].float()
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        prefill_seconds = time.perf_counter() - start
    decoders = {mode: _Decoder(model, base, mode) for mode in MODES}
    for mode in MODES:  # first calls allocate and start threads: on a copy, outside the measurement
        _Decoder(model, base, mode).step(0)
    hit_rate, kv_read_share = [], []
    before = base.stats()
    text = [choice(logits, [])]
    with tqdm(total=new_tokens, desc="decode, 4 ways", unit="tok", leave=False) as bar:
        for _ in range(new_tokens):
            outputs = {mode: decoder.step(text[-1]) for mode, decoder in decoders.items()}
            log_p = outputs[EXACT].log_softmax(-1)
            for mode, decoder in decoders.items():
                log_q = outputs[mode].log_softmax(-1)
                # Rounding may bring a divergence of nearly 0 below it.
                kl = max(0.0, float((log_p.exp() * (log_p - log_q)).sum()))
                decoder.trace.kl.append(kl)
                decoder.trace.tokens.append(choice(outputs[mode], text))
            stats = decoders[REUSE].cache.stats()
            heads = (stats.steps - before.steps) * stats.num_qo_heads
            hit_rate.append((stats.query_head_hits - before.query_head_hits) / heads)
            full = stats.kv_tokens_full - before.kv_tokens_full
            kv_read_share.append((stats.kv_tokens_read - before.kv_tokens_read) / full)
            before = stats
            text.append(decoders[EXACT].trace.tokens[-1])
            bar.set_postfix_str(f"hit rate {stats.hit_rate:.0%}", refresh=False)
            bar.update()

    free = _Decoder(model, base, REUSE)
    free_text = text[:1]
    for _ in tqdm(range(new_tokens), desc="reuse, on its own", unit="tok", leave=False):
        free_text.append(choice(free.step(free_text[-1]), free_text))

    searched = cached = 0
    for layer in decoders[REUSE].cache.layers:
        if layer.reuse is not None:
            searched += layer.reuse.ring_query.nbytes
            cached += 2 * layer.key_store[:, : layer.length].nbytes
    return Result(
        prompt_tokens=ids.shape[1],
        prefill_seconds=prefill_seconds,
        traces={mode: decoder.trace for mode, decoder in decoders.items()},
        hit_rate=hit_rate,
        kv_read_share=kv_read_share,
        total_hit_rate=stats.hit_rate,
        total_kv_read_share=stats.kv_read_share,
        search_share=searched / cached,
        first_token=text[0],
        free_tokens=free_text[1:],
    )


@contextmanager
def _layer_progress(model: PreTrainedModel, description: str) -> Iterator[None]:
    """A progress bar over the model's layers while one forward runs."""
    layers = model.get_decoder().layers
    with tqdm(total=len(layers), desc=description, unit="layer", leave=False) as bar:
        # A hook's result would replace the layer's output, and `update` has one.
        hooks = [
            layer.register_forward_hook(lambda *_: (bar.update(), None)[1]) for layer in layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
