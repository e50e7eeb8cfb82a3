"""The backend `mac` in SGLang's classes, without a scheduler (`make sglang` runs this)."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mac_attn

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is not installed; `make sglang` has it", allow_module_level=True)
from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES  # noqa: E402
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS  # noqa: E402
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend  # noqa: E402
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention  # noqa: E402
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode  # noqa: E402

from mac_attn.integrations import sglang as package  # noqa: E402
from mac_attn.integrations.serving.options import Options  # noqa: E402
from mac_attn.integrations.serving.slots import Place, SlotTable  # noqa: E402
from mac_attn.integrations.sglang import backend, support  # noqa: E402
from mac_attn.integrations.sglang.engine import Engine  # noqa: E402

HEADS, KV_HEADS, DIM, CONTEXT = 4, 2, 16, 128
LENGTHS = [9, 33, 64]


def test_registering_adds_a_choice() -> None:
    package.register()
    package.register()
    assert ATTENTION_BACKEND_CHOICES.count("mac") == 1
    assert "mac" in ATTENTION_BACKENDS


def pools(page_size: int) -> SimpleNamespace:
    """A model runner's pools: random keys and values, three requests whose pages are shuffled."""
    tokens = 512
    kv = MHATokenToKVPool(tokens, page_size, torch.float32, KV_HEADS, DIM, 1, "cpu", False)
    for buffer in (*kv.k_buffer, *kv.v_buffer):
        buffer.normal_()
    requests = ReqToTokenPool(4, CONTEXT, "cpu", False)
    pages = (torch.randperm(tokens // page_size) + 1)[: 4 * CONTEXT // page_size]
    where = pages[:, None] * page_size + torch.arange(page_size)
    rows = where.view(-1)[: 3 * CONTEXT].view(3, CONTEXT).int()
    requests.req_to_token[1:4] = rows
    return SimpleNamespace(
        device="cpu",
        page_size=page_size,
        token_to_kv_pool=kv,
        req_to_token_pool=requests,
        server_args=SimpleNamespace(cuda_graph_config=None, enable_metrics=False),
    )


def batch(runner: Any, lens: list[int] = LENGTHS) -> ForwardBatch:
    """A step of decode of these requests, the first of them in row 1 of the pool."""
    indices = torch.arange(1, 1 + len(lens))
    seq_lens = torch.tensor(lens)
    where = runner.req_to_token_pool.req_to_token[indices, seq_lens - 1].long()
    return ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        batch_size=len(lens),
        input_ids=torch.zeros(len(lens), dtype=torch.long),
        req_pool_indices=indices,
        seq_lens=seq_lens,
        seq_lens_cpu=seq_lens,
        out_cache_loc=where,
        seq_lens_sum=sum(lens),
    )


def new_engine(runner: Any, places: list[Place | None]) -> Any:
    """An engine of one layer that has these places for every batch."""
    ring = mac_attn.ReuseCache(
        mac_attn.ReuseConfig(entries=8, window=8, band=4, anchors=0, min_context=8, threshold=0),
        num_slots=4,
        num_qo_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=torch.float32,
    )
    engine: Any = object.__new__(Engine)
    engine.runner, engine.options = runner, Options(num_slots=4)
    engine._args, engine.slots = runner.server_args, SlotTable(4)
    engine.rings = {0: ring}
    engine.places = lambda rows: [*places, *[None] * (rows - len(places))]
    engine.report = lambda: None
    return engine


def mac_backend(runner: Any, engine: Any) -> Any:
    made: Any = TorchNativeAttnBackend(runner)
    made.__class__ = backend.decoding_with_mac(TorchNativeAttnBackend)
    made.mac = backend.Decode(engine)
    return made


def layer(**changes: Any) -> RadixAttention:
    options = {"num_kv_heads": KV_HEADS, "layer_id": 0, **changes}
    return RadixAttention(HEADS, DIM, DIM**-0.5, **options)


def new_tokens(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    kv = (torch.randn(rows, KV_HEADS, DIM), torch.randn(rows, KV_HEADS, DIM))
    return (torch.randn(rows, HEADS * DIM), *kv)


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_a_layer_answers_what_torch_native_answers(page_size: int) -> None:
    runner = pools(page_size)
    engine = new_engine(runner, [Place(2, 7), None, Place(0, 9)])
    step, new = batch(runner), new_tokens(3)
    mac = mac_backend(runner, engine)
    mac.init_forward_metadata(step)
    out = mac.forward_decode(*new, layer(), step)
    assert out.shape == (3, HEADS * DIM)
    # The new keys and values are in the pool, where SGLang's backend finds them too.
    where = step.out_cache_loc
    assert torch.equal(runner.token_to_kv_pool.k_buffer[0][where], new[1])
    native = TorchNativeAttnBackend(runner)
    native.init_forward_metadata(step)
    expected = native.forward_decode(*new, layer(), step, save_kv_cache=False)
    torch.testing.assert_close(out, expected)  # float32 in another order
    ring = engine.rings[0]
    assert ring.slot_request.tolist() == [9, -1, 7, -1]
    assert ring.slot_end.tolist() == [64, 0, 9, 0]


def test_buffers_of_graphs_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded, replayed with fewer requests than rows, and an eager step larger than any graph."""
    for name in ("init_cuda_graph_state", "get_cuda_graph_seq_len_fill_value"):
        monkeypatch.setattr(TorchNativeAttnBackend, name, lambda self, *sizes: None)
    runner = pools(16)
    mac = mac_backend(runner, new_engine(runner, [Place(2, 7)]))
    mac.init_cuda_graph_state(2, 2)
    mac.init_forward_metadata_out_graph(batch(runner, [1, 1]), in_capture=True)
    recorded = mac.mac.rows
    assert recorded.slots.tolist() == [-1, -1]
    assert recorded.block_table.shape == (2, CONTEXT // 16)
    view = SimpleNamespace(**vars(batch(runner, [33, 1])))  # as SGLang pads a batch of one
    view.req_pool_indices = torch.tensor([2, 0])
    mac.init_forward_metadata_out_graph(view)
    assert mac.mac.rows.slots.data_ptr() == recorded.slots.data_ptr()
    assert mac.mac.rows.block_table.data_ptr() == recorded.block_table.data_ptr()
    assert recorded.slots.tolist() == [2, -1]
    assert recorded.seq_lens.tolist() == [33, 1]
    pages = runner.req_to_token_pool.req_to_token[2, :33:16] // 16
    assert torch.equal(recorded.block_table[0, :3], pages)
    mac.init_forward_metadata(batch(runner))
    assert mac.mac.rows.block_table.shape == (3, 4)  # 64 tokens
    # A batch without lengths on the host: as wide as any request may be.
    view.seq_lens_cpu = None
    mac.init_forward_metadata_out_graph(view)
    whole = runner.req_to_token_pool.req_to_token[2, ::16] // 16
    assert torch.equal(recorded.block_table[0], whole)


def test_soft_caps_and_queries_that_are_not_rotated() -> None:
    runner = pools(16)
    engine = new_engine(runner, [Place(1, 5)])
    step, new = batch(runner), new_tokens(3)
    mac = mac_backend(runner, engine)
    mac.init_forward_metadata(step)
    out = mac.forward_decode(*new, layer(logit_cap=2.0), step)
    pages = [
        buffer.view(-1, 16, KV_HEADS, DIM) for buffer in runner.token_to_kv_pool.get_kv_buffer(0)
    ]
    expected = mac_attn.decode(
        new[0].view(3, HEADS, DIM),
        (pages[0], pages[1]),
        mac.mac.rows.block_table,
        mac.mac.rows.seq_lens,
        logits_soft_cap=2.0,
    )
    torch.testing.assert_close(out.view(3, HEADS, DIM), expected)
    uncapped = mac.forward_decode(*new, layer(), step)
    assert (out - uncapped).abs().max() > 1e-3
    stored = engine.rings[0].ring_query[1, :, 0].flatten(0, 1)
    assert torch.equal(stored, new[0].view(3, HEADS, DIM)[0])


def test_what_is_not_served_is_sglangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another layer; a batch beyond the buffers; a model that gives the layer something more."""
    seen: list[tuple[Any, dict[str, Any]]] = []

    def sglangs(self: Any, q: Tensor, k: Any, v: Any, one: Any, fb: Any, **more: Any) -> Tensor:
        seen.append((one, more))
        return q

    monkeypatch.setattr(TorchNativeAttnBackend, "forward_decode", sglangs)
    said: list[str] = []
    monkeypatch.setattr(Engine, "warn", lambda self, text, *v: said.append(text % v))
    runner = pools(16)
    engine = new_engine(runner, [Place(1, 5)])
    mac, step, new = mac_backend(runner, engine), batch(runner), new_tokens(3)
    mac.init_forward_metadata(step)
    other = layer(layer_id=1)
    assert mac.forward_decode(*new, other, step) is new[0]
    assert mac.forward_decode(*new_tokens(4), layer(), step).shape == (4, HEADS * DIM)
    assert len(seen) == 2
    assert mac.forward_decode(*new, layer(), step, sinks=None) is not new[0]
    assert mac.forward_decode(*new, layer(), step, sinks=torch.ones(HEADS)) is new[0]
    assert mac.forward_decode(*new, layer(), step) is new[0]
    assert seen[2][1]["sinks"] is not None
    assert said == ["layer 0 is left to SGLang's attention: it is called with sinks"]
    del engine.report  # the class's, which has nothing left to report
    engine._metrics, engine._logged, engine._read = SimpleNamespace(enabled=True), (0.0, 0), 0.0
    mac.init_forward_metadata(step)
    mac.mac.most_rows = 2
    mac.init_forward_metadata(step)
    assert mac.mac.rows is None


def full_runner(page_size: int = 16, **changes: Any) -> Any:
    """As much of a model runner as support.py looks at."""
    args = {
        "speculative_algorithm": None,
        "enable_two_batch_overlap": False,
        "enable_pdmux": False,
        "disaggregation_mode": "null",
        "dllm_algorithm": None,
        "dcp_size": 1,
        "attn_cp_size": 1,
        "enable_hisparse": False,
        "enable_torch_compile": False,
    }
    runner = pools(page_size)
    runner.is_draft_worker, runner.use_mla_backend, runner.is_generation = False, False, True
    runner.model_config = SimpleNamespace(is_encoder_decoder=False, context_len=CONTEXT)
    runner.kv_index_translator = SimpleNamespace(is_translating=False)
    runner.dtype = runner.kv_cache_dtype = torch.float32
    for name, value in changes.items():
        (args.__setitem__ if name in args else runner.__setattr__)(name, value)
    runner.server_args = SimpleNamespace(**args, **vars(runner.server_args))
    return runner


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"is_draft_worker": True}, "a draft model"),
        ({"speculative_algorithm": "EAGLE"}, "speculative decoding"),
        ({"is_generation": False}, "a model that does not generate"),
        ({"enable_two_batch_overlap": True}, "two-batch overlap"),
        ({"disaggregation_mode": "decode"}, "prefill and decode on different servers"),
        ({"dcp_size": 2}, "context parallelism"),
        ({"enable_torch_compile": True}, "torch.compile"),
        ({"device": "npu"}, "a device of type npu"),
    ],
)
def test_which_runners_are_served(changes: dict[str, Any], reason: str | None) -> None:
    assert support.runner_reason(full_runner(**changes)) == reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"logit_cap": 30.0}, None),
        ({"logit_cap": 30.0, "logit_capping_method": "softsign"}, "logits capped by softsign"),
        ({"sliding_window_size": 64}, "sliding-window attention"),
        ({"use_irope": True}, "local (chunked) attention"),
        ({"is_cross_attention": True}, "cross attention"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "encoder_only attention"),
        ({"v_head_dim": 8}, "values of another size than keys"),
        ({"num_kv_heads": 4}, "the layout of MHATokenToKVPool"),
    ],
)
def test_which_layers_are_served(changes: dict[str, Any], reason: str | None) -> None:
    assert support.layer_reason(layer(**changes), nn.Module(), full_runner()) == reason


