"""Where the plugin meets vLLM's workers."""

from __future__ import annotations

from typing import Any

import mac_attn

from .options import Options


def watch_workers(options: Options) -> None:
    """Have every worker make its `Engine` once its model is loaded, and say when it warms up.

    vLLM asks a worker for the KV caches that its layers need after it has loaded the model, and
    before it measures the memory that is left: there the rings are made, so that they are counted.
    To warm up, it takes steps of requests that nobody has sent, which are to have no slots.

    vLLM keeps compiled models by what its config is. A served layer compiles to something else
    (see `Engine._serve`), so that the plugin is noted there before there is a model.
    """
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    class_of_workers: Any = WorkerWrapperBase
    inner = {
        name: getattr(class_of_workers, name, None)
        for name in ("init_device", "get_kv_cache_spec", "compile_or_warm_up_model")
    }

    def call(wrapper: Any, name: str) -> Any:
        own = inner[name]
        return getattr(wrapper.worker, name)() if own is None else own(wrapper)

    def init_device(self: Any) -> Any:
        from .support import engine_reason

        noted = self.vllm_config.additional_config
        if engine_reason(self.vllm_config) is None and isinstance(noted, dict):
            noted["mac_attn"] = {"version": mac_attn.__version__, "by_name": options.by_name}
        return call(self, "init_device")

    def get_kv_cache_spec(self: Any) -> Any:
        from .engine import Engine

        runner = self.worker.model_runner
        if not hasattr(runner, "mac_engine"):
            # What vLLM moves to the host while the server sleeps, and back when it wakes.
            with self.worker._maybe_get_memory_pool_context("runtime"):
                runner.mac_engine = Engine(self.worker, options)
        return call(self, "get_kv_cache_spec")

    def compile_or_warm_up_model(self: Any) -> Any:
        engine = getattr(self.worker.model_runner, "mac_engine", None)
        if engine is None:  # nobody has asked for KV caches
            return call(self, "compile_or_warm_up_model")
        engine.warms_up = True
        try:
            return call(self, "compile_or_warm_up_model")
        finally:
            engine.warms_up = False

    class_of_workers.init_device = init_device
    class_of_workers.get_kv_cache_spec = get_kv_cache_spec
    class_of_workers.compile_or_warm_up_model = compile_or_warm_up_model
