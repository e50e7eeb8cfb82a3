"""VLLM_BATCH_INVARIANT: vLLM promises that a request's answer has nothing to do with others."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import mac_attn

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; `make vllm` has it", allow_module_level=True)
import transformers  # noqa: E402, F401  (before vLLM's backends, whose imports are a circle else)

from mac_attn.integrations.serving.rows import Rows  # noqa: E402
from mac_attn.integrations.vllm import attend  # noqa: E402
from mac_attn.integrations.vllm.decodes import Decode  # noqa: E402
from mac_attn.integrations.vllm.engine import Engine  # noqa: E402

HEADS, DIM, BLOCK, PAGES = 4, 32, 16, 200


def served_layer() -> Any:
    """A layer as the engine leaves it."""
    impl = SimpleNamespace(scale=DIM**-0.5, logits_soft_cap=0, head_size=DIM)
    layer = SimpleNamespace(impl=impl, kv_cache_torch_dtype=torch.float32)
    ring = mac_attn.ReuseCache(
        mac_attn.ReuseConfig(threshold=0.0),
        num_slots=1,
        num_qo_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=DIM,
        dtype=torch.float32,
    )
    Engine._serve(object.__new__(Engine), layer, ring)
    return layer


def attention(layer: Any, query: Tensor, kv_cache: Tensor, lengths: list[int]) -> Tensor:
    """Of one token of each request, the first one's pages first."""
    pages = torch.arange(PAGES, dtype=torch.int32).expand(len(lengths), -1).contiguous()
    rows = Rows(pages, torch.tensor(lengths, dtype=torch.int32))
    output = torch.full_like(query, torch.nan)
    attend.decode(layer, Decode(rows, 1, slice(len(lengths))), query, kv_cache, output)
    return output


@pytest.mark.parametrize("asked", [False, True])
def test_answers_alone_and_in_company(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", str(int(asked)))
    layer = served_layer()
    torch.manual_seed(0)
    company = [3000] * 15
    query = torch.randn(1 + len(company), HEADS, DIM)
    kv_cache = torch.randn(PAGES, HEADS, BLOCK, 2 * DIM)
    alone = attention(layer, query[:1], kv_cache, [2900])
    among = attention(layer, query, kv_cache, [2900, *company])[:1]
    assert torch.equal(alone, among) == asked
    torch.testing.assert_close(alone, among)
