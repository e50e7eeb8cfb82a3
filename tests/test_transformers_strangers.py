"""Models that differ from Llama, and calls of "mac" from code that is not ours."""

from __future__ import annotations

import copy
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from all_models import tiny_causal_model, tiny_config  # noqa: E402
from tiny_models import ALWAYS, NEVER, ROUNDING, SMALL, Model, prompts, run, tiny_model  # noqa: E402
from transformers.cache_utils import DynamicCache, EncoderDecoderCache  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402

from mac_attn import ReuseConfig, RotaryEmbedding  # noqa: E402
from mac_attn.integrations.transformers import MacCache, mac_attention_forward  # noqa: E402
from mac_attn.integrations.transformers.rotation import cache_name  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_grad")

CPU = torch.device("cpu")
SAME = ReuseConfig(**SMALL, threshold=1e-3)


def mac_model(name: str, **options: Any) -> Model:
    model = tiny_causal_model(name, **options)
    model.set_attn_implementation("mac")
    return model


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("mac_attn")]


# What is left to SDPA, and says so


@pytest.mark.parametrize(
    ("name", "what"), [("diffllama", "values"), ("jetmoe", "keys"), ("deepseek_v3", "keys")]
)
@pytest.mark.parametrize("config", [None, ALWAYS], ids=["exact", "reuse"])
def test_keys_or_values_of_the_models_own(
    name: str, what: str, config: ReuseConfig | None, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = mac_model(name), prompts(CPU, 1, 48)
    with caplog.at_level(logging.WARNING, logger="mac_attn"):
        cache = MacCache(model, max_length=64, config=config)
        got = run(model, ids, cache)
    reason = f"the model changes {what} between its cache and its attention"
    assert messages(caplog) == [
        f"2 of 2 layers are left to SDPA, and save nothing: {reason} (layers 0, 1)"
    ]
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(got, model(input_ids=ids).logits, **ROUNDING)


def test_other_counts_of_heads_in_some_layers() -> None:
    model = tiny_model(CPU)
    config = copy.deepcopy(model.config)
    config.num_attention_heads, config.num_key_value_heads = 8, 4
    attention = type(model.model.layers[1].self_attn)(config, layer_idx=1)
    torch.nn.init.normal_(attention.q_proj.weight, std=0.3)
    model.model.layers[1].self_attn = attention.eval()
    ids = prompts(CPU, 1, 48)
    cache = MacCache(model, max_length=64, config=ALWAYS)
    run(model, ids, cache)
    assert [s.num_qo_heads for s in cache.layer_stats() if s is not None] == [4, 8]
    assert cache.stats().hit_rate == 1
    got = run(model, ids, MacCache(model, max_length=64, config=None))
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(got, model(input_ids=ids).logits, **ROUNDING)


# Right, or refused, with and without a MacCache


@pytest.mark.parametrize("config", [None, NEVER], ids=["exact", "zero-threshold"])
@pytest.mark.parametrize("keep", [1, 3])
def test_queries_that_are_dropped_on_the_way(keep: int, config: ReuseConfig | None) -> None:
    """Gemma 4 leaves only the last queries to layers with shared keys, and asks for "sdpa"."""
    model, ids = mac_model("gemma4_text"), prompts(CPU, 1, 48)
    options: dict[str, Any] = {"logits_to_keep": keep}
    got = run(model, ids, MacCache(model, max_length=64, config=config), **options)
    without = model(input_ids=ids[:, :40], **options).logits
    model.set_attn_implementation("eager")
    expected = run(model, ids, transformers.DynamicCache(config=model.config), **options)
    torch.testing.assert_close(got, expected, **ROUNDING)
    torch.testing.assert_close(without, expected[:, :keep], **ROUNDING)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hy_v4", "_supports_sdpa = False"),
        ("gemma2", "_supports_sdpa = False"),
        ("deepseek_v32", "keyword `indices`"),
        ("glm_moe_dsa", "keyword `indices`"),
    ],
)
def test_what_sdpa_cannot_do_is_refused(name: str, reason: str) -> None:
    model, ids = mac_model(name), prompts(CPU, 1)
    with pytest.raises(ValueError, match=rf"{reason}.*attn_implementation='eager'"):
        model(input_ids=ids, use_cache=False)
    with pytest.raises(ValueError, match="use attn_implementation='eager'|transformers' own cache"):
        MacCache(model, max_length=64)


