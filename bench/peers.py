"""Other decode attention on the same tensors, each checked against `mac_attn.decode` before use.

A peer that cannot run here keeps its place in the results, with the reason.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from workload import Workload

# |out - exact| / |exact| over the whole output. Both round it to bfloat16 (2^-9 of an element at
# most, 2^-10 or so on average) and multiply values by weights in bfloat16, in tiles of their own.
TOLERANCE = 1e-2
VLLM_BLOCK = 128  # tokens; vLLM's default on a CPU


Variants = dict[str, Callable[[], Tensor]]
Maker = Callable[[Workload], Variants]


class Missing(Exception):
    """The peer cannot run here, and why."""


@dataclass
class Peer:
    """A library's decode attention, in one or several variants of which the fastest counts."""

    name: str
    variants: Variants = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)  # variant, or "" for all: why it is out


def make_peers(work: Workload, *, slow: bool = True, authors: bool = False) -> list[Peer]:
    """All peers of the workload's device. `slow=False` leaves out what compiles for long.

    `authors=True`: the one that the method's authors compare with, on any device.
    """
    makers = CUDA_PEERS if work.device.type == "cuda" else CPU_PEERS
    if authors:
        makers = {"FlashInfer": partial(flashinfer, authors=True)}
    peers = []
    expected = work.exact().float()
    for name, maker in makers.items():
        peer = Peer(name)
        if maker is flex and not slow:
            peer.problems[""] = "left out by --quick: compiles for tens of seconds"
        else:
            _fill(peer, maker, work, expected)
        peers.append(peer)
    return peers


def _fill(peer: Peer, maker: Maker, work: Workload, expected: Tensor) -> None:
    # A peer may fail in any way (import, compilation, memory); the others are still to be timed.
    try:
        variants = maker(work)
    except Missing as reason:
        peer.problems[""] = str(reason)
        return
    except Exception as error:
        peer.problems[""] = describe(error)
        return
    for name, call in variants.items():
        try:
            out = call().float().view(expected.shape)
            distance = float((out - expected).norm() / expected.norm())
            if not distance <= TOLERANCE:
                raise Missing(f"differs from exact decode by {distance:.1e} (limit {TOLERANCE:g})")
            peer.variants[name] = call
        except Exception as error:
            peer.problems[name] = str(error) if isinstance(error, Missing) else describe(error)


def describe(error: Exception) -> str:
    """An exception in one line."""
    text = str(error).strip().splitlines() or [""]
    # A compiler's message is long; what went wrong stands at its end as often as at its beginning.
    lines = text if len(text) <= 2 else [text[0], "...", text[-1]]
    return f"{type(error).__name__}: " + " ".join(line.strip()[:200] for line in lines)


def flashinfer(work: Workload, authors: bool = False) -> Variants:
    """FlashInfer's decode attention; with `authors` only the kernel that they compare with."""
    try:
        import flashinfer_decode as library
    except ImportError as error:
        raise Missing(f"flashinfer cannot be imported ({error})") from error
    return library.cuda_cores(work) if authors else library.variants(work)


def flash_attention(work: Workload) -> Variants:
    """flash_attn_with_kvcache on a dense copy: its paged form wants pages of 256 tokens."""
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError as error:
        raise Missing(f"flash_attn cannot be imported ({error})") from error
    k, v = work.dense
    q = work.q[:, None]
    return {
        "dense": lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=work.seq_lens)[:, 0],
    }


def torch_sdpa(work: Workload) -> Variants:
    """scaled_dot_product_attention with enable_gqa on a dense copy in token order [B, L, H, D].

    On the CPU, where memory allows it, also on one head by head, [B, H, L, D].
    """
    q = work.q[:, :, None]
    k, v = (t.transpose(1, 2) for t in work.dense)
    variants = {"[B, L, H, D]": lambda: sdpa(q, k, v, enable_gqa=True)[:, :, 0]}
    if work.device.type == "cpu":
        k2, v2 = work.dense_by_head
        variants["[B, H, L, D]"] = lambda: sdpa(q, k2, v2, enable_gqa=True)[:, :, 0]
    return variants


def flex(work: Workload) -> Variants:
    """torch.nn.attention.flex_attention, compiled, on a dense copy [B, H, L, D]."""
    try:
        from torch.nn.attention.flex_attention import flex_attention
    except ImportError as error:
        raise Missing(f"flex_attention cannot be imported ({error})") from error
    q = work.q[:, :, None]
    k, v = work.dense_by_head
    compiled = torch.compile(flex_attention, dynamic=False)
    return {"compiled": lambda: compiled(q, k, v, enable_gqa=True)[:, :, 0]}


def vllm_cpu(work: Workload) -> Variants:
    """The op behind vLLM's CPU backend, on a cache of its own layout, planned once.

    See vllm/v1/attention/backends/cpu_attn.py. The library is loaded without importing vllm, whose
    engine this does not need.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise Missing("vllm is not installed")
    # The choice of vllm/platforms/cpu.py.
    level = "_AVX2"
    if torch.cpu._is_avx512_supported():
        level = "" if torch.cpu._is_avx512_bf16_supported() else "_AVX512"
    libraries = sorted(Path(spec.submodule_search_locations[0]).glob(f"_C{level}.*so"))
    if not libraries:
        raise Missing("the installed vllm holds no CPU kernels")
    torch.ops.load_library(libraries[0])
    ops, case = torch.ops._C, work.case
    amx = torch.cpu._is_amx_tile_supported() and case.dtype == torch.bfloat16
    isa = "amx" if amx else "vec"
    blocks = -(-case.seq_len // VLLM_BLOCK)  # of one request
    shape = (case.batch * blocks, case.num_kv_heads, VLLM_BLOCK, case.head_dim)
    k_cache, v_cache = (torch.zeros(shape, dtype=case.dtype) for _ in range(2))
    table = torch.randperm(case.batch * blocks).int().view(case.batch, blocks)
    tokens = torch.arange(case.seq_len)
    for b, (k, v) in enumerate(zip(*work.dense, strict=True)):
        places = table[b, tokens // VLLM_BLOCK].long() * VLLM_BLOCK + tokens % VLLM_BLOCK
        ops.cpu_attn_reshape_and_cache(k, v, k_cache, v_cache, places, isa, 1.0, 1.0, "auto")
    starts = torch.arange(case.batch + 1, dtype=torch.int32)
    split_kv = True  # as the engine has it by default
    plan = ops.get_scheduler_metadata(
        case.batch,
        case.num_qo_heads,
        case.num_kv_heads,
        case.head_dim,
        work.seq_lens,
        case.dtype,
        starts,
        True,
        -1,
        isa,
        split_kv,
        None,
        "auto",
    )
    out = torch.empty_like(work.q)
    scale = 1.0 / math.sqrt(case.head_dim)

    def call() -> Tensor:
        ops.cpu_attention_with_kv_cache(
            work.q,
            k_cache,
            v_cache,
            out,
            starts,
            work.seq_lens,
            scale,
            True,
            None,
            -1,
            table,
            0.0,
            plan,
            None,
            None,
            1.0,
            1.0,
            "auto",
        )
        return out

    return {f"{isa}, blocks of {VLLM_BLOCK}": call}


CUDA_PEERS: dict[str, Maker] = {
    "FlashInfer": flashinfer,
    "FlashAttention": flash_attention,
    "torch SDPA": torch_sdpa,
}
CPU_PEERS: dict[str, Maker] = {
    "torch SDPA": torch_sdpa,
    "FlexAttention": flex,
    "vLLM's CPU attention": vllm_cpu,
}
