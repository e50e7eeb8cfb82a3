"""The reference's algebra by means that share nothing with it: loops, SDPA, effective logits."""

from __future__ import annotations

import math

import pytest
import torch
from cases import ReferenceChain, close, hashed, make_kv, make_q, small_config
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import mac_attn
from mac_attn import reference
from mac_attn.reference import attention_state, merge_states

# --- states -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_attention_state_is_the_sum_written_out(cap):
    q, k, v = make_q(1, 3, 8).double(), make_q(2, 11, 8).double(), make_q(3, 11, 8).double()
    o, lse = attention_state(q, k, v, 0.3, cap)
    for g in range(3):
        logits = [0.3 * sum((q[g, d] * k[i, d]).item() for d in range(8)) for i in range(11)]
        if cap:
            logits = [cap * math.tanh(x / cap) for x in logits]
        total = sum(math.exp(x) for x in logits)
        assert lse[g].item() == pytest.approx(math.log(total), rel=1e-12)
        mean = sum(math.exp(x) / total * v[i] for i, x in enumerate(logits))
        close(o[g], mean)


def test_attention_state_of_no_tokens_is_empty():
    empty = torch.empty(0, 8, dtype=torch.float64)
    o, lse = attention_state(make_q(1, 3, 8).double(), empty, empty, 1.0)
    assert torch.equal(o, torch.zeros(3, 8, dtype=torch.float64))
    assert torch.equal(lse, torch.full((3,), -torch.inf, dtype=torch.float64))


def test_merge_equals_the_state_of_the_union_in_any_order():
    q, k, v = make_q(1, 5, 8).double(), make_q(2, 40, 8).double(), make_q(3, 40, 8).double()
    whole = attention_state(q, k, v, 0.5)
    owner = torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(0))
    parts = [attention_state(q, k[owner == i], v[owner == i], 0.5) for i in range(5)]  # 4: empty
    for order in ([0, 1, 2, 3, 4], [4, 3, 1, 2, 0], [2, 4, 0, 3, 1]):
        state = parts[order[0]]
        for i in order[1:]:
            state = merge_states(*state, *parts[i])
        close(state[0], whole[0])
        close(state[1], whole[1])
    left = merge_states(*merge_states(*parts[0], *parts[1]), *merge_states(*parts[2], *parts[3]))
    close(left[0], whole[0])


def test_merge_with_empty_operands_has_no_nan():
    o, lse = make_q(1, 5, 8).double(), make_q(2, 1, 5).double()[0]
    nothing = torch.zeros_like(o), torch.full_like(lse, -torch.inf)
    for state in (merge_states(o, lse, *nothing), merge_states(*nothing, o, lse)):
        assert torch.equal(state[0], o) and torch.equal(state[1], lse)
    both = merge_states(*nothing, *nothing)
    assert torch.equal(both[0], nothing[0]) and torch.equal(both[1], nothing[1])


# --- exact decode -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_exact_decode_equals_sdpa(layout, combined, strided):
    lengths = [1, 7, 0, 8, 23]
    kv = make_kv(
        5,
        batch=5,
        length=23,
        num_kv_heads=2,
        head_dim=16,
        page_size=7,
        layout=layout,
        combined=combined,
        strided=strided,
    )
    kv.write([0] * 5, lengths)
    q = make_q(6, 5, 6, 16, strided=strided)
    step = reference.decode(
        q, kv.cache, kv.table(lengths), torch.tensor(lengths), kv_layout=layout, sm_scale=0.4
    )
    for b, n in enumerate(lengths):
        if n == 0:
            assert (step.out[b] == 0).all() and (step.lse[b] == -torch.inf).all()
            continue
        k, v = (x[b, :n].transpose(0, 1).double() for x in (kv.k, kv.v))
        want = scaled_dot_product_attention(
            q[b, :, None].double(), k, v, scale=0.4, enable_gqa=True
        )
        close(step.out[b], want[:, 0])
        logits = 0.4 * torch.einsum("hgd,hnd->hgn", q[b].double().unflatten(0, (2, 3)), k)
        close(step.lse[b], logits.exp().sum(-1).log().flatten())


def test_exact_decode_of_an_empty_batch():
    kv = make_kv(5, batch=1, length=4, num_kv_heads=2, head_dim=16)
    empty = torch.empty(0, 4, 16), kv.cache, torch.empty(0, 1).int(), torch.empty(0).int()
    step = reference.decode(*empty)
    assert step.out.shape == (0, 4, 16) and step.lse.shape == (0, 4)


