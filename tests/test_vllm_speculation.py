"""Speculative decoding in the vLLM plugin's backends, without a server (`make vllm` runs this)."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm_batches import common_metadata

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; `make vllm` has it", allow_module_level=True)
import transformers  # noqa: E402, F401  (before vLLM's backends, whose imports are a circle else)
from vllm.v1.attention.backends import flash_attn  # noqa: E402
from vllm_layers import attention_layer  # noqa: E402

from mac_attn.integrations.vllm import cuda, cuda_plan, support  # noqa: E402
from mac_attn.integrations.vllm.engine import Engine  # noqa: E402
from mac_attn.integrations.vllm.options import Options  # noqa: E402


def _config(**speculative: Any) -> Any:
    """What decides whether a server is served, with speculative decoding if there is any of it."""
    given = {"method": "ngram", "num_speculative_tokens": 3, "enable_adaptive_verification": False}
    return SimpleNamespace(
        device_config=SimpleNamespace(device_type="cpu"),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, enable_dbo=False
        ),
        speculative_config=SimpleNamespace(**given | speculative) if speculative else None,
        kv_transfer_config=None,
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        model_config=SimpleNamespace(runner_type="generate", is_mm_prefix_lm=False, use_mla=False),
    )


@pytest.mark.parametrize(
    ("drafts", "support_of_graphs", "tokens"),
    [
        (0, "UNIFORM_SINGLE_TOKEN_DECODE", 1),
        (1, "UNIFORM_BATCH", 2),
        (15, "UNIFORM_BATCH", 16),
        (16, "UNIFORM_SINGLE_TOKEN_DECODE", 16),  # with which vLLM makes none of drafts
    ],
)
def test_graphs_hold_decode_alone(drafts: int, support_of_graphs: str, tokens: int) -> None:
    config = _config(**({"num_speculative_tokens": drafts} if drafts else {}))
    assert support.engine_reason(config) is None
    assert support.query_tokens(config) == tokens
    builder = cuda.MacFlashMetadataBuilder
    assert builder.get_cudagraph_support(config, None).name == support_of_graphs


@pytest.mark.parametrize("drafts", [3, 16])
def test_what_vllm_makes_of_it(drafts: int) -> None:
    """Full graphs of uniform steps up to 16 tokens, none beyond."""
    from vllm.config import CompilationConfig, CUDAGraphMode

    config = _config(num_speculative_tokens=drafts)
    graphs = cuda.MacFlashMetadataBuilder.get_cudagraph_support(config, None)
    compilation = CompilationConfig(cudagraph_mode="FULL_AND_PIECEWISE", mode=3)
    compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = [4, 8, 32], 32
    compilation.splitting_ops = list(CompilationConfig._attention_ops)
    mode = compilation.resolve_cudagraph_mode_and_sizes(graphs, "MacFlashBackend", 1 + drafts)
    expected = CUDAGraphMode.PIECEWISE if drafts > 15 else CUDAGraphMode.FULL_AND_PIECEWISE
    assert mode == expected


@pytest.mark.parametrize(
    ("speculative", "reason"),
    [
        ({"method": "draft_model"}, None),
        ({"method": "eagle3"}, None),
        ({"enable_adaptive_verification": True}, "adaptive verification of drafts"),
        (
            {"method": "extract_hidden_states"},
            "speculative decoding by extract_hidden_states",
        ),
    ],
)
def test_which_speculation_is_served(speculative: dict[str, Any], reason: str | None) -> None:
    config = _config(**speculative)
    assert support.engine_reason(config) == reason
    if reason is not None:  # what vLLM's own backend says
        graphs = cuda.MacFlashMetadataBuilder.get_cudagraph_support(config, None)
        assert graphs.name in ("ALWAYS", "UNIFORM_BATCH")


@pytest.mark.parametrize("drafts", [3, 16])
def test_layers_that_draft_are_left_and_what_drafts_do_is_said(
    drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(Engine.logger, "warning", lambda text, *v: warned.append(text % v))
    layer = attention_layer(attn_backend=None)
    layer.impl.mac = None
    config = _config(num_speculative_tokens=drafts)
    config.compilation_config = SimpleNamespace(static_forward_context={"draft.0": layer})
    config.parallel_config.rank, config.parallel_config.tensor_parallel_size = 0, 1
    config.model_config.dtype, config.model_config.max_model_len = torch.float32, 64
    device = torch.device("cpu")
    runner = SimpleNamespace(vllm_config=config, get_model=torch.nn.Module, device=device)
    engine = Engine(SimpleNamespace(model_runner=runner), Options())
    assert engine.rings == {}
    assert engine.query_tokens == min(1 + drafts, 16)
    assert warned == [
        "MAC-Attention: 1 layers are left to vLLM's attention: layers of the model that drafts",
        "MAC-Attention: off: no layer is served",
    ]
    said: list[str] = []
    monkeypatch.setattr(Engine.logger, "info", said.append)
    engine._say_what_drafts_do(drafts)
    (text,) = said
    assert "steps that verify drafts reuse where all of their tokens can" in text
    assert ("steps of more than 16 tokens are left to vLLM's attention" in text) == (drafts > 15)


@pytest.mark.parametrize(
    ("query_lens", "planned"), [([1, 1], True), ([4, 4], True), ([4, 2], False), ([5, 5], False)]
)
def test_what_a_graph_is_recorded_with(
    query_lens: list[int], planned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that a replay could not follow is recorded with vLLM's attention."""
    own = flash_attn.FlashAttentionMetadataBuilder
    monkeypatch.setattr(own, "build", lambda self, *args: SimpleNamespace())
    builder = object.__new__(cuda.MacFlashMetadataBuilder)
    builder.engine = SimpleNamespace(query_tokens=4)  # type: ignore[assignment]
    builder.buffers = cuda_plan.Buffers(4, torch.device("cpu"))
    common = common_metadata(query_lens, [9, 13])
    plan = builder.build_for_cudagraph_capture(common).mac
    if not planned:
        assert plan is None
        return
    (call,) = plan.decodes
    assert (call.width, call.rows.slots.tolist()) == (query_lens[0], [-1, -1])
