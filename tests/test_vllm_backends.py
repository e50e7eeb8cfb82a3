"""The vLLM plugin's backends inside vLLM, without a server (`make vllm` runs this)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import mac_attn

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; `make vllm` has it", allow_module_level=True)
import transformers  # noqa: E402, F401  (before vLLM's backends, whose imports are a circle else)
from vllm.config import VllmConfig  # noqa: E402
from vllm.v1.attention.backends import flash_attn  # noqa: E402
from vllm.v1.attention.backends.registry import (  # noqa: E402
    AttentionBackendEnum,
    register_backend,
)
from vllm.v1.worker.worker_base import WorkerWrapperBase  # noqa: E402
from vllm_layers import attention_layer  # noqa: E402

from mac_attn.integrations.serving.rotary import is_rotated  # noqa: E402
from mac_attn.integrations.serving.slots import Place, Row  # noqa: E402
from mac_attn.integrations.vllm import cuda, cuda_plan, plugin, support, worker  # noqa: E402
from mac_attn.integrations.vllm import engine as engine_module  # noqa: E402
from mac_attn.integrations.vllm.attend import Served  # noqa: E402
from mac_attn.integrations.vllm.decodes import plan_decodes  # noqa: E402
from mac_attn.integrations.vllm.engine import Engine  # noqa: E402
from mac_attn.integrations.vllm.options import Options  # noqa: E402


def leave_workers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put into vLLM's class is taken out again after the test."""
    for name in ("init_device", "get_kv_cache_spec", "compile_or_warm_up_model"):
        own = vars(WorkerWrapperBase).get(name)
        monkeypatch.setattr(WorkerWrapperBase, name, own, raising=False)
        if own is None:
            monkeypatch.delattr(WorkerWrapperBase, name)


def test_registering_takes_the_place_of_two_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    added = (AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum.FLASH_ATTN)
    monkeypatch.setattr(plugin, "_registered", False)
    leave_workers_alone(monkeypatch)
    monkeypatch.setattr("mac_attn.integrations.vllm.metrics.register_collector", lambda: None)
    monkeypatch.setenv("MAC_ATTN_VLLM", "1")
    try:
        plugin.register()
        assert [backend.get_class().__name__ for backend in added] == [
            "MacCpuBackend",
            "MacFlashBackend",
        ]
        # vLLM looks its backends up by these names.
        assert [backend.get_class().get_name() for backend in added] == ["CPU_ATTN", "FLASH_ATTN"]
    finally:
        for backend in added:
            backend.clear_override()


def test_registering_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's placeholder for a backend that the command line chooses for a kind of layers."""
    from vllm.config.attention import AttentionConfig
    from vllm.v1.attention.selector import get_attn_spec_kind

    monkeypatch.setattr(plugin, "_registered", False)
    leave_workers_alone(monkeypatch)
    monkeypatch.setattr("mac_attn.integrations.vllm.metrics.register_collector", lambda: None)
    monkeypatch.setenv("MAC_ATTN_VLLM", "custom")
    custom = AttentionBackendEnum.CUSTOM
    try:
        plugin.register()
        assert not AttentionBackendEnum.FLASH_ATTN.is_overridden()
        assert not AttentionBackendEnum.CPU_ATTN.is_overridden()
        chosen = AttentionConfig(backend_per_kind={"full_attention": "CUSTOM"})  # type: ignore[dict-item]
        full = get_attn_spec_kind(False, False, "decoder").value
        sliding = get_attn_spec_kind(False, True, "decoder").value
        assert chosen.backend_per_kind == {full: custom}
        assert sliding not in chosen.backend_per_kind
        assert custom.get_class().__name__ == "MacFlashBackend"
    finally:
        custom.clear_override()