def test_attention_outside_the_interface_is_refused() -> None:
    config = tiny_config("bloom")
    config._attn_implementation = "mac"
    model = transformers.BloomForCausalLM(config).eval()
    with pytest.raises(ValueError, match="BloomPreTrainedModel does not call its attention"):
        model(input_ids=prompts(CPU, 1))
    with pytest.raises(ValueError, match="BloomForCausalLM does not call its attention"):
        MacCache(model, max_length=64)


def attention_arguments(**options: Any) -> dict[str, Any]:
    module = tiny_model(CPU).model.layers[0].self_attn
    query, kv = torch.randn(1, 4, 8, 16), torch.randn(2, 1, 2, 8, 16)
    arguments = {"module": module, "query": query, "key": kv[0], "value": kv[1]}
    return arguments | {"attention_mask": None} | options


@pytest.mark.parametrize("name", ["softcap", "block_indices", "anything"])
def test_unknown_keywords_are_refused(name: str) -> None:
    mac_attention_forward(**attention_arguments(**{name: None}))
    with pytest.raises(ValueError, match=f"attention keyword `{name}`"):
        mac_attention_forward(**attention_arguments(**{name: torch.ones(4)}))


def test_fewer_queries_than_keys_need_a_mask() -> None:
    arguments = attention_arguments(query=torch.randn(1, 4, 3, 16))
    with pytest.raises(ValueError, match="attention_mask is None for 3 queries and 8 keys"):
        mac_attention_forward(**arguments)
    mac_attention_forward(**arguments, is_causal=False)


def test_the_order_of_arguments_is_that_of_sdpa() -> None:
    """A wrapper may pass dropout and scaling by position, as transformers' own interface allows."""
    arguments = tuple(attention_arguments().values())
    got, _ = mac_attention_forward(*arguments, 0.0, 0.3, None)
    expected, _ = sdpa_attention_forward(*arguments, 0.0, 0.3, None)
    assert torch.equal(got, expected)


# The rotation of each layer


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", ["half", "half"]),
        ("smollm3", ["half", "none"]),
        ("cohere2", ["local", "none"]),
        ("exaone4", ["local", "none"]),
        ("nanochat", ["reverse half", "reverse half"]),
        ("helium", ["interleaved", "interleaved"]),
        ("ernie4_5", ["interleaved", "interleaved"]),
        ("glm", ["interleaved", "interleaved"]),
        ("cohere", ["interleaved", "interleaved"]),
        ("gptj", ["interleaved", "interleaved"]),
        ("gpt_neox", ["half", "half"]),
        ("gpt2", ["none", "none"]),
    ],
)
def test_each_layers_rotation_is_found(name: str, kinds: list[str]) -> None:
    options: dict[str, Any] = {}
    if name == "smollm3":
        options["no_rope_layers"] = [1, 0]
    model = mac_model(name, **options)
    cache = MacCache(model, max_length=64, config=SAME)
    found = []
    for layer in cache.layers:
        rotation = cache._rotations.get(layer.index)
        if layer.kind == "local":
            found.append("local")
        elif rotation is None:
            found.append("none")
        else:
            pairs = "interleaved" if rotation.interleaved else "half"
            found.append(f"reverse {pairs}" if rotation.reverse else pairs)
    assert found == kinds
    # One token again and again: the same queries, wherever they were turned to.
    run(model, torch.full((1, 48), 7), cache)
    if name != "gpt2":  # adds the position to the token
        assert cache.stats().hit_rate == 1


def test_a_rotation_for_each_kind_of_layer() -> None:
    model = mac_model("gemma3_text")
    cache = MacCache(model, max_length=64)
    (index,) = cache._rotations  # the full layer
    expected = RotaryEmbedding.from_transformers(model, layer_type="full_attention")
    rotary = cache.layers[index].rings.rotary
    assert rotary is not None and torch.equal(rotary.inv_freq, expected.inv_freq)


def strange_model() -> Model:
    """Positions shift the dimensions of a query: no rotation."""
    model = tiny_model(CPU)
    attention = model.model.layers[1].self_attn

    class Shifted(type(attention)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, **options: Any) -> Any:
            steps = torch.arange(hidden_states.shape[1])[:, None] / 10
            return super().forward(hidden_states=hidden_states + steps, **options)

    attention.__class__ = Shifted
    return model


