"""Generation by a plain PyTorch model that calls mac_attn itself, with nothing in between.

    python examples/generate.py                   a tiny Llama with random weights
    python examples/generate.py --model smollm2   SmolLM2-135M-Instruct, as the demo gets it
    python examples/generate.py --model FOLDER    another Llama, as `save_pretrained` writes it

What mac_attn asks of a loop is marked with (1) to (4).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mac_attn


@dataclass
class Config:  # by the names of a Llama's config.json; these sizes are of the tiny model
    vocab_size: int = 100
    hidden_size: int = 64
    intermediate_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0


class PagedKV:
    """Keys and values of all layers, in pages that a request takes as it grows."""

    def __init__(self, config: Config, num_pages: int, batch: int, dtype: torch.dtype) -> None:
        self.page_size = 16
        sizes = (num_pages, self.page_size, config.num_key_value_heads, config.head_dim)
        self.layers = torch.zeros(config.num_hidden_layers, 2, *sizes, dtype=dtype)
        self.block_table = torch.zeros(batch, num_pages, dtype=torch.int32)
        self.seq_lens = torch.zeros(batch, dtype=torch.int32)
        self.free = list(range(num_pages))

    def grow(self, request: int, tokens: int) -> None:
        before = int(self.seq_lens[request])
        for page in range(-(-before // self.page_size), -(-(before + tokens) // self.page_size)):
            self.block_table[request, page] = self.free.pop()
        self.seq_lens[request] += tokens

    def write(self, layer: int, requests: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> None:
        pages = self.block_table[requests[:, None], positions // self.page_size].long()
        self.layers[layer, 0, pages, positions % self.page_size] = k
        self.layers[layer, 1, pages, positions % self.page_size] = v


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        exponents = torch.arange(0, self.head_dim, 2).float() / self.head_dim
        self.rotary = mac_attn.RotaryEmbedding(1.0 / config.rope_theta**exponents)
        self.reuse: mac_attn.ReuseCache | None = None

    def forward(self, x: Tensor, kv: PagedKV, requests: Tensor, positions: Tensor) -> Tensor:
        projections = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q_match, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projections)  # [B, T, H, D]
        q = mac_attn.rotate(q_match, positions, self.rotary)
        k = mac_attn.rotate(k, positions, self.rotary)
        kv.write(self.layer, requests, positions, k, v)
        pages = (kv.layers[self.layer, 0], kv.layers[self.layer, 1])
        table, lengths, slots = kv.block_table[requests], kv.seq_lens[requests], requests.int()
        if x.shape[1] == 1:
            # (1) A step, once the new token's key and value are in the cache. A request keeps to
            #     its slot; queries are compared as they were before their rotation.
            out = mac_attn.decode(
                q[:, 0],
                pages,
                table,
                lengths,
                reuse=self.reuse,
                slots=None if self.reuse is None else slots,
                q_match=None if self.reuse is None else q_match[:, 0],
            )[:, None]
        else:
            heads_first = (y.transpose(1, 2) for y in (q, k, v))
            out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
            out = out.transpose(1, 2)
            if self.reuse is not None:
                # (2) After a prefill, entries of its last queries: the first steps can hit.
                last = slice(-self.reuse.cfg.window, None)
                queries, matching = q[:, last].contiguous(), q_match[:, last].contiguous()
                mac_attn.seed(
                    self.reuse, queries, pages, table, lengths, slots=slots, q_match=matching
                )
        return self.o_proj(out.flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config, layer), MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, *where: PagedKV | Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *where)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, kv: PagedKV, requests: Tensor, positions: Tensor) -> Tensor:
        """Logits after the last of the tokens [B, T], which are in `kv` afterwards."""
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, kv, requests, positions)
        return self.lm_head(self.norm(x[:, -1]))

    def use_reuse(self, config: mac_attn.ReuseConfig | None, num_slots: int) -> None:
        """(3) A cache for each layer, with a slot for each request; None: exact attention."""
        for i, layer in enumerate(self.layers):
            layer.self_attn.reuse = None
            if config is not None:
                layer.self_attn.reuse = mac_attn.ReuseCache(
                    config,
                    num_slots=num_slots,
                    num_qo_heads=self.config.num_attention_heads,
                    num_kv_heads=self.config.num_key_value_heads,
                    head_dim=self.config.head_dim,
                    dtype=self.lm_head.weight.dtype,
                    layer=i,
                )


@torch.inference_mode()
def generate(model: Llama, prompts: list[Tensor], new_tokens: int) -> tuple[Tensor, float]:
    """The likeliest continuation of each prompt [T], [len(prompts), new_tokens]; seconds a step."""
    batch = len(prompts)
    num_pages = sum(-(-(len(prompt) + new_tokens) // 16) for prompt in prompts)
    kv = PagedKV(model.config, num_pages, batch, model.lm_head.weight.dtype)
    for layer in model.layers:
        if layer.self_attn.reuse is not None:
            layer.self_attn.reuse.reset(range(batch))  # (4) new requests in used slots
    logits = []
    for request, prompt in enumerate(prompts):  # each prompt alone, as their lengths differ
        kv.grow(request, len(prompt))
        positions = torch.arange(len(prompt))[None]
        logits.append(model(prompt[None], kv, torch.tensor([request]), positions))
    tokens = [torch.cat(logits).argmax(-1)]
    start = time.perf_counter()
    for _ in range(new_tokens - 1):  # then all of them together
        positions = kv.seq_lens[:, None].long()
        for request in range(batch):
            kv.grow(request, 1)
        step = model(tokens[-1][:, None], kv, torch.arange(batch), positions)
        tokens.append(step.argmax(-1))
    seconds = (time.perf_counter() - start) / max(1, new_tokens - 1)
    return torch.stack(tokens, dim=1), seconds


def load(folder: Path) -> Llama:
    """A Llama from config.json and safetensors, whose names the modules above have."""
    from safetensors.torch import load_file

    given = json.loads((folder / "config.json").read_text("utf-8"))
    # transformers 5 keeps rope_theta in the second one, 4 in the config itself.
    rope = given.get("rope_scaling") or given.get("rope_parameters") or {}
    given.update(rope)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not given.get("head_dim"):
        given["head_dim"] = given["hidden_size"] // given["num_attention_heads"]
    if given["model_type"] != "llama" or kind != "default":
        raise SystemExit(f"{folder} must be a llama with plain rotary embeddings")
    model = Llama(Config(**{f.name: given[f.name] for f in fields(Config) if f.name in given}))
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= {k.removeprefix("model."): v for k, v in load_file(file).items()}
    weights.setdefault("lm_head.weight", weights["embed_tokens.weight"])
    model.load_state_dict(weights)
    return model.to(weights["lm_head.weight"].dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="smollm2, or a folder; without it random weights")
    parser.add_argument("--prompt-tokens", type=int, default=3000)
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.model is None:
        model, tokenizer = Llama(Config()), None
        text = torch.randint(0, 100, (64,)).repeat(-(-args.prompt_tokens // 64))  # repeats itself
        prompts = [text[: args.prompt_tokens], text[7 : args.prompt_tokens]]
    else:
        from transformers import AutoTokenizer

        from mac_attn.demo.model import build_prompt, folder, python_reference

        path = folder(None if args.model == "smollm2" else Path(args.model))
        model, tokenizer = load(path), AutoTokenizer.from_pretrained(path)
        prompts = list(build_prompt(tokenizer, python_reference(), args.prompt_tokens))
    results = {}
    for name, config in (("exact", None), ("reuse", mac_attn.ReuseConfig())):
        model.use_reuse(config, num_slots=len(prompts))
        results[name], seconds = generate(model, prompts, args.new_tokens)
        print(f"{name}: {seconds * 1e3:.2f} ms a step")
    same = (results["exact"] == results["reuse"]).all(1)
    print(f"the same text: {int(same.sum())} of {len(prompts)}")
    print(model.layers[-1].self_attn.reuse.stats())
    if tokenizer is not None:
        print(tokenizer.decode(results["reuse"][0]))


if __name__ == "__main__":
    main()