@pytest.mark.parametrize("kind", ["custom", "flash"])
def test_a_gpu_of_capability_10_serves_what_the_command_chooses(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """vLLM's own choice there is FLASHINFER; what is named is taken."""
    # The kernels for CUDA, which this module of vLLM's loads and choosing does not use.
    for kernels in ("_C_stable_libtorch", "_C"):
        if importlib.util.find_spec(f"vllm.{kernels}") is None:
            monkeypatch.setitem(sys.modules, f"vllm.{kernels}", ModuleType(kernels))
    from vllm.platforms import cuda as platform
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.selector import AttentionSelectorConfig

    enum = AttentionBackendEnum
    backend = enum.CUSTOM if kind == "custom" else enum.FLASH_ATTN
    capability = DeviceCapability(10, 0)
    order = platform._get_backend_priorities(False, capability)
    assert order.index(enum.FLASHINFER) < order.index(enum.FLASH_ATTN)
    order = platform._get_backend_priorities(False, DeviceCapability(9, 0))
    assert order.index(enum.FLASH_ATTN) < order.index(enum.FLASHINFER)
    gpu = platform.CudaPlatformBase
    monkeypatch.setattr(gpu, "get_device_capability", classmethod(lambda cls, i=0: capability))
    monkeypatch.setattr(cuda.MacFlashBackend, "validate_configuration", lambda **given: [])
    register_backend(backend, "mac_attn.integrations.vllm.cuda.MacFlashBackend")
    wanted = AttentionSelectorConfig(
        head_size=128, dtype=torch.bfloat16, kv_cache_dtype=None, block_size=None
    )
    try:
        path = gpu.get_attn_backend_cls(backend, attn_selector_config=wanted)
    finally:
        backend.clear_override()
    assert path == "mac_attn.integrations.vllm.cuda.MacFlashBackend"


def test_a_worker_makes_one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    leave_workers_alone(monkeypatch)
    worker.watch_workers(Options())
    engine = SimpleNamespace(warms_up=False)
    pools: list[str] = []

    @contextmanager
    def pool(tag: str) -> Iterator[None]:
        pools.append(tag)
        yield
        pools.pop()

    monkeypatch.setattr(
        "mac_attn.integrations.vllm.engine.Engine",
        lambda *args: made.append((*args, *pools)) or engine,
    )
    wrapper = WorkerWrapperBase()
    runner = SimpleNamespace()
    wrapper.worker = SimpleNamespace(
        model_runner=runner,
        _maybe_get_memory_pool_context=pool,
        get_kv_cache_spec=lambda: ("spec", *pools),
        compile_or_warm_up_model=lambda: ("seconds", engine.warms_up),
    )
    assert [wrapper.get_kv_cache_spec() for _ in range(2)] == [("spec",), ("spec",)]
    assert made == [(wrapper.worker, Options(), "runtime")]
    assert runner.mac_engine is engine
    assert wrapper.compile_or_warm_up_model() == ("seconds", True)
    assert not engine.warms_up

    del runner.mac_engine
    assert wrapper.compile_or_warm_up_model() == ("seconds", False)
    runner.mac_engine = engine

    def fails() -> None:
        raise RuntimeError("of the compiler")

    wrapper.worker.compile_or_warm_up_model = fails
    with pytest.raises(RuntimeError, match="of the compiler"):
        wrapper.compile_or_warm_up_model()
    assert not engine.warms_up


@pytest.mark.parametrize("level", [1, 2])
def test_what_lies_with_the_rings_outlives_sleep(
    level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every level vLLM keeps what is in that pool, and brings it back with whatever wakes."""
    from vllm.device_allocator import cumem, sleep_mode_backend

    kept: list[tuple[str, ...]] = []
    allocator = SimpleNamespace(sleep=lambda offload_tags: kept.append(offload_tags))
    monkeypatch.setattr("vllm.device_allocator.get_mem_allocator_instance", lambda: allocator)
    sleep_mode_backend.CuMemBackend().suspend(level)
    (tags,) = kept
    assert "runtime" in tags
    assert "runtime" not in cumem.DEFERRABLE_TAGS


def test_compiled_models_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a served layer the graph is another; vLLM looks for one by the hash of its config."""
    said: list[str | None] = [None, None, "KV transfer"]
    monkeypatch.setattr(support, "engine_reason", lambda config: said.pop(0))

    def hash_with(*options: Options) -> str:
        wrapper, config = WorkerWrapperBase(), VllmConfig()
        wrapper.vllm_config = config
        built: list[str] = []
        wrapper.worker = SimpleNamespace(init_device=lambda: built.append(config.compute_hash()))
        with monkeypatch.context() as patch:
            leave_workers_alone(patch)
            for one in options:
                worker.watch_workers(one)
            wrapper.init_device()
        (found,) = built
        return found

    plain = hash_with()
    assert len({plain, hash_with(Options()), hash_with(Options(by_name=True))}) == 3
    assert hash_with(Options()) == plain  # where the plugin is off


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"sliding_window": (-1, -1)}, None),  # FlashAttention's word for none
        ({"sliding_window": 128}, "sliding-window attention"),
        ({"sliding_window": (127, 0)}, "sliding-window attention"),
        ({"alibi_slopes": torch.ones(8)}, "ALiBi"),
        ({"sinks": torch.ones(8)}, None),
        ({"attn_type": "encoder_only"}, "encoder_only attention"),
        ({"kv_cache_dtype": "fp8", "kv_cache_torch_dtype": torch.uint8}, None),
        ({"kv_cache_dtype": "fp8_e4m3", "kv_cache_torch_dtype": torch.uint8}, None),
        (
            {"kv_cache_dtype": "fp8_e5m2", "kv_cache_torch_dtype": torch.uint8},
            "KV cache of type fp8_e5m2",
        ),
        (
            {"kv_cache_dtype": "fp8_per_token_head", "kv_cache_torch_dtype": torch.uint8},
            "KV cache of type fp8_per_token_head",
        ),
        ({"head_size_v": 32}, "values of another size than keys"),
        ({"head_size": 76, "head_size_v": 76}, "heads of 76"),
    ],
)
def test_which_layers_are_served(changes: dict[str, Any], reason: str | None) -> None:
    device = torch.device("cpu")
    assert support.layer_reason(attention_layer(**changes), torch.float32, device) == reason