def test_an_unknown_rotation_is_refused_and_can_be_given() -> None:
    model, ids = strange_model(), prompts(CPU, 1, 48)
    with pytest.raises(ValueError, match=r"layer 1 cannot reuse: .*`rotary`.*config=None"):
        MacCache(model, max_length=64)
    rotary = RotaryEmbedding.from_transformers(model)
    for given in (rotary, [rotary, None]):
        cache = MacCache(model, max_length=64, config=ALWAYS, rotary=given)
        assert run(model, ids, cache).isfinite().all()
        assert cache.stats().hit_rate == 1
    cache = MacCache(model, max_length=64, config=None)
    got = run(model, ids, cache)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(got, run(model, ids, transformers.DynamicCache()), **ROUNDING)


def test_a_wrong_rotation_is_refused() -> None:
    model = mac_model("glm")
    half = RotaryEmbedding.from_transformers(model)
    interleaved = RotaryEmbedding.from_transformers(model, interleaved=True)
    for given in (half, [None, interleaved]):
        with pytest.raises(ValueError, match="rotary: layer 0 .* in neighbouring dimensions"):
            MacCache(model, max_length=64, rotary=given)
    MacCache(model, max_length=64, rotary=interleaved)


def test_a_model_that_does_not_run_alone_says_so() -> None:
    model = tiny_model(CPU)
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=r"16 tokens.*raised ZeroDivisionError(.|\n)*`rotary`"):
        MacCache(model, max_length=64)
    MacCache(model, max_length=64, config=None)
    MacCache(model, max_length=64, rotary=RotaryEmbedding.from_transformers(model))


def test_an_encoder() -> None:
    """Its decoder attends exactly; the message says how."""
    torch.manual_seed(0)
    sizes = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 64)
    sizes |= dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    config = transformers.BartConfig(
        vocab_size=100, init_std=0.3, forced_eos_token_id=None, **sizes
    )
    model = transformers.BartForConditionalGeneration(config).eval()
    ids = prompts(CPU, 1)
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": 1}
    want = model.generate(ids, **options)
    model.set_attn_implementation("mac")
    for given in ({"config": ALWAYS}, {"config": None, "kv_dtype": torch.float8_e4m3fn}):
        with pytest.raises(ValueError, match=r"encoder-decoder models .* use EncoderDecoderCache"):
            MacCache(model, max_length=64, **given)
    cache = MacCache(model, max_length=64, config=None)
    both = EncoderDecoderCache(cache, DynamicCache())
    assert torch.equal(model.generate(ids, **{cache_name(model.generate): both}, **options), want)
    assert cache.get_seq_length() == want.shape[1] - 1
    cache.reset()
    with pytest.raises(ValueError, match="twice in one forward .* an EncoderDecoderCache"):
        model.generate(ids, **{cache_name(model.generate): cache}, **options)


def test_the_probe_leaves_no_trace() -> None:
    model, ids = tiny_model(CPU), prompts(CPU)
    before = model(input_ids=ids).logits
    torch.manual_seed(1)
    expected = torch.randn(1)
    torch.manual_seed(1)
    MacCache(model, max_length=64)
    assert torch.equal(torch.randn(1), expected)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_probe_leaves_other_threads_alone() -> None:
    model, ids = tiny_model(CPU), prompts(CPU)
    expected = model(input_ids=ids).logits
    prober, got = threading.get_ident(), []
    with ThreadPoolExecutor(1) as pool:

        def meanwhile(*_: Any) -> None:
            if threading.get_ident() == prober:
                got.append(pool.submit(lambda: model(input_ids=ids).logits).result())

        with model.model.embed_tokens.register_forward_pre_hook(meanwhile):
            MacCache(model, max_length=64)
    assert len(got) == 1 and torch.equal(got[0], expected)


def test_two_probes_at_once_leave_the_compiler_on() -> None:
    """The second would begin while the first has it off, and end last."""
    model = tiny_model(CPU)
    prober, first_is_done, second_runs = threading.get_ident(), threading.Event(), threading.Event()
    seconds = []
    with ThreadPoolExecutor(1) as pool:

        def meanwhile(*_: Any) -> None:
            if threading.get_ident() == prober:
                seconds.append(pool.submit(MacCache, model, max_length=64))
                second_runs.wait(0.3)
            else:
                second_runs.set()
                first_is_done.wait(10)

        with model.model.embed_tokens.register_forward_pre_hook(meanwhile):
            MacCache(model, max_length=64)
            first_is_done.set()
            seconds[0].result()
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))
    torch.compiler.set_stance("default")
    assert len(compiled) == 1
