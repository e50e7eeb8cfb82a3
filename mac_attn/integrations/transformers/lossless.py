"""Speculative decoding without a second model: steps that reuse draft, an exact step verifies.

The tokens are those of exact decoding, or with sampling have its distribution (Leviathan, Kalman,
Matias, ICML 2023; Chen et al., arXiv:2302.01318). A draft reads a few percent of the KV cache; the
verification reads it once for all drafts, and leaves an exact entry for the next ones to reuse.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from mac_attn import MAX_QUERY_TOKENS
from mac_attn._checks import check_int, check_type

from .cache import MacCache
from .rotation import cache_name
from .shared import Mode
from .support import NEUTRAL, Refusal

TIMED_ROUNDS = 4  # that are waited for, to learn what a draft costs
# What generate may hand over for the model. Anything else is an input that would be lost.
_INPUTS = NEUTRAL | {"cache", "past_key_values", "attention_mask", "position_ids"}


@dataclass
class LosslessStats:
    """What a `Lossless` has done so far.

    Attributes:
        tokens: that were generated, of one request, the first one (from the prompt) not counted.
        verifications: exact steps.
        drafted, accepted: tokens of each request, of the batch those that all of it accepted.
        draft_cost: the time of a draft over that of a verification; 0 before it is known.
        kv_tokens_read, kv_tokens_exact: keys read, and those that exact decode reads for the same
            tokens; summed over requests, layers that reuse and KV heads.
    """

    tokens: int = 0
    verifications: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_cost: float = 0.0
    kv_tokens_read: int = 0
    kv_tokens_exact: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were accepted; 0 before there are any."""
        return self.accepted / max(1, self.drafted)

    @property
    def tokens_per_verification(self) -> float:
        """Tokens of a request for each time that its whole KV cache was read."""
        return self.tokens / max(1, self.verifications)

    @property
    def kv_read_share(self) -> float:
        """What was read of the KV cache over what exact decode reads; 1 before there is any."""
        return self.kv_tokens_read / self.kv_tokens_exact if self.kv_tokens_exact else 1.0


class Lossless:
    """A decoding method for `model.generate(..., past_key_values=cache, custom_generate=...)`.

    Greedy decoding gives the tokens of exact greedy decoding; sampling (with temperature, top-k,
    and whatever else generate's options make a distribution of) has the distribution of exact
    sampling. Logits processors must be functions of the ids and logits that they get: drafts are
    shown to them, too. In a batch all requests go on from the first token that one of them rejects.

    Args:
        max_drafts: tokens that are drafted before they are verified, at most; from 1 to 15.
        adaptive: draft as many as pay, by the acceptance so far and by what a draft costs beside a
            verification, measured in the first rounds; else always `max_drafts`.
        streamer: gets the tokens as they are verified (of one request). generate's own `streamer`
            is not handed to decoding methods by all versions of transformers.

    Attributes:
        stats: a `LosslessStats`, over all calls.

    Raises:
        ValueError: an argument is out of range; in `generate`, a cache that is no `MacCache` or
            that reuses nothing, beam search, classifier-free guidance, inputs of the model besides
            token ids (pixel_values, inputs_embeds, ...), or outputs that it does not have.
    """

    def __init__(
        self, max_drafts: int = 6, *, adaptive: bool = True, streamer: Any | None = None
    ) -> None:
        self.max_drafts = check_int("max_drafts", max_drafts, low=1)
        if max_drafts >= MAX_QUERY_TOKENS:
            raise ValueError(
                f"max_drafts is {max_drafts}, must be from 1 to {MAX_QUERY_TOKENS - 1}: a "
                f"verification has at most {MAX_QUERY_TOKENS} tokens"
            )
        check_type("adaptive", adaptive, bool)
        self.adaptive = adaptive
        self.streamer = streamer
        self.stats = LosslessStats()
        self._acceptance = 1.0  # of a draft, the younger rounds weighing more

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any | None = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """What generate calls; returns the token ids `[B, prompt + new]`, or its output object."""
        _refuse(generation_config, synced_gpus, model, model_kwargs)
        run = _Run(self, model, input_ids, logits_processor, generation_config, model_kwargs)
        streamer = streamer or self.streamer
        streamed = 0
        if streamer is not None:
            streamer.put(input_ids.cpu())
            streamed = input_ids.shape[1]
        run.prefill()
        begin, read = run.ids.shape[1], run.cache.stats().kv_tokens_read
        run.stop(stopping_criteria)
        while True:
            if streamer is not None:
                for column in run.ids[:, streamed:].cpu().unbind(1):
                    streamer.put(column)
                streamed = run.ids.shape[1]
            if run.finished:
                break
            run.round(stopping_criteria)
        if streamer is not None:
            streamer.end()
        after = run.cache.stats()
        layers = sum(layer.reuse is not None for layer in run.cache.layers)
        steps = sum(range(begin, run.ids.shape[1])) * len(run.ids)
        self.stats.kv_tokens_read += after.kv_tokens_read - read
        self.stats.kv_tokens_exact += steps * layers * after.num_kv_heads
        if not generation_config.return_dict_in_generate:
            return run.ids
        output: dict[str, Any] = {
            "sequences": run.ids,
            "scores": tuple(run.scores) if generation_config.output_scores else None,
            "logits": tuple(run.logits) if generation_config.output_logits else None,
            cache_name(GenerateDecoderOnlyOutput): run.cache,
        }
        return GenerateDecoderOnlyOutput(**output)

    def drafts(self) -> int:
        """How many tokens to draft next."""
        cost = self.stats.draft_cost
        if not self.adaptive or not cost:
            return self.max_drafts
        rate = min(self._acceptance, 0.999)

        def speed(k: int) -> float:  # tokens for the time of a verification
            return (1 - rate ** (k + 1)) / (1 - rate) / (1 + k * cost)

        return max(range(1, self.max_drafts + 1), key=speed)

    def learn(self, drafted: int, accepted: int, tokens: int) -> None:
        """A round has ended, with so many new tokens."""
        if tried := min(drafted, accepted + 1):  # those behind the first rejected one tell nothing
            self._acceptance += (accepted / tried - self._acceptance) * min(1.0, tried / 32)
        stats = self.stats
        stats.verifications += 1
        stats.drafted += drafted
        stats.accepted += accepted
        stats.tokens += tokens