def test_layers_with_another_backend_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(engine_module, "engine_reason", lambda config: None)
    monkeypatch.setattr(Engine.logger, "warning", lambda text, *v: said.append(text % v))
    layer = attention_layer(attn_backend=SimpleNamespace(get_name=lambda: "FLASHINFER"))
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={"a": layer, "b": layer}),
        parallel_config=SimpleNamespace(rank=0, tensor_parallel_size=1),
        model_config=SimpleNamespace(dtype=torch.float32, max_model_len=64),
        speculative_config=None,
    )
    device = torch.device("cpu")
    runner = SimpleNamespace(vllm_config=config, get_model=torch.nn.Module, device=device)
    assert Engine(SimpleNamespace(model_runner=runner), Options()).rings == {}
    assert said == [
        "MAC-Attention: 2 layers are left to vLLM's attention: vLLM's backend FLASHINFER, its"
        " default on compute capability 10; on a GPU --attention-backend FLASH_ATTN has them"
        " served",
        "MAC-Attention: off: no layer is served",
    ]


@pytest.mark.parametrize(
    ("file", "name", "switches", "rotated"),
    [
        ("commandr", "CohereAttention", {"v1": False, "sliding_window": None}, False),
        ("commandr", "CohereAttention", {"v1": True, "sliding_window": None}, True),
        ("afmoe", "AfmoeAttention", {"is_local_attention": False}, False),
        ("exaone4", "Exaone4Attention", {"apply_rope_all_layers": False}, False),
        ("exaone4", "Exaone4Attention", {"apply_rope_all_layers": True}, True),
        ("llama4", "Llama4Attention", {"rotary_emb": None}, False),
        ("gemma3n", "Gemma3nAttention", {"is_kv_shared_layer": True}, True),
        ("gpt_oss", "OAIAttention", {}, True),
    ],
)
def test_which_layers_of_vllms_models_rotate(
    file: str, name: str, switches: dict[str, Any], rotated: bool
) -> None:
    module = importlib.import_module(f"vllm.model_executor.models.{file}")
    attention = object.__new__(getattr(module, name))
    torch.nn.Module.__init__(attention)
    attention.rotary_emb, attention.sliding_window = object(), None
    vars(attention).update(switches)
    assert is_rotated(attention) is rotated


def test_layers_that_share_their_cache() -> None:
    layers = {
        "a": SimpleNamespace(kv_sharing_target_layer_name=None),
        "b": SimpleNamespace(kv_sharing_target_layer_name="a"),
        "c": SimpleNamespace(),
    }
    assert support.sharing_kv(layers) == [{"a", "b"}]