def test_layers_with_sinks_or_a_quantized_cache_are_not_served() -> None:
    parent = nn.Module()
    parent.sinks = nn.Parameter(torch.ones(HEADS))
    assert support.layer_reason(layer(), parent, full_runner()) == "attention sinks"
    runner = full_runner(kv_cache_dtype=torch.float8_e4m3fn)
    reason = support.layer_reason(layer(), nn.Module(), runner)
    assert reason == "KV cache of type torch.float8_e4m3fn"


def test_a_runner_that_is_not_served_keeps_sglangs_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Engine, "warn", lambda self, text, *v: said.append(text % v))
    runner = full_runner(speculative_algorithm="NGRAM")
    runner.prefill_attention_backend_str = "torch_native"
    runner.decode_attention_backend_str = "mac"
    assert type(backend.create(runner, Options())) is TorchNativeAttnBackend
    assert runner.decode_attention_backend_str == "mac"
    assert said == ["off: speculative decoding is left to SGLang's attention"]
    runner.use_mla_backend = True
    with pytest.raises(ValueError, match="latent attention: leave --decode-attention-backend mac"):
        backend.create(runner, Options())
    runner.prefill_attention_backend_str = "mac"
    with pytest.raises(ValueError, match="backend for prefill is 'mac', must be another"):
        backend.create(runner, Options())


