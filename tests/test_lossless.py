"""`Lossless`: the tokens of exact decoding, whatever the drafts are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from cases import one_thread  # noqa: E402
from tiny_models import (  # noqa: E402
    ALWAYS,
    EOS,
    FAMILIES,
    ROUNDING,
    VOCAB,
    left_padded,
    prompts,
    tiny_model,
)
from transformers import (  # noqa: E402
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput  # noqa: E402

from mac_attn.integrations.transformers import Lossless, MacCache  # noqa: E402
from mac_attn.integrations.transformers.lossless import _Run  # noqa: E402
from mac_attn.integrations.transformers.rotation import cache_name  # noqa: E402

# Everything hits, and what is reused is wrong by much: many drafts are rejected.
WRONG = replace(ALWAYS, anchors=0, threshold=8.0, band=2, min_context=0)
NEW = 40

pytestmark = pytest.mark.float32


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def generate(model: Any, ids: Any, method: Lossless | None, config: Any = WRONG, **options: Any):
    """With `method` in a MacCache, without exactly, by transformers."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | options
    options.setdefault("attention_mask", torch.ones_like(ids))
    if method is None:
        model.set_attn_implementation("sdpa")
        output = model.generate(ids, return_dict_in_generate=True, output_scores=True, **options)
        model.set_attn_implementation("mac")
        return output
    cache = MacCache(model, max_length=ids.shape[1] + NEW, config=config)
    return model.generate(
        ids, past_key_values=cache, custom_generate=method, return_dict_in_generate=True,
        output_scores=True, **options,
    )  # fmt: skip


