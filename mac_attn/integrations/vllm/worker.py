"""Where the plugin meets vLLM's workers."""

from __future__ import annotations

from typing import Any

from .options import Options


def watch_workers(options: Options) -> None:
    """Have every worker make its `Engine` once its model is loaded, and say when it warms up.

    vLLM asks a worker for the KV caches that its layers need after it has loaded the model, and
    before it measures the memory that is left: there the rings are made, so that they are counted.
    To warm up, it takes steps of requests that nobody has sent, which are to have no slots.
    """
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    class_of_workers: Any = WorkerWrapperBase
    inner = {
        name: getattr(class_of_workers, name, None)
        for name in ("get_kv_cache_spec", "compile_or_warm_up_model")
    }

    def call(wrapper: Any, name: str) -> Any:
        own = inner[name]
        return getattr(wrapper.worker, name)() if own is None else own(wrapper)

    def get_kv_cache_spec(self: Any) -> Any:
        from .engine import Engine

        runner = self.worker.model_runner
        if not hasattr(runner, "mac_engine"):
            runner.mac_engine = Engine(runner, options)
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

    class_of_workers.get_kv_cache_spec = get_kv_cache_spec
    class_of_workers.compile_or_warm_up_model = compile_or_warm_up_model