class _Run:
    """One call of generate: `ids` `[B, n]`, of which the cache holds all but the last."""

    def __init__(
        self,
        method: Lossless,
        model: Any,
        ids: Tensor,
        processor: Any,
        options: Any,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.method, self.model, self.ids, self.processor = method, model, ids, processor
        caches = [model_kwargs.get(name) for name in ("cache", "past_key_values")]
        cache = next((cache for cache in caches if cache is not None), None)
        if not isinstance(cache, MacCache) or cache.mode != "reuse":
            raise Refusal(
                "Lossless needs past_key_values=MacCache(...) in mode 'reuse', as one made with a "
                f"`config` is; got {cache!r}"
            )
        self.cache = cache
        self.name = "cache" if caches[0] is cache else "past_key_values"
        self.mask: Tensor | None = model_kwargs.get("attention_mask")
        self.padded = self.mask is not None and not bool(self.mask.all())
        self.positions: Tensor | None = model_kwargs.get("position_ids")
        if self.positions is None and self.padded:
            assert self.mask is not None
            self.positions = (self.mask.long().cumsum(-1) - 1).clamp(min=0)
        if self.positions is not None and self.positions.shape[-1] < ids.shape[1]:
            raise Refusal(
                f"position_ids has {self.positions.shape[-1]} positions, must have one for each of "
                f"the prompt's {ids.shape[1]} tokens"
            )
        self.chunk: int | None = options.prefill_chunk_size
        # generate asks for the last logits alone where the model's forward can be asked.
        self.last_alone = "logits_to_keep" in model_kwargs
        self.samples: bool = options.do_sample
        self.pad: Tensor | None = getattr(options, "_pad_token_tensor", None)
        self.keeps = bool(options.output_scores or options.output_logits)
        self.unfinished = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []

    @property
    def finished(self) -> bool:
        return not bool(self.unfinished.any())

    def forward(self, new: Tensor, mode: Mode, *, last: bool = False) -> Tensor:
        """Logits `[B, T, V]` float32 of new tokens `[B, T]`, or of the `last` alone."""
        begin = self.cache.get_seq_length()
        end = begin + new.shape[1]
        options: dict[str, Any] = {self.name: self.cache}
        if self.padded:
            assert self.mask is not None
            more = self.mask.new_ones(len(new), max(0, end - self.mask.shape[1]))
            options["attention_mask"] = torch.cat([self.mask, more], dim=1)[:, :end]
        if self.positions is not None:
            more = torch.arange(max(0, end - self.positions.shape[-1]), device=new.device) + 1
            positions = torch.cat([self.positions, self.positions[..., -1:] + more], dim=-1)
            options["position_ids"] = positions[..., begin:end]
        if last and self.last_alone:
            options["logits_to_keep"] = 1
        before, self.cache.mode = self.cache.mode, mode
        try:
            logits: Tensor = self.model(input_ids=new, use_cache=True, **options).logits
        finally:
            self.cache.mode = before
        return logits[:, -1:].float() if last else logits.float()

    def prefill(self) -> None:
        """Feed the prompt, or what of it the cache does not hold; append the first token."""
        rest = self.ids[:, self.cache.get_seq_length() :]
        for part in rest.split(self.chunk or rest.shape[1], dim=1):
            logits = self.forward(part, "verify", last=True)[:, -1]
        scores = self.processor(self.ids, logits)
        self.append(self.take(self.distribution(scores)), logits, scores)

    def distribution(self, scores: Tensor) -> Tensor:
        """What a token is taken from, of scores `[B, V]` as generate's options make them."""
        return scores.softmax(-1) if self.samples else scores

    def take(self, distribution: Tensor) -> Tensor:
        """A token `[B]`."""
        if self.samples:
            return torch.multinomial(distribution, 1)[:, 0]
        return distribution.argmax(-1)

    def append(self, token: Tensor, logits: Tensor, scores: Tensor) -> None:
        """A token `[B]`; a finished request gets padding."""
        if self.keeps:
            self.logits.append(logits)
            self.scores.append(scores)
        if self.pad is not None:
            token = torch.where(self.unfinished, token, self.pad)
        self.ids = torch.cat([self.ids, token[:, None]], dim=1)

    def stop(self, criteria: Any) -> None:
        """Note which requests end with the last token."""
        self.unfinished &= ~criteria(self.ids, tuple(self.scores) or None)

    def round(self, criteria: Any) -> None:
        """Draft, verify, and append what is accepted and one token more."""
        method, start = self.method, self.ids.shape[1]
        drafts = method.drafts()
        room = self.cache.get_max_length() - start
        if criteria.max_length is not None:
            room = min(room, criteria.max_length - start - 1)
        drafts = min(drafts, room)
        timed = method.stats.verifications < TIMED_ROUNDS
        clock = _Clock(self.ids.device) if timed else None
        ids, proposals = self.ids, []
        for _ in range(drafts):
            drafted = self.processor(ids, self.forward(ids[:, -1:], "draft")[:, -1])
            proposals.append(self.distribution(drafted))
            ids = torch.cat([ids, self.take(proposals[-1])[:, None]], dim=1)
        drafting = clock.lap() if clock else 0.0
        if drafts > 0:
            self.cache.crop(-drafts)
        logits = self.forward(ids[:, start - 1 :], "verify").unbind(1)
        scores = [self.processor(ids[:, : start + i], x) for i, x in enumerate(logits)]
        targets = [self.distribution(x) for x in scores]
        accepted, last = self.judge(ids[:, start:], proposals, targets)
        if clock and drafts > 0:
            cost = drafting / drafts / clock.lap()
            method.stats.draft_cost = min(cost, method.stats.draft_cost or cost)
        for i in range(accepted + 1):
            token = ids[:, start + i] if i < accepted else last
            self.append(token, logits[i], scores[i])
            self.stop(criteria)
            if self.finished:
                break
        method.learn(drafts, accepted, self.ids.shape[1] - start)
        surplus = self.cache.get_seq_length() - (self.ids.shape[1] - 1)
        if surplus > 0:
            self.cache.crop(-surplus)

    def judge(
        self, drafts: Tensor, proposals: list[Tensor], targets: list[Tensor]
    ) -> tuple[int, Tensor]:
        """How many drafts `[B, k]` all requests accept, and the token `[B]` that follows them."""
        k = drafts.shape[1]
        if not self.samples:
            best = torch.stack([scores.argmax(-1) for scores in targets], dim=1)
            agree = best[:, :k] == drafts
        else:
            at = drafts[..., None]
            p, q = (
                torch.stack(x[:k], dim=1).gather(-1, at)[..., 0] if k else drafts.float()
                for x in (targets, proposals)
            )
            agree = torch.rand_like(p) * q < p
        agree = agree | ~self.unfinished[:, None]
        counts = agree.long().cumprod(dim=1).sum(dim=1)
        accepted = int(counts.min()) if k else 0
        if not self.samples:
            return accepted, best[:, accepted]
        # Those who reject here draw from what the draft's distribution leaves of the exact one;
        # the others take their draft. Behind the last draft all draw from the exact one.
        target = targets[accepted]
        if accepted == k:
            return accepted, self.take(target)
        rest = (target - proposals[accepted]).clamp(min=0)
        nothing = rest.sum(-1, keepdim=True) <= 0  # equal up to rounding: nobody rejects
        last = torch.multinomial(torch.where(nothing, target, rest), 1)[:, 0]
        return accepted, torch.where(counts > accepted, drafts[:, accepted], last)


class _Clock:
    """Times of what a device has done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call."""
        before, self.last = self.last, self._now()
        return self.last - before


def _refuse(options: Any, synced_gpus: bool, model: Any, inputs: dict[str, Any]) -> None:
    """ValueError for what generate can be asked for and this does not do."""
    asked = {
        "num_beams": getattr(options, "num_beams", 1) not in (None, 1),
        "guidance_scale": options.guidance_scale not in (None, 1),
        "output_attentions": bool(options.output_attentions),
        "output_hidden_states": bool(options.output_hidden_states),
        "synced_gpus": bool(synced_gpus),
        "an encoder": bool(model.config.is_encoder_decoder),
    }
    for name, value in inputs.items():
        nothing = value is None or (isinstance(value, dict) and not value)  # as of no images
        asked[f"the model's input `{name}`"] = name not in _INPUTS and not nothing
    if refused := [name for name, given in asked.items() if given]:
        raise Refusal(f"Lossless does not do {', '.join(refused)}: use generate's own methods")