def check_same(got: Any, want: Any) -> None:
    assert torch.equal(got.sequences, want.sequences)
    assert len(got.scores) == len(want.scores)
    torch.testing.assert_close(
        torch.stack(got.scores), torch.stack(want.scores), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("drafts", [1, 4, 15])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy(family: str, drafts: int, device: torch.device) -> None:
    model, ids = tiny_model(device, family), prompts(device, 1)
    method = Lossless(drafts, adaptive=False)
    check_same(generate(model, ids, method), generate(model, ids, None))
    stats = method.stats
    assert 0 < stats.accepted < stats.drafted  # some were right, some were not
    assert stats.tokens == NEW - 1 and stats.verifications < NEW - 1


def test_greedy_batch(device: torch.device) -> None:
    model = tiny_model(device)
    ids, mask = left_padded(prompts(device, 3), [0, 9, 31])
    got = generate(model, ids, Lossless(4), attention_mask=mask)
    check_same(got, generate(model, ids, None, attention_mask=mask))


def test_right_drafts_are_accepted(device: torch.device) -> None:
    """Drafts that miss are exact: five tokens a verification."""
    model, ids = tiny_model(device), prompts(device, 1)
    method = Lossless(4, adaptive=False)
    config = replace(WRONG, threshold=0.0)
    check_same(generate(model, ids, method, config), generate(model, ids, None))
    stats = method.stats
    assert stats.acceptance == 1
    assert stats.verifications == -(-(NEW - 1) // 5)
    # A draft reads all up to its token, a verification all up to its last one, once.
    first, heads = ids.shape[1] + 1, 2 * model.config.num_key_value_heads
    exact = range(first, first + NEW - 1)
    assert stats.kv_tokens_exact == sum(exact) * heads
    rounds = [exact[i : i + 5] for i in range(0, NEW - 1, 5)]
    assert stats.kv_tokens_read == sum(sum(r[:-1]) + r[-1] for r in rounds) * heads


def test_drafts_leave_nothing_in_the_ring(device: torch.device) -> None:
    """An entry for each verification, of an exact step, besides those of the prompt."""
    model, ids = tiny_model(device), prompts(device, 1)
    cache = MacCache(model, max_length=80, config=replace(WRONG, threshold=0.0, entries=64))
    method = Lossless(4, adaptive=False)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    ids = model.generate(ids, past_key_values=cache, custom_generate=method, **options)
    reuse = cache.layers[0].reuse
    places = reuse.ring_position[0, 0].tolist()
    positions = {p for p in places if p >= 40}
    assert len(positions) < len([p for p in places if p >= 0])
    assert positions == set(range(40, 40 + 5 * method.stats.verifications, 5))


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_verifying_step_is_exact_and_learns(tokens: int, device: torch.device) -> None:
    """Where all would hit; the slot's history goes on with it."""
    model, ids = tiny_model(device), prompts(device, 2, 45)
    caches = [MacCache(model, max_length=64, config=config) for config in (ALWAYS, None)]
    for cache in caches:
        model(ids[:, :40], past_key_values=cache)
    mac, exact = caches
    mac.mode = "verify"
    steps = [model(ids[:, 40 : 40 + tokens], past_key_values=cache).logits for cache in caches]
    torch.testing.assert_close(*steps, **ROUNDING)
    assert mac.stats().hit_rate == 0
    for layer in mac.layers:
        assert (layer.reuse.ring_position == 40).any(-1).all()
    mac.mode = "reuse"
    model(ids[:, 44:], past_key_values=mac)
    assert mac.stats().query_head_hits == 2 * 2 * 4  # of layers, requests, heads


def test_position_ids(device: torch.device) -> None:
    """Every third position, which changes the tokens, and new tokens count on from the last one."""
    model, ids = tiny_model(device), prompts(device, 2)
    every_third = {"position_ids": 3 * torch.arange(ids.shape[1], device=device)[None]}
    want = generate(model, ids, None, **every_third)
    check_same(generate(model, ids, Lossless(4), **every_third), want)
    assert not torch.equal(want.sequences, generate(model, ids, None).sequences)


@pytest.mark.parametrize("chunk", [None, 17])
def test_the_prompt_makes_one_row_of_logits(chunk: int | None) -> None:
    device = torch.device("cpu")
    model = tiny_model(device)
    ids, mask = left_padded(prompts(device, 2), [0, 9])
    sizes: list[tuple[int, int]] = []

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        sizes.append((kwargs["input_ids"].shape[1], output.logits.shape[1]))

    with model.register_forward_hook(note, with_kwargs=True):
        options = {"attention_mask": mask, "prefill_chunk_size": chunk}
        got = generate(model, ids, Lossless(4), **options)
    prompt = [(40, 1)] if chunk is None else [(17, 1), (17, 1), (6, 1)]
    begin = sizes.index(prompt[0])  # behind the probe of the MacCache
    assert sizes[begin : begin + len(prompt)] == prompt
    check_same(got, generate(model, ids, None, attention_mask=mask))


def test_its_output_has_the_cache() -> None:
    device = torch.device("cpu")
    model, ids = tiny_model(device), prompts(device, 1)
    name = cache_name(GenerateDecoderOnlyOutput)
    assert isinstance(generate(model, ids, Lossless())[name], MacCache)


class Counted(LogitsProcessor):
    """Changes nothing, and notes the lengths that it has been called with."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.lengths.append(input_ids.shape[1])
        return scores


def test_processors_see_each_token_of_a_verification_once(device: torch.device) -> None:
    """And each draft, whether or not scores are asked for."""
    model, ids = tiny_model(device), prompts(device, 1)
    counted, method = Counted(), Lossless(4, adaptive=False)
    generate(model, ids, method, logits_processor=LogitsProcessorList([counted]))
    drafts = method.stats.drafted
    assert len(counted.lengths) == 1 + drafts + drafts + method.stats.verifications


class Recorder:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.got += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


class EndsWith(StoppingCriteria):
    """Ends after a given token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids[:, -1] == self.token


def test_stopping_and_streaming(device: torch.device) -> None:
    """In the middle of a round, at an end token, a criterion of the user's, any length."""
    model, ids = tiny_model(device), prompts(device, 1)
    want = generate(model, ids, None)
    for at in (3, 4, 17):
        last = int(want.sequences[0, 40 + at])
        if last in want.sequences[0, 40 : 40 + at]:
            continue
        criteria = StoppingCriteriaList([EndsWith(last)])
        streamer = Recorder()
        method = Lossless(6, adaptive=False, streamer=streamer)
        got = generate(model, ids, method, stopping_criteria=criteria)
        assert torch.equal(got.sequences, want.sequences[:, : 40 + at + 1])
        assert streamer.ended and streamer.got == got.sequences[0].tolist()
    for new in (1, 2, 5, 8):
        options = {"max_new_tokens": new, "min_new_tokens": new}
        got = generate(model, ids, Lossless(6, adaptive=False), **options)
        check_same(got, generate(model, ids, None, **options))


def test_requests_end_one_by_one(device: torch.device) -> None:
    """What follows an end token is padding, as ever."""
    model, ids = tiny_model(device), prompts(device, 3)
    free = generate(model, ids, None).sequences[:, 40:]
    end = [int(free[0, 7]), int(free[1, 20])]
    options = {"eos_token_id": [*end, EOS], "min_new_tokens": None}
    want = generate(model, ids, None, **options)
    got = generate(model, ids, Lossless(5), **options)
    assert torch.equal(got.sequences, want.sequences)


def test_the_number_of_drafts() -> None:
    """As many as pay: few if they are often wrong or dear."""
    method = Lossless(12)
    assert method.drafts() == 12
    method.stats.draft_cost = 0.1
    method._acceptance = 0.98
    many = method.drafts()
    method._acceptance = 0.5
    assert 1 <= method.drafts() < many <= 12
    method.stats.draft_cost = 2.0
    assert method.drafts() == 1


OPTIONS = {"do_sample": True, "top_k": 3, "temperature": 1.3}


def sampled(run: _Run, ids: torch.Tensor, draws: int) -> Counter[tuple[int, ...]]:
    """How often each continuation by two tokens was drawn."""
    got: Counter[tuple[int, ...]] = Counter()
    length = ids.shape[1]
    while got.total() < draws:
        run.ids = ids
        while run.ids.shape[1] < length + 2:
            run.round(StoppingCriteriaList())
        got.update(map(tuple, run.ids[:, length : length + 2].tolist()))
        surplus = run.cache.get_seq_length() - (length - 1)
        run.cache.crop(-surplus)
    return got


def chi_square(got: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Of the counts beside the probabilities, over its mean."""
    draws = got.total()
    assert got.keys() <= expected.keys()
    terms = [(got[k] - draws * p) ** 2 / (draws * p) for k, p in expected.items()]
    return sum(terms) / (len(terms) - 1)


@pytest.mark.slow
@pytest.mark.parametrize("planted", [False, True])
def test_sampling_has_the_distribution_of_exact_sampling(
    planted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20,000 draws of two tokens, nine cells. Planted: a rejected draft is drawn anew from the
    exact distribution, not from what the draft's leaves of it."""
    device = torch.device("cpu")
    model, prompt = tiny_model(device), prompts(device, 1)
    batch = prompt.repeat(64, 1)
    method = Lossless(2, adaptive=False)
    captured: dict[str, Any] = {}

    def capture(model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any,
                generation_config: Any, **kwargs: Any) -> Any:  # fmt: skip
        captured.update(
            run=_Run(method, model, input_ids, logits_processor, generation_config, kwargs)
        )
        return input_ids

    cache = MacCache(model, max_length=64, config=WRONG)
    model.generate(
        batch, past_key_values=cache, custom_generate=capture, max_new_tokens=8,
        attention_mask=torch.ones_like(batch), **OPTIONS,
    )  # fmt: skip
    run: _Run = captured["run"]
    run.forward(batch[:, :-1], "verify")
    forward = run.forward

    def wrong_drafts(new: torch.Tensor, mode: Any) -> torch.Tensor:
        """Whatever the drafts' distribution is: here one that is wrong by little or by much, so
        that all 64 accept some drafts."""
        logits = forward(new, mode)
        noise = torch.rand(()) ** 3 * torch.randn(logits.shape[-1])
        return logits + (noise if mode == "draft" else 0)

    monkeypatch.setattr(run, "forward", wrong_drafts)

    expected: dict[tuple[int, ...], float] = {}
    exact = MacCache(model, max_length=64, config=None)

    def distribution(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return run.distribution(run.processor(ids, logits[:, -1].float()))

    first = distribution(prompt, model(prompt, past_key_values=exact).logits)
    for token in first[0].nonzero().flatten().tolist():
        ids = torch.cat([prompt, torch.tensor([[token]])], dim=1)
        if exact.get_seq_length() > 40:
            exact.crop(-1)
        second = distribution(ids, model(ids[:, -1:], past_key_values=exact).logits)
        for other in second[0].nonzero().flatten().tolist():
            expected[token, other] = float(first[0, token] * second[0, other])
    assert len(expected) == 9 and min(expected.values()) > 1e-3

    if planted:

        def from_the_target(self: _Run, drafts: Any, proposals: Any, targets: Any) -> Any:
            zeros = [torch.zeros_like(q) for q in proposals]
            p, q = (torch.stack(x[:2], 1).gather(-1, drafts[..., None])[..., 0]
                    for x in (targets, proposals))  # fmt: skip
            agree = torch.rand_like(p) * q < p
            counts = agree.long().cumprod(dim=1).sum(dim=1)
            accepted = int(counts.min())
            last = torch.multinomial((targets[accepted] - (zeros + zeros)[0]), 1)[:, 0]
            if accepted < 2:
                last = torch.where(counts > accepted, drafts[:, accepted], last)
            return accepted, last

        monkeypatch.setattr(_Run, "judge", from_the_target)
    with one_thread():
        got = sampled(run, batch, 20_000)
    assert 0.1 < method.stats.acceptance < 0.95  # both ways are taken
    # A chi-square of 8 degrees of freedom is above 3.3 times its mean once in a thousand times.
    assert (chi_square(got, expected) > 3.3) == planted


def test_refusals() -> None:
    device = torch.device("cpu")
    model, ids = tiny_model(device), prompts(device, 1)
    for wrong, message in ((0, "max_drafts is 0"), (16, "max_drafts is 16, must be from 1 to 15")):
        with pytest.raises(ValueError, match=message):
            Lossless(wrong)
    with pytest.raises(ValueError, match=r"Lossless needs past_key_values=MacCache"):
        model.generate(ids, custom_generate=Lossless(), max_new_tokens=4)
    with pytest.raises(ValueError, match=r"Lossless needs past_key_values=MacCache"):
        generate(model, ids, Lossless(), None)
    for options, name in (
        ({"num_beams": 2}, "num_beams"),
        ({"output_attentions": True}, "output_"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"position_ids": torch.arange(39)[None]}, "position_ids has 39 .* prompt's 40 tokens"),
    ):
        with pytest.raises(ValueError, match=name):
            generate(model, ids, Lossless(), **options)


def test_inputs_besides_token_ids_are_refused() -> None:
    """They would be lost: generate leaves it to the decoding method to give them to the model."""
    device = torch.device("cpu")
    model, ids = tiny_model(device), prompts(device, 1)
    embeds = model.get_input_embeddings()(ids)
    cache = MacCache(model, max_length=64)
    with pytest.raises(
        ValueError, match=r"not do the model's input `inputs_embeds`: use generate's own"
    ):
        model.generate(
            inputs_embeds=embeds, past_key_values=cache, custom_generate=Lossless(),
            max_new_tokens=4,
        )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"not do the model's input `pixel_values`: use generate's own"
    ):
        Lossless()(
            model, ids, LogitsProcessorList(), StoppingCriteriaList(), GenerationConfig(),
            past_key_values=cache, pixel_values=torch.ones(1, 3, 8, 8), mm_token_type_ids=None,
        )  # fmt: skip
    assert cache.get_seq_length() == 0


def test_a_model_that_sees() -> None:
    """Text alone it takes as any model does; images are refused."""
    text = tiny_model(torch.device("cpu")).config
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=VOCAB - 2)
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation("mac")
    ids = prompts(torch.device("cpu"), 1)
    ids[ids == VOCAB - 2] = 1
    check_same(generate(model, ids, Lossless(4)), generate(model, ids, None))
    image = torch.randn(1, 3, 28, 28)
    ids[0, 3:7] = VOCAB - 2
    with pytest.raises(ValueError, match=r"Lossless does not do the model's input `"):
        generate(model, ids, Lossless(4), pixel_values=image)
