"""What the plugin takes for granted of vLLM, read from its sources without running them.

    python tests/vllm_signatures.py FOLDER VERSION

FOLDER holds `vllm/`, of a wheel or an environment. Of every method that the plugin overrides the
arguments, and which of the attributes that it reads are there, go into vllm_signatures.json under
that version, for tests where that vLLM is not installed: its wheel for CUDA has 336 MB.
"""

from __future__ import annotations

import ast
import json
import sys
from functools import cache
from pathlib import Path

STORED = Path(__file__).with_suffix(".json")
OURS = Path(__file__).parent.parent / "mac_attn" / "integrations" / "vllm"

_FLASH, _CPU = "vllm/v1/attention/backends/flash_attn.py", "vllm/v1/attention/backends/cpu_attn.py"
_BASE = "vllm/v1/attention/backend.py"

# Our class, and where the methods come from that it overrides, the first that has one.
OVERRIDING = {
    "cuda.py:MacFlashBackend": [f"{_FLASH}:FlashAttentionBackend", f"{_BASE}:AttentionBackend"],
    "cuda.py:MacFlashMetadataBuilder": [
        f"{_FLASH}:FlashAttentionMetadataBuilder",
        f"{_BASE}:AttentionMetadataBuilder",
    ],
    "cuda.py:MacFlashImpl": [f"{_FLASH}:FlashAttentionImpl", f"{_BASE}:AttentionImpl"],
    "cpu.py:MacCpuBackend": [f"{_CPU}:CPUAttentionBackend", f"{_BASE}:AttentionBackend"],
    "cpu.py:MacCpuMetadataBuilder": [
        f"{_CPU}:CPUAttentionMetadataBuilder",
        f"{_BASE}:AttentionMetadataBuilder",
    ],
    "cpu.py:MacCpuImpl": [f"{_CPU}:CPUAttentionBackendImpl", f"{_BASE}:AttentionImpl"],
}

# What the plugin reads, by the class that has it.
READ = {
    f"{_BASE}:CommonAttentionMetadata": [
        *("query_start_loc", "query_start_loc_cpu", "seq_lens", "seq_lens_cpu_upper_bound"),
        *("num_reqs", "num_actual_tokens", "max_query_len", "max_seq_len", "block_table_tensor"),
        *("slot_mapping", "replace"),
    ],
    "vllm/v1/worker/gpu_input_batch.py:InputBatch": ["req_ids", "num_tokens_no_spec"],
    "vllm/v1/worker/gpu_model_runner.py:GPUModelRunner": ["requests", "input_batch", "get_model"],
    "vllm/v1/worker/gpu/states.py:RequestState": ["req_id_to_index", "prefill_len"],
    "vllm/v1/worker/gpu/model_runner.py:GPUModelRunner": [
        *("req_states", "model_state", "get_model"),
    ],
    "vllm/v1/worker/gpu/input_batch.py:InputBatch": ["req_ids"],
    "vllm/v1/worker/gpu/model_states/interface.py:ModelState": ["prepare_attn"],
    "vllm/v1/worker/gpu/model_states/mamba_hybrid.py:MambaHybridModelState": ["prepare_attn"],
    "vllm/v1/worker/worker_base.py:WorkerWrapperBase": [
        *("__getattr__", "init_device", "vllm_config"),
    ],
    "vllm/config/vllm.py:VllmConfig": ["additional_config", "compute_hash"],
    "vllm/v1/worker/worker_base.py:WorkerBase": [
        *("get_kv_cache_spec", "compile_or_warm_up_model"),
    ],
    "vllm/v1/worker/gpu_worker.py:Worker": [
        *("model_runner", "requested_memory", "init_snapshot", "_maybe_get_memory_pool_context"),
    ],
    "vllm/utils/mem_utils.py:MemorySnapshot": ["free_memory"],
    f"{_FLASH}:FlashAttentionImpl": [
        *("scale", "head_size", "logits_soft_cap", "sliding_window", "alibi_slopes", "sinks"),
    ],
    f"{_CPU}:CPUAttentionBackendImpl": [
        *("scale", "head_size", "logits_soft_cap", "sliding_window", "alibi_slopes", "sinks"),
    ],
    "vllm/model_executor/layers/attention/attention.py:Attention": [
        *("attn_type", "kv_cache_dtype", "kv_cache_torch_dtype", "head_size", "head_size_v"),
        *("num_heads", "num_kv_heads", "impl", "attn_backend", "kv_sharing_target_layer_name"),
    ],
    "vllm/config/compilation.py:CompilationConfig": [
        *("static_forward_context", "max_cudagraph_capture_size"),
    ],
    "vllm/config/parallel.py:ParallelConfig": [
        *("rank", "tensor_parallel_size", "decode_context_parallel_size", "enable_dbo"),
        *("prefill_context_parallel_size", "data_parallel_index"),
    ],
    "vllm/config/attention.py:AttentionConfig": ["backend_per_kind"],
    "vllm/config/speculative.py:SpeculativeConfig": [
        *("method", "num_speculative_tokens", "enable_adaptive_verification"),
    ],
    f"{_BASE}:AttentionCGSupport": ["UNIFORM_BATCH", "UNIFORM_SINGLE_TOKEN_DECODE"],
}


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def class_of(root: Path, name: str) -> ast.ClassDef | None:
    """The class that `file:class` below a folder names, None if it is not there."""
    file, wanted = name.split(":")
    if not (root / file).is_file():
        return None
    classes = (node for node in _tree(root / file).body if isinstance(node, ast.ClassDef))
    return next((node for node in classes if node.name == wanted), None)


