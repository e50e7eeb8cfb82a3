"""Where the plugin meets vLLM's workers."""

from __future__ import annotations

from typing import Any

from .options import Options


def watch_workers(options: Options) -> None:
    """Have every worker make its `Engine` once its model is loaded.

    vLLM asks a worker for the KV caches that its layers need after it has loaded the model, and
    before it measures the memory that is left: there the rings are made, so that they are counted.
    """
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    class_of_workers: Any = WorkerWrapperBase
    inner = getattr(class_of_workers, "get_kv_cache_spec", None)

    def get_kv_cache_spec(self: Any) -> Any:
        from .engine import Engine

        runner = self.worker.model_runner
        if not hasattr(runner, "mac_engine"):
            runner.mac_engine = Engine(runner, options)
        return self.worker.get_kv_cache_spec() if inner is None else inner(self)

    class_of_workers.get_kv_cache_spec = get_kv_cache_spec