# --- match, amend, complete against effective logits ------------------------------------------

ALGEBRA = {
    "head": dict(granularity="head"),
    "head absolute": dict(granularity="head", threshold_mode="absolute", threshold=0.75),
    "group": dict(),
    "group absolute": dict(threshold_mode="absolute", threshold=0.75),
    "one threshold per head": dict(threshold=[0.1, 0.2, 0.3, 0.15], granularity="head"),
    "group, one threshold per head": dict(threshold=[0.1, 0.2, 0.3, 0.15]),
    "depth": dict(max_reuse_depth=2),
    "depth per head": dict(granularity="head", max_reuse_depth=3),
    "sampled": dict(anchors=5),
    "sampled, one threshold per head": dict(anchors=5, threshold=[0.1, 0.2, 0.3, 0.15]),
    "more anchors than tokens at first": dict(anchors=40),
    "one anchor": dict(anchors=1),
    "few entries, long window": dict(entries=5, window=60, anchors=8),
    "few entries, short window": dict(entries=7, window=10, max_reuse_depth=1),
    "min_context": dict(min_context=60),
    "no band": dict(band=1),
    "one entry": dict(entries=1),
    "window 1": dict(window=1),
    "band beyond the window": dict(window=8, band=20),
    "sampled, band beyond the window": dict(window=8, band=20, anchors=4),
}