def methods(found: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    """The methods of a class by name."""
    return {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}


def arguments(method: ast.FunctionDef) -> list[str]:
    """The names of its arguments, those with a default followed by `=`, with `*` and `**`."""
    args = method.args
    plain = [*args.posonlyargs, *args.args]
    first = len(plain) - len(args.defaults)
    names = [arg.arg + "=" * (i >= first) for i, arg in enumerate(plain)]
    names += [f"*{args.vararg.arg}"] if args.vararg else []
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        names.append(f"*,{arg.arg}" + "=" * (default is not None))
    return names + ([f"**{args.kwarg.arg}"] if args.kwarg else [])


def attributes(found: ast.ClassDef) -> set[str]:
    """What a class has: methods, fields, and what its methods assign to `self`."""
    names = set(methods(found))
    for node in ast.walk(found):
        if isinstance(node, ast.AnnAssign | ast.Assign):
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            for target in targets:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        names.add(part.id)
                    elif isinstance(part, ast.Attribute):
                        names.add(part.attr)
    return names


def overridden(root: Path) -> dict[str, list[str]]:
    """The arguments of every method that the plugin overrides, as vLLM has it below a folder."""
    found: dict[str, list[str]] = {}
    for ours, bases in OVERRIDING.items():
        own = class_of(OURS, ours)
        assert own is not None, ours
        for name in methods(own):
            for base in bases:
                theirs = class_of(root, base)
                if theirs is not None and name in methods(theirs):
                    found[f"{ours}.{name}"] = arguments(methods(theirs)[name])
                    break
    return found


def present(root: Path) -> dict[str, list[str]]:
    """Which of the attributes in `READ` are there."""
    answer = {}
    for name, wanted in READ.items():
        found = class_of(root, name)
        has = attributes(found) if found is not None else set()
        answer[name] = [attribute for attribute in wanted if attribute in has]
    return answer


def main() -> None:
    root, version = Path(sys.argv[1]), sys.argv[2]
    stored = json.loads(STORED.read_text()) if STORED.is_file() else {}
    stored[version] = {"overridden": overridden(root), "present": present(root)}
    STORED.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