def announced(engine: Any, mode: ForwardMode, rids: list[str], lens: list[int]) -> Any:
    """What a batch that SGLang announces has for places."""
    engine._announce(SimpleNamespace(forward_mode=mode, rids=rids, seq_lens_cpu=torch.tensor(lens)))
    return engine.places(len(rids) + 1)


def test_places_follow_requests_and_not_rows() -> None:
    engine = new_engine(pools(1), [])
    del engine.places  # the class's
    engine.slots = SlotTable(2)
    engine._places, engine._silent, engine._was_full = None, 0, False
    decode, extend = ForwardMode.DECODE, ForwardMode.EXTEND
    assert engine.places(3) == [None] * 3  # a dummy batch
    a, b, padding = announced(engine, decode, ["a", "b"], [10, 20])
    assert a and b and padding is None
    assert a.slot != b.slot
    assert engine.places(3) == [None] * 3  # a dummy batch again
    assert announced(engine, decode, ["b", "a"], [21, 11]) == [b, a, None]
    # Prefill of "a", of the same name or the same request again: whatever it had is void.
    assert announced(engine, extend, ["a"], [11]) == [None, None]
    (again, _) = announced(engine, decode, ["a"], [12])
    assert again.slot == a.slot
    assert again.number not in (a.number, b.number)
    # Lengths that are not told.
    batch = SimpleNamespace(forward_mode=decode, rids=["a", "b"], seq_lens_cpu=torch.tensor([9]))
    engine._announce(batch)
    assert engine.places(2) == [None, None]
    (anew, _) = announced(engine, decode, ["a"], [13])
    assert anew.number != again.number
    # The one longest away makes room.
    (c, _) = announced(engine, decode, ["c"], [30])
    assert c.slot in (a.slot, b.slot)
    assert c.number not in (a.number, b.number, again.number)


def test_a_server_that_announces_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(Engine, "warn", lambda self, text, *v: said.append(text % v))
    engine = new_engine(pools(1), [])
    del engine.places
    engine._places, engine._silent = None, 0
    for _ in range(2000):
        assert engine.places(1) == [None]
    assert said == ["this SGLang does not say whose batches are: all are exact"]