class Slow:
    """One KV head, step by step: a loop over tokens with one logit for each.

    A step is a weighted mean over the whole context in which a reused token keeps an old weight. So
    an entry is represented by one weight per token, and neither states nor merges occur: on a hit a
    token below E(source) takes the source's weight, times rho if there are samples, any from
    E(source) on that of the current query. A sample has the current query's 1 + b times, and the
    source's b times less than none.
    """

    def __init__(self, cfg: mac_attn.ReuseConfig, chain: ReferenceChain, kv_head: int):
        self.cfg, self.chain, self.kv_head = cfg, chain, kv_head
        self.weights: dict[int, Tensor] = {}  # exp(logit) by position: [2, n]
        self.depth: dict[int, list[int]] = {}
        self.samples: dict[int, dict[int, float]] = {}  # a by token
        self.stored: list[int] = []
        self.tau, self.lse = 1.0, None  # of a sample of one: the chain begins without old tokens
        self.hits, self.missed = 0, 0  # steps in a row without a hit

    def step(self, p: int) -> tuple[list[int], Tensor]:
        """The two heads' sources and their weights `[2, n]`, not normalised."""
        logits = self.fresh(p)
        fresh, sources = logits.exp(), [self.match(p, g) for g in range(2)]
        weights = fresh.clone()
        depth = [0 if c < 0 else self.depth[c][g] + 1 for g, c in enumerate(sources)]
        for g, c in enumerate(sources):
            if c < 0:
                continue
            old = max(0, c + 1 - self.cfg.band)
            reused = self.weights[c][g, :old].clone()
            if self.cfg.anchors:
                weights[g] = self.sampled_hit(reused, fresh[g], self.samples[c])
            else:
                weights[g, :old] = reused
        self.hits += sum(c >= 0 for c in sources)
        draws = self.cfg.anchors and sources[0] < 0 and (self.missed <= 32 or self.missed % 8 == 0)
        sample = self.sample(p, logits) if draws else None
        self.missed = 0 if max(sources) >= 0 else self.missed + 1
        reusable = p >= self.cfg.band and min(depth) < (self.cfg.max_reuse_depth or math.inf)
        if reusable and (not self.cfg.anchors or sample is not None):
            self.stored.append(p)
        self.weights[p], self.depth[p], self.samples[p] = weights, depth, sample or {}
        self.lse = weights.sum(-1).log()
        return sources, weights

    def sampled_hit(self, reused: Tensor, fresh: Tensor, sample: dict[int, float]) -> Tensor:
        """One head's weights `[n]` from those of the source `[E(c)]` and its own, `[n]`."""
        old = len(reused)
        share = min(self.cfg.anchors, max(1, old // 6)) / old
        counts = {i: 1 + (1 / (1 / a + share) if a else 0) for i, a in sample.items()}
        light = sum(a * reused[i] for i, a in sample.items())
        rho = sum(a * fresh[i] for i, a in sample.items()) / light if light else 1.0
        left, anew, whole = reused.clone(), fresh.clone(), reused.sum()
        anew[:old] = 0
        for i, count in counts.items():
            left[i] -= count * reused[i]
            anew[i] = count * fresh[i]
        nothing = abs(left.sum()) < whole / 1024 and light < whole / 1024
        if not nothing and rho * left.sum() + anew.sum() >= anew.sum() / 4:
            anew[:old] += rho * left
        return anew

    def fresh(self, p: int) -> Tensor:
        """Logits of the query of position p over its context."""
        keys = self.chain.kv.k[0, : p + 1, self.kv_head].double()
        return self.chain.q[p, 0, self.heads].double() @ keys.T / 4.0

    @property
    def heads(self) -> slice:
        return slice(2 * self.kv_head, 2 * self.kv_head + 2)

    def sample(self, p: int, logits: Tensor) -> dict[int, float] | None:
        """a of each kept token, or None where nothing can be kept."""
        if self.lse is None or p < self.cfg.band:
            return None
        size, tau = min(self.cfg.anchors, max(1, (p + 1 - self.cfg.band) // 6)), self.tau
        weight = [
            max(math.exp(logits[g, i] - self.lse[g]) for g in range(2))
            for i in range(p + 1 - self.cfg.band)
        ]
        key = {i: w / hashed(p, self.kv_head, 0, i) for i, w in enumerate(weight)}
        kept = sorted((i for i in key if key[i] > tau), key=lambda i: -key[i])
        self.tau = min(64.0, max(1 / 64 / size, tau * min(4, max(1 / 4, len(kept) / size / 1.5))))
        if len(kept) > 4 * size:
            return None
        threshold = key[kept[size]] if len(kept) > size else tau
        return {i: max(0.0, threshold / weight[i] - 1) for i in kept[:size]}

    def match(self, p: int, g: int) -> int:
        """Matched position of a query head, found in a loop over positions; -1 is a miss."""
        cfg, head = self.cfg, 2 * self.kv_head + g
        if p + 1 < cfg.min_context:
            return -1
        numbers = torch.as_tensor(cfg.threshold).double().flatten().expand(4).tolist()
        pair = [2 * self.kv_head, 2 * self.kv_head + 1]
        together = [head] if cfg.granularity == "head" else pair
        best, best_score = -1, 1.0
        for c in self.stored[-cfg.entries :]:
            old = p + 1 - cfg.band
            size = min(cfg.anchors, max(1, old // 6))
            if cfg.anchors and p - c + cfg.band + size > (p + 1) // 2:
                continue
            if c < p - cfg.window or self.depth[c][g] >= (cfg.max_reuse_depth or math.inf):
                continue
            total = 0.0
            for i in together:
                now, then = (self.chain.q_match[t, 0, i].tolist() for t in (p, c))
                square = sum((x - y) ** 2 for x, y in zip(now, then, strict=True))
                if cfg.threshold_mode == "absolute":
                    total += square / (2 * 16 * (1 - numbers[i]) ** 2)
                else:
                    total += square / (numbers[i] * sum(x**2 for x in now))
            if total / len(together) <= best_score and total / len(together) < 1:
                best, best_score = c, total / len(together)
        return best


@pytest.mark.parametrize("name", ALGEBRA)
def test_chain_equals_attention_with_inherited_logits(name):
    cfg = small_config(**ALGEBRA[name])
    chain = ReferenceChain(cfg, steps=110)
    slow = [Slow(cfg, chain, head) for head in range(2)]
    for p in range(110):
        step = chain.step(p)
        for head, one in enumerate(slow):
            values = chain.kv.v[0, : p + 1, head].double()
            sources, weights = one.step(p)
            assert step.source[0, one.heads].tolist() == sources
            total = weights.sum(-1)
            close(step.out[0, one.heads], weights @ values / total[:, None])
            close(step.lse[0, one.heads], total.log())
            ring = chain.reuse.entries(0, head)
            assert list(ring) == one.stored[-cfg.entries :][::-1]
            assert step.heads[0][head].stored == (p in ring)
            if p in ring:
                check_entry(ring[p], one, p, values)
    possible, hits = 4 * 110, sum(one.hits for one in slow)
    assert 0.04 * possible < hits < 0.95 * possible, hits


def check_entry(entry: reference.Entry, one: Slow, p: int, values: Tensor) -> None:
    """The state over `[0, E(p))`, and the sample."""
    assert entry.depth.tolist() == one.depth[p]
    sample = one.samples[p]
    assert entry.anchors.tolist() == sorted(sample)
    close(entry.weights, torch.tensor([sample[i] for i in sorted(sample)], dtype=torch.float64))
    weights = one.weights[p][:, : p + 1 - one.cfg.band]
    close(entry.lse, weights.sum(-1).log())
    close(entry.out, weights @ values[: weights.shape[1]] / weights.sum(-1, keepdim=True))


# --- seed ---------------------------------------------------------------------------------------


def seed_chain(chain, begin, end, **options):
    reference.seed(
        chain.reuse,
        chain.q[begin:end].transpose(0, 1),
        chain.kv.cache,
        chain.kv.table([end] * chain.batch),
        torch.tensor([end] * chain.batch),
        slots=torch.arange(chain.batch),
        q_match=chain.q_match[begin:end].transpose(0, 1),
        **options,
    )


def test_seed_without_anchors_equals_decoding_the_same_queries_exactly():
    cfg = small_config(threshold=0.0)
    seeded, decoded = (ReferenceChain(cfg, steps=60, batch=2) for _ in range(2))
    seed_chain(seeded, 28, 60)
    decoded.run(28, 60)
    for slot in range(2):
        ours, theirs = seeded.reuse.slots[slot], decoded.reuse.slots[slot]
        assert (ours.end, ours.request) == (theirs.end, theirs.request) == (60, -1)
        for head in range(2):
            close(ours.rings[head].last_lse, theirs.rings[head].last_lse)
            ring, other = (r.entries(slot, head) for r in (seeded.reuse, decoded.reuse))
            assert list(ring) == list(other) == list(range(59, 27, -1))
            for entry, twin in zip(ring.values(), other.values(), strict=True):
                assert torch.equal(entry.query, twin.query)
                assert torch.equal(entry.depth, twin.depth)
                close(entry.out, twin.out)
                close(entry.lse, twin.lse)


def test_seed_draws_each_sample_by_the_step_before():
    """The first by its own log-sum-exp; what they keep is steered as in decoding."""
    chain = ReferenceChain(small_config(anchors=4, entries=48, window=48), steps=64)
    seed_chain(chain, 10, 58)
    for head in range(2):
        slow = Slow(chain.reuse.cfg, chain, head)
        slow.lse = slow.fresh(10).exp().sum(-1).log()
        for c in range(10, 58):
            logits = slow.fresh(c)
            sample = slow.sample(c, logits)
            slow.lse = logits.exp().sum(-1).log()
            ring = chain.reuse.entries(0, head)
            assert (c in ring) == (sample is not None)
            if sample is not None:
                assert ring[c].anchors.tolist() == sorted(sample)
                close(
                    ring[c].weights,
                    torch.tensor([sample[i] for i in sorted(sample)], dtype=torch.float64),
                )
        assert chain.reuse.slots[0].rings[head].tau == pytest.approx(slow.tau)
    step = chain.step(58, q_match=make_q(9, 1, 4, 16))  # a miss, steered by that
    assert step.heads[0][0].stored


def test_seed_of_more_queries_than_entries_takes_every_kth():
    chain = ReferenceChain(small_config(entries=10, window=60), steps=60)
    seed_chain(chain, 15, 60)  # 45 queries: every fifth
    assert list(chain.reuse.entries(0)) == list(range(59, 15, -5))
    assert chain.reuse.slots[0].end == 60


def test_seed_continues_an_unbroken_history():
    chain = ReferenceChain(small_config(), steps=80)
    chain.run(0, 40, request_ids=[3])
    seed_chain(chain, 40, 50, request_ids=[3])
    assert chain.reuse.slots[0].end == 50
    assert list(chain.reuse.entries(0)) == list(range(49, 17, -1))
    assert len(chain.step(50, request_ids=[3]).heads[0][0].candidates[0]) == 32
    seed_chain(chain, 55, 60, request_ids=[3])  # a gap
    assert list(chain.reuse.entries(0)) == list(range(59, 54, -1))
    seed_chain(chain, 60, 62, request_ids=[4])  # another request
    assert list(chain.reuse.entries(0)) == [61, 60]
