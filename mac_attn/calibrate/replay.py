"""Decode a captured text again with reuse, and compare every head's output with exact attention."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import mac_attn
from mac_attn import ReuseCache, ReuseConfig
from mac_attn.paging import dense_as_pages

from .capture import Capture

# Seeded rings that are kept: those of SmolLM2's 30 layers take some 100 MB.
_KEPT_SEEDS = 3


@dataclass(frozen=True, eq=False)
class Replayed:
    """What every head did at every step.

    Attributes:
        error: [steps, L, Hq] float32, |out - exact| / |exact|.
        source: [steps, L, Hq] int32, the matched position, -1 for a miss.
        depth: [steps, L, Hq] int32, 0 for a miss, else one more than the reused entry's.
        tokens: [steps, L, Hkv] int32, tokens whose key and value were read, anchors included.
        seq_lens: [steps] int32.
    """

    error: Tensor
    source: Tensor
    depth: Tensor
    tokens: Tensor
    seq_lens: Tensor

    @property
    def mean_error(self) -> float:
        """Over steps, layers and query heads."""
        return float(self.error.mean())

    @property
    def hit_rate(self) -> float:
        """Share of (step, query head) pairs that hit."""
        return float((self.source >= 0).float().mean())

    def full_reads(self) -> Tensor:
        """Whether a KV head was read in full, since one of its heads missed: [steps, L, Hkv]."""
        groups = self.source.unflatten(2, (self.tokens.shape[2], -1))
        full: Tensor = (groups < 0).any(dim=3)
        return full

    @property
    def full_read_share(self) -> float:
        """Share of (step, KV head) pairs that were read in full."""
        return float(self.full_reads().float().mean())

    def read_share(self) -> Tensor:
        """Keys and values read over what exact attention reads: [L, Hkv], mean over the steps."""
        return (self.tokens.float() / self.seq_lens[:, None, None]).mean(0)

    @property
    def kv_read_share(self) -> float:
        """`read_share` over all KV heads."""
        return float(self.read_share().mean())


class Replayer:
    """Replays one capture under any options; rings seeded for the same options are kept.

    Every layer is a request of its own with one slot, so that all layers with the same options
    decode in one call.
    """

    def __init__(self, captured: Capture) -> None:
        self.captured = captured
        self._kv = dense_as_pages(captured.k, captured.v)
        self._seeds: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def __call__(self, config: ReuseConfig | Sequence[ReuseConfig]) -> Replayed:
        """Decode all steps with these options, one for all layers or one for each.

        Raises ValueError if there are not as many configs as layers.
        """
        layers = self.captured.num_layers
        configs = [config] * layers if isinstance(config, ReuseConfig) else list(config)
        if len(configs) != layers:
            raise ValueError(f"config has {len(configs)} entries, must have 1 or {layers} (layers)")
        parts: dict[ReuseConfig, list[int]] = {}
        for layer, one in enumerate(configs):
            parts.setdefault(one, []).append(layer)
        if len(parts) == 1:
            return self._run(configs[0], list(range(layers)))
        runs = [(index, self._run(one, index)) for one, index in parts.items()]
        order = torch.tensor([layer for index, _ in runs for layer in index]).argsort()

        def join(name: str) -> Tensor:
            return torch.cat([getattr(run, name) for _, run in runs], dim=1)[:, order]

        return Replayed(
            join("error"), join("source"), join("depth"), join("tokens"), runs[0][1].seq_lens
        )

    @torch.no_grad()
    def _run(self, config: ReuseConfig, layers: list[int]) -> Replayed:
        """Replay of these layers, a request each."""
        c = self.captured
        whole = len(layers) == c.num_layers
        kv, table = self._kv if whole else (self._kv[0], self._kv[1][layers])
        reuse = self._seeded(config, layers)
        slots = torch.arange(len(layers), dtype=torch.int32, device=c.k.device)
        first = c.num_tokens - c.steps
        q, q_match, exact = (
            t if whole else t[layers]
            for t in (c.q[:, -c.steps :], c.q_match[:, -c.steps :], c.exact)
        )
        norms = exact.norm(dim=-1).clamp_min(1e-30)
        shape = (c.steps, len(layers), c.num_qo_heads)
        error = torch.empty(shape, device=c.k.device)
        source, depth = (torch.empty(shape, dtype=torch.int32, device=c.k.device) for _ in range(2))
        shape = (c.steps, len(layers), c.num_kv_heads)
        anchors = torch.zeros(shape, dtype=torch.int32, device=c.k.device)  # read by hits
        rows, kv_heads = slots[:, None].long(), torch.arange(c.num_qo_heads, device=c.k.device)
        kv_heads, within = kv_heads // reuse.group_size, kv_heads % reuse.group_size
        for step in range(c.steps):
            position = first + step
            lens = torch.full_like(slots, position + 1)
            query, matching = q[:, step].contiguous(), q_match[:, step].contiguous()
            # mac_attn.decode in its three parts, for what the first two answer.
            matched = mac_attn.match(reuse, matching, lens, slots)
            hit = matched.source >= 0
            place = matched.place.long().clamp(min=0)
            depth[step] = torch.where(hit, reuse.ring_depth[rows, kv_heads, place, within] + 1, 0)
            amended = mac_attn.amend(
                query,
                kv,
                table,
                lens,
                matched=matched,
                reuse=reuse,
                slots=slots,
                sm_scale=c.sm_scale,
            )
            out, _ = mac_attn.complete(
                amended,
                lens,
                reuse=reuse,
                matched=matched,
                q=query,
                q_match=matching,
                slots=slots,
                k_cache=kv[0],
                block_table=table,
                sm_scale=c.sm_scale,
            )
            error[step] = (out.float() - exact[:, step]).norm(dim=-1) / norms[:, step]
            source[step] = matched.source
            if config.anchors:  # then the heads of a KV head decide together
                anchors[step] = torch.where(hit[:, :: reuse.group_size], amended.sampled, 0)
        seq_lens = torch.arange(first + 1, c.num_tokens + 1, dtype=torch.int32)
        tokens = tokens_read(config, source.cpu(), anchors.cpu(), seq_lens)
        return Replayed(error.cpu(), source.cpu(), depth.cpu(), tokens, seq_lens)

    def _seeded(self, config: ReuseConfig, layers: list[int]) -> ReuseCache:
        """Rings as after the prefill: what `seed` writes does not depend on the threshold."""
        c = self.captured
        reuse = ReuseCache(
            config,
            num_slots=len(layers),
            num_qo_heads=c.num_qo_heads,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            head_dim_v=c.head_dim_v,
            dtype=c.k.dtype,
            device=c.k.device,
        )
        key = (config.entries, config.window, config.band, config.anchors)
        if key not in self._seeds:
            self._seeds[key] = self._seed(config)
            if len(self._seeds) > _KEPT_SEEDS:
                self._seeds.popitem(last=False)
        self._seeds.move_to_end(key)
        reuse.ring.copy_(self._seeds[key][layers])
        return reuse

    def _seed(self, config: ReuseConfig) -> Tensor:
        c = self.captured
        reuse = ReuseCache(
            config,
            num_slots=c.num_layers,
            num_qo_heads=c.num_qo_heads,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            head_dim_v=c.head_dim_v,
            dtype=c.k.dtype,
            device=c.k.device,
        )
        kv, table = self._kv
        prompt = c.num_tokens - c.steps
        queries = slice(max(0, c.q.shape[1] - c.steps - config.window), c.q.shape[1] - c.steps)
        slots = torch.arange(c.num_layers, dtype=torch.int32, device=c.k.device)
        mac_attn.seed(
            reuse,
            c.q[:, queries].contiguous(),
            kv,
            table,
            torch.full_like(slots, prompt),
            slots=slots,
            q_match=c.q_match[:, queries].contiguous(),
            sm_scale=c.sm_scale,
        )
        return reuse.ring


def tokens_read(config: ReuseConfig, source: Tensor, anchors: Tensor, seq_lens: Tensor) -> Tensor:
    """Tokens that each KV head reads, int32 `[steps, L, Hkv]`.

    All of `[0, n)` on a miss, else `[E(c), n)` and the anchors; of the heads that share a KV head
    the one that reads most counts.

    Args:
        config: the options.
        source: [steps, L, Hq] int32, what `match` answered.
        anchors: [steps, L, Hkv] int32, how many anchors a hit has read.
        seq_lens: [steps] int32.
    """
    start = (source + 1 - config.band).clamp(min=0)
    start = start.unflatten(2, (anchors.shape[2], -1)).amin(dim=3)
    tokens: Tensor = seq_lens[:, None, None] - start + anchors
    return tokens.to(torch.int32)
