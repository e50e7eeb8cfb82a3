"""Time for each token of a model of Llama 3 8B's shape: exact, with reuse, `Lossless`; needs a GPU.

    python bench/model_steps.py [--context 32768] [--batch 16] [--drafts 6 --tokens 6.6]

All layers are one CUDA graph, with random weights, each with a KV cache and rings of its own. Keys
and values are projected and written; the queries are those of `workload.py`, of which a share
`--hits` finds a match. "attention" is the same without all that is not attention.

`Lossless` is computed from such steps: k drafts, whose attention reuses, and a verification of
k + 1 tokens, which is exact, yield so many tokens (`--tokens`, one for each of `--drafts`) as
`bench/lossless.py` has counted on real text. "speculate": steps of k + 1 tokens, as those that
verify another model's drafts are, with reuse beside exact ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from report import machine
from timing import CudaTimer, Step
from torch import Tensor
from workload import Case, PlantedRing, Workload, hit_mask

import mac_attn


@dataclass(frozen=True)
class Shape:
    """Of a Llama: sizes as its config.json names them. Without `hidden_size` attention alone."""

    heads: str
    head_dim: int
    layers: int
    hidden_size: int = 0
    intermediate_size: int = 0
    vocab_size: int = 0


SHAPES = {
    "llama3-8b": Shape("32/8", 128, 32, 4096, 14336, 128256),
    "gemma3-270m": Shape("4/1", 256, 3),  # its layers that attend in full
}


@dataclass(frozen=True)
class Kind:
    """Of a step: how many tokens a request has, and whether and how they reuse."""

    tokens: int = 1
    reuse: bool = False
    learn: bool = True
    exact: bool = False


EXACT, REUSE, DRAFT = Kind(), Kind(reuse=True), Kind(reuse=True, learn=False)


class Layer:
    """Weights, KV cache and rings of a layer."""

    def __init__(self, shape: Shape, case: Case, cfg: mac_attn.ReuseConfig, age: int) -> None:
        device = torch.device("cuda")
        self.work = Workload(case, device)
        self.ring = PlantedRing(self.work, cfg, age)
        many = (case.batch, mac_attn.MAX_QUERY_TOKENS, case.num_qo_heads, case.head_dim)
        self.queries = torch.randn(many, device=device, dtype=case.dtype)
        size, self.kv_size = case.num_qo_heads * case.head_dim, case.num_kv_heads * case.head_dim
        hidden, between = shape.hidden_size, shape.intermediate_size

        def weight(rows: int, columns: int) -> Tensor:
            values = torch.randn(rows, columns, device=device, dtype=case.dtype)
            return values.mul_(columns**-0.5)

        if hidden:
            self.qkv, self.o = weight(size + 2 * self.kv_size, hidden), weight(hidden, size)
            self.gate_up, self.down = weight(2 * between, hidden), weight(hidden, between)
            self.norm = torch.ones(hidden, device=device, dtype=case.dtype)

    def attend(self, step: Kind) -> Tensor:
        """Of queries [B, Hq, D], or of several tokens [B, T, Hq, D]; reads the KV cache."""
        work = self.work
        q, q_match = work.q, work.q_match
        if step.tokens > 1:
            q = q_match = self.queries[:, : step.tokens]
        options: dict[str, Any] = {}
        if step.reuse:
            options = {"reuse": self.ring.reuse, "slots": work.slots, "q_match": q_match}
            options |= {"learn": step.learn, "exact": step.exact}
        out = mac_attn.decode(q, work.kv, work.block_table, work.seq_lens, **options)
        assert isinstance(out, Tensor)
        return out

    def forward(self, x: Tensor, step: Kind) -> Tensor:
        """x [B T, hidden]."""
        work, case = self.work, self.work.case
        new = torch.arange(step.tokens, device="cuda")
        positions = work.seq_lens[:, None] - step.tokens + new
        turned, values = project(
            x, self.norm, self.qkv, positions, work.rotary.inv_freq, self.kv_size
        )
        keys = turned[:, :, -case.num_kv_heads :]
        pages = work.block_table.gather(1, positions // case.page_size)
        work.kv[pages, :, positions % case.page_size] = torch.stack([keys, values], 2)
        attended = self.attend(step).reshape(len(x), -1)
        return rest_of_layer(x, attended, self.o, self.norm, self.gate_up, self.down)


# Compiled, so that what engines do in one kernel is one here.
@torch.compile(dynamic=False)
def project(
    x: Tensor, norm: Tensor, weights: Tensor, positions: Tensor, inv_freq: Tensor, kv_size: int
) -> tuple[Tensor, Tensor]:
    """Of x [B T, hidden]: queries and keys, turned, [B, T, Hq + Hkv, D]; values [B, T, Hkv, D]."""
    y = F.rms_norm(x, x.shape[-1:], norm) @ weights.T
    half = len(inv_freq)
    turned, v = y.split([y.shape[-1] - kv_size, kv_size], -1)
    first, second = turned.view(*positions.shape, -1, 2, half).float().unbind(-2)
    angle = (positions[..., None] * inv_freq)[:, :, None]
    cos, sin = angle.cos(), angle.sin()
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
    return turned, v.view(*positions.shape, -1, 2 * half)


@torch.compile(dynamic=False)
def rest_of_layer(
    x: Tensor, attended: Tensor, o: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    x = x + attended @ o.T
    gate, up = (F.rms_norm(x, x.shape[-1:], norm) @ gate_up.T).chunk(2, -1)
    return x + (F.silu(gate) * up) @ down.T


def steps_of(
    shape: Shape, case: Case, layers: Sequence[Layer], drafts: Sequence[int], hits: Sequence[float]
) -> list[Step]:
    """What is timed: of the model, if the shape has one, and of its attention alone."""

    def attention(step: Kind) -> None:
        for layer in layers:
            layer.attend(step)

    parts: dict[str, Callable[[Kind], object]] = {"attention": attention}
    if shape.hidden_size:
        head = torch.randn(shape.vocab_size, shape.hidden_size, device="cuda", dtype=case.dtype)

        def model(step: Kind) -> Tensor:
            x = head[: case.batch * step.tokens]
            for layer in layers:
                x = layer.forward(x, step)
            return x @ head.T

        parts["model"] = model
    steps = []
    for part, call in parts.items():
        steps.append(Step(f"{part} exact", partial(call, EXACT)))
        for name, kind in (("reuse", REUSE), ("draft", DRAFT)):
            graph = partial(call, kind)
            for rate in hits:
                mask = layers[0].ring.on_device(hit_mask(case, "group", rate, "even"))
                steps.append(
                    Step(f"{part} {name} {rate}", graph, partial(put_back, layers, mask, 1))
                )
        for k in drafts:
            back = partial(put_back, layers, mask, k + 1)
            verify = partial(call, Kind(k + 1, reuse=True, exact=True))
            steps.append(Step(f"{part} verify {k}", verify, back))
            speculate = partial(call, Kind(k + 1, reuse=True))
            for rate in hits:
                mask = layers[0].ring.on_device(hit_mask(case, "group", rate, "even"))
                back = partial(put_back, layers, mask, k + 1)
                steps.append(Step(f"{part} speculate {k} {rate}", speculate, back))
    return steps


def put_back(layers: Sequence[Layer], hits: Tensor, tokens: int) -> None:
    """The rings as they were, with what a step of so many tokens is to find."""
    for layer in layers:
        layer.ring.put_back(hits, layer.queries[:, :tokens] if tokens > 1 else None)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama3-8b", choices=list(SHAPES))
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--drafts", type=int, nargs="+", default=[3, 6, 7])
    parser.add_argument("--tokens", type=float, nargs="+", default=[3.8, 6.6, 7.4])
    parser.add_argument("--hits", type=float, nargs="+", default=[0.75, 0.9, 0.95, 1.0])
    parser.add_argument(
        "--anchors", type=int, default=512, help="of `ReuseConfig.drafts`; the default has 1024"
    )
    parser.add_argument("--age", type=int, default=100, help="of the entries that are found")
    parser.add_argument(
        "--missed", type=int, default=0, help="steps in a row without a hit before; 33: none draws"
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(argv)
    if len(options.tokens) != len(options.drafts):
        parser.error("--tokens must have as many numbers as --drafts")
    shape = SHAPES[options.shape]
    case = Case.of(shape.heads, options.context, options.batch, shape.head_dim)
    cfg = mac_attn.ReuseConfig(anchors=options.anchors)
    print(machine(torch.device("cuda")))
    print(f"command: python {' '.join(sys.argv)}")
    layers = [Layer(shape, case, cfg, options.age) for _ in range(shape.layers)]
    for layer in layers:
        layer.ring.missed = options.missed
    steps = steps_of(shape, case, layers, options.drafts, options.hits)
    timings = CudaTimer(options.rounds, warmup=3).measure(steps)
    for layer in layers:
        layer.ring.reuse.check()
    ms = {name: timing.us / 1e3 for name, timing in timings.items()}
    for name, each in ms.items():
        print(f"{name:24} {each:8.3f} ms")
    print(f"\n{'':10} way       hits  drafts  tokens a round  ms a token  exact  ratio")
    rows = []
    for part in ("attention", "model") if shape.hidden_size else ("attention",):
        for rate in options.hits:
            ways = [(0, 1.0, ms[f"{part} reuse {rate}"])]
            for k, tokens in zip(options.drafts, options.tokens, strict=True):
                drafts, verify = k * ms[f"{part} draft {rate}"], ms[f"{part} verify {k}"]
                ways.append((k, tokens, (drafts + verify) / tokens))
            for k, tokens, each in ways:
                exact, way = ms[f"{part} exact"], "lossless" if k else "reuse"
                rows.append(
                    dict(part=part, hits=rate, drafts=k, tokens=tokens, ms=each, exact=exact)
                )
                print(
                    f"{part:10} {way:8}  {rate:4.2f}  {k:6}  {tokens:14.2f}  {each:10.3f}"
                    f"  {exact:5.2f}  {exact / each:5.2f}"
                )
    print(f"\n{'':10} drafts  hits  exact step  with reuse  ratio")
    for part in ("attention", "model") if shape.hidden_size else ("attention",):
        for k in options.drafts:
            for rate in options.hits:
                exact, each = ms[f"{part} verify {k}"], ms[f"{part} speculate {k} {rate}"]
                times = f"{exact:10.3f}  {each:10.3f}  {exact / each:5.2f}"
                print(f"{part:10} {k:6}  {rate:4.2f}  {times}")
    if options.json:
        times = {name: asdict(timing) for name, timing in timings.items()}
        options.json.write_text(json.dumps({"times": times, "rows": rows}, indent=1))
    return rows


if __name__ == "__main__":
    main()
