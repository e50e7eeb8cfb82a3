"""The reference's algebra by means that share nothing with it: loops, SDPA, effective logits."""

from __future__ import annotations

import math

import pytest
import torch
from cases import ReferenceChain, close, make_kv, make_q, small_config
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

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
    "anchors": dict(anchors=5),
    "more anchors than tokens at first": dict(anchors=40),
    "anchors and depth": dict(anchors=3, max_reuse_depth=4),
    "min_context": dict(min_context=60),
    "no band": dict(band=1),
    "window 1": dict(window=1),
    "band beyond the window": dict(window=8, band=20),
}


@pytest.mark.parametrize("name", ALGEBRA)
def test_chain_equals_attention_with_inherited_logits(name):
    """A step is softmax over the whole context in which a reused token keeps an old logit.

    So an entry is represented by one logit per token here, and neither states nor merges occur: on
    a hit a token below E(source) that is no anchor takes the source's logit, any other token that
    of the current query.
    """
    cfg = small_config(**ALGEBRA[name])
    chain = ReferenceChain(cfg, steps=110, batch=2)
    logits_of: list[dict[int, Tensor]] = [{}, {}]  # per slot: position -> [Hq, n]
    depth_of: list[dict[int, list[int]]] = [{}, {}]
    anchors_of: list[dict[int, list[Tensor]]] = [{}, {}]
    hits = 0
    for p in range(110):
        step = chain.step(p)
        for b in range(2):
            fresh = torch.stack(
                [
                    chain.kv.k[b, : p + 1, h // 2].double() @ chain.q[p, b, h].double() / 4.0
                    for h in range(4)
                ]
            )
            logits, entry = fresh.clone(), chain.reuse.entries(b)[p]
            depths = [0] * 4
            for h in range(4):
                c = brute_force_match(cfg, chain, depth_of[b], p, b, h)
                assert step.source[b, h] == c
                if c < 0:
                    continue
                hits += 1
                depths[h] = depth_of[b][c][h] + 1
                old = max(0, c + 1 - cfg.band)
                logits[h, :old] = logits_of[b][c][h, :old]
                anchors = anchors_of[b][c][h // 2]
                assert entry.anchors[h // 2].equal(anchors)
                logits[h, anchors] = fresh[h, anchors]
            logits_of[b][p], depth_of[b][p], anchors_of[b][p] = logits, depths, entry.anchors
            assert entry.depth.tolist() == depths
            values = chain.kv.v[b, : p + 1].double().repeat_interleave(2, dim=1)  # [n, Hq, D]
            close(step.out[b], torch.einsum("hn,nhd->hd", logits.softmax(-1), values))
            close(step.lse[b], logits.exp().sum(-1).log())
            # The carried state: the tokens below E(p) that are not anchors.
            for h in range(4):
                carried = set(range(max(0, p + 1 - cfg.band))) - set(entry.anchors[h // 2].tolist())
                at = torch.tensor(sorted(carried), dtype=torch.long)
                total = logits[h, at].exp().sum()
                close(entry.lse[h], total.log())
                weighted = logits[h, at].exp() @ values[at, h]
                close(entry.out[h], weighted / total if len(at) else torch.zeros(16))
    possible = 2 * 4 * 110
    assert 0.05 * possible < hits < 0.95 * possible, hits


def brute_force_match(cfg, chain, depths, p, b, h) -> int:
    """Matched position of query head h, found in a loop over positions; -1 is a miss."""
    if p + 1 < cfg.min_context:
        return -1
    numbers = torch.as_tensor(cfg.threshold).double().flatten().expand(4).tolist()
    together = [h] if cfg.granularity == "head" else [h // 2 * 2, h // 2 * 2 + 1]
    best, best_score = -1, 1.0
    for c in range(max(0, p - cfg.window), p):
        if c + 1 - cfg.band <= 0 or depths[c][h] >= (cfg.max_reuse_depth or math.inf):
            continue
        total = 0.0
        for i in together:
            now, then = chain.q_match[p, b, i].tolist(), chain.q_match[c, b, i].tolist()
            square = sum((x - y) ** 2 for x, y in zip(now, then, strict=True))
            if cfg.threshold_mode == "absolute":
                total += square / (2 * 16 * (1 - numbers[i]) ** 2)
            else:
                total += square / (numbers[i] * sum(x**2 for x in now))
        if total / len(together) < best_score:
            best, best_score = c, total / len(together)
    return best


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
    seed_chain(seeded, 32, 60)
    decoded.run(32, 60)
    for slot in range(2):
        ours, theirs = seeded.reuse.slots[slot], decoded.reuse.slots[slot]
        assert (ours.begin, ours.end) == (theirs.begin, theirs.end) == (32, 60)
        assert ours.ring.keys() == theirs.ring.keys()
        for at, entry in ours.ring.items():
            assert entry.position == theirs.ring[at].position
            assert torch.equal(entry.query, theirs.ring[at].query)
            assert torch.equal(entry.depth, theirs.ring[at].depth)
            close(entry.out, theirs.ring[at].out)
            close(entry.lse, theirs.ring[at].lse)


def test_seed_with_anchors_is_masked_attention():
    chain = ReferenceChain(small_config(anchors=4, window=48), steps=64)
    seed_chain(chain, 24, 64)
    k, v = (x[0].transpose(0, 1).double() for x in (chain.kv.k, chain.kv.v))  # [Hkv, n, D]
    q = chain.q[24:64, 0].transpose(0, 1).double()  # [Hq, T, D]
    logits = q @ k.repeat_interleave(2, 0).transpose(1, 2) / 4.0
    position = torch.arange(24, 64)[:, None]
    causal = logits.masked_fill(torch.arange(64) > position, -torch.inf).softmax(-1)
    heaviest = causal[:, -32:].amax(1).unflatten(0, (2, 2)).amax(1)[:, : 64 - 16]  # [Hkv, E]
    for c, entry in chain.reuse.entries(0).items():
        for head in range(2):
            chosen = set(heaviest[head].topk(4).indices.tolist())
            kept = {i for i in chosen if i < c + 1 - 16}
            assert set(entry.anchors[head].tolist()) == kept
            mask = torch.arange(64) < c + 1 - 16
            mask[list(kept)] = False
            for h in (2 * head, 2 * head + 1):
                want = scaled_dot_product_attention(
                    q[None, h, c - 24, None], k[None, head], v[None, head], attn_mask=mask[None]
                )
                close(entry.out[h], want[0, 0])
                close(entry.lse[h], logits[h, c - 24, mask].exp().sum().log())
    assert chain.reuse.entries(0).keys() == set(range(24, 64))


def test_seed_continues_an_unbroken_history():
    chain = ReferenceChain(small_config(), steps=80)
    chain.run(0, 40, request_ids=[3])
    seed_chain(chain, 40, 50, request_ids=[3])
    assert (chain.reuse.slots[0].begin, chain.reuse.slots[0].end) == (0, 50)
    assert list(chain.reuse.entries(0)) == list(range(18, 50))
    assert len(chain.step(50, request_ids=[3]).candidates[0]) == 32
    seed_chain(chain, 55, 60, request_ids=[3])  # a gap
    assert (chain.reuse.slots[0].begin, chain.reuse.slots[0].end) == (55, 60)
    seed_chain(chain, 60, 62, request_ids=[4])  # another request
    assert list(chain.reuse.entries(0)) == [60, 61]