@pytest.mark.parametrize(("given", "expected"), [(None, 32.0), (5 * 2**30, 5.0)])
def test_memory_of_others_on_a_gpu_does_not_count(
    given: int | None, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 80 GiB another server has 36 and the loaded model 4; 45% are asked for."""
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * gib, 80 * gib))
    cache = SimpleNamespace(kv_cache_memory_bytes=given, gpu_memory_utilization=0.45)
    config = SimpleNamespace(cache_config=cache)
    loaded = SimpleNamespace(
        model_runner=SimpleNamespace(vllm_config=config, device=torch.device("cuda")),
        requested_memory=36 * gib,
        init_snapshot=SimpleNamespace(free_memory=44 * gib),
    )
    assert engine_module.kv_cache_bytes(loaded) == expected * gib


def _engine(config: mac_attn.ReuseConfig, query_tokens: int = 1) -> Engine:
    """An engine of one layer, without a model."""
    engine = object.__new__(Engine)
    engine.options, engine.query_tokens = Options(seed=128), query_tokens
    engine.rings = {"layer": SimpleNamespace(cfg=config)}  # type: ignore[dict-item]
    return engine


@pytest.mark.parametrize(
    ("row", "count"),
    [
        (Row("a", 0, 500, 1000), 0),  # a chunk that ends before
        (Row("a", 500, 950, 1000), 78),  # one that ends inside
        (Row("a", 950, 1000, 1000), 50),  # the last chunk
        (Row("a", 0, 1000, 1000), 128),
        (Row("a", 999, 1000, 1000), 0),  # one token is decoded
    ],
)
def test_the_last_tokens_of_a_prompt_are_seeded_once(row: Row, count: int) -> None:
    assert _engine(mac_attn.ReuseConfig()).seeded(row) == count


def test_what_decode_takes_is_not_seeded() -> None:
    engine = _engine(mac_attn.ReuseConfig(), query_tokens=4)
    assert engine.seeded(Row("a", 995, 999, 999)) == 0
    assert engine.seeded(Row("a", 994, 999, 999)) == 5
    assert engine.seeded(Row("a", 999, 1009, 1000)) == 0  # drafts, more than decode takes


def test_no_more_is_seeded_than_a_window_holds() -> None:
    assert _engine(mac_attn.ReuseConfig(window=32)).seeded(Row("a", 0, 99, 99)) == 32


HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 16, 4


@pytest.mark.parametrize("float8", [False, True])
def test_the_flash_impl_serves_a_mixed_step(float8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode rows with and without a ring by mac_attn, those in prefill by FlashAttention.

    That one wants queries of a float8 cache rounded, which mac_attn takes as they are.
    """
    seen: list[tuple[Any, ...]] = []

    def vllms(
        self: Any,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        metadata: Any,
        output: Tensor,
        *scales: None,
    ) -> Tensor:
        seen.append((query, kv_cache, metadata))
        return output.fill_(7.0)

    monkeypatch.setattr(flash_attn.FlashAttentionImpl, "forward", vllms)
    impl = object.__new__(cuda.MacFlashImpl)
    ring = mac_attn.ReuseCache(
        mac_attn.ReuseConfig(window=8, band=4, anchors=2, min_context=8, threshold=0),
        num_slots=2,
        num_qo_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=torch.float32,
    )
    quant = (lambda query, scale: (query.to(torch.float8_e4m3fn), scale)) if float8 else None
    impl.mac = Served(None, ring, float8, quant)  # type: ignore[arg-type]
    scale = torch.tensor(0.5)
    layer = SimpleNamespace(impl=impl, _k_scale=scale, _v_scale=scale, _q_scale=scale)
    impl.scale, impl.logits_soft_cap, impl.head_size = DIM**-0.5, 0, DIM
    query = torch.randn(5, HEADS, DIM)
    kv_cache = torch.randn(8, KV_HEADS, BLOCK, 2 * DIM)
    wide = kv_cache
    if float8:
        kv_cache = kv_cache.to(torch.float8_e4m3fn).view(torch.uint8)
        wide = kv_cache.view(torch.float8_e4m3fn).float() * scale
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    lens = torch.tensor([9, 13], dtype=torch.int32)
    buffers = cuda_plan.Buffers(4, torch.device("cpu"))
    buffers.fill([Place(1, 5), None], lens)
    plan = cuda_plan.CudaPlan(
        plan_decodes(buffers.rows(table), [0, 1, 2], batch_invariant=False),
        cuda_plan.Prefill(slice(2, 5), "prefill"),
        [],
    )
    output = torch.zeros_like(query)
    key = torch.randn(5, KV_HEADS, DIM)
    impl.forward(layer, query, key, key, kv_cache, SimpleNamespace(mac=plan), output)

    expected = mac_attn.decode(query[:2], wide.split(DIM, dim=-1), table, lens, kv_layout="HND")
    torch.testing.assert_close(output[:2], expected)
    assert (output[2:] == 7).all()
    ((new, cache, metadata),) = seen
    assert torch.equal(new.float(), (quant(query, scale)[0] if quant else query)[2:].float())
    assert new.shape == (3, HEADS, DIM)
    assert cache is kv_cache
    assert metadata == "prefill"
    assert ring.slot_request.tolist() == [-1, 5]

    # A layer that is not served, and a profiling run, are vLLM's.
    impl.mac = None
    impl.forward(layer, query, key, key, kv_cache, SimpleNamespace(mac=plan), output)
    impl.forward(layer, query, key, key, kv_cache, None, output)
    assert len(seen) == 3
    assert (output == 7).all()
