"""Match among hundreds of entries that are all near enough, of which its blocks find better ones
at the same time.
"""

import pytest
import torch
from cases import make_kv, make_q

import mac_attn
from mac_attn import ops

BATCH, HEADS, LENGTH, ENTRIES = 2, (16, 2), 340, 300


@pytest.mark.parametrize("granularity", ["head", "group"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_nearest_of_many(head_dim, granularity, device):
    """Independent queries are at twice the squared length of one, so within a threshold of 4."""
    options = dict(head_dim=head_dim, dtype=torch.bfloat16, device=device)
    config = mac_attn.ReuseConfig(
        entries=ENTRIES,
        window=ENTRIES,
        band=8,
        anchors=0,
        threshold=4.0,
        max_drift=None,
        granularity=granularity,
        min_context=0,
    )
    cache = mac_attn.ReuseCache(
        config, num_slots=BATCH, num_qo_heads=HEADS[0], num_kv_heads=HEADS[1], **options
    )
    kv = make_kv(1, batch=BATCH, length=LENGTH, num_kv_heads=HEADS[1], **options)
    lengths = [LENGTH - 1] * BATCH
    kv.write([0] * BATCH, lengths)
    q = make_q(2, ENTRIES, BATCH, HEADS[0], head_dim, dtype=torch.bfloat16, device=device)
    slots = torch.arange(BATCH, dtype=torch.int32, device=device)
    seq_lens = torch.full_like(slots, LENGTH - 1)
    table = kv.table(lengths)
    mac_attn.seed(
        cache, q.transpose(0, 1), kv.cache, table, seq_lens, slots=slots, q_match=q.transpose(0, 1)
    )
    entries = cache.ring_query.double()  # [B, H, M, G, D]
    place_of = cache.ring_position.long()  # [B, H, M]
    queries = make_q(3, 100, BATCH, HEADS[0], head_dim, dtype=torch.bfloat16, device=device)
    for query in queries:
        source = ops.match(cache, query, seq_lens + 1, slots).source.view(BATCH, HEADS[1], -1)
        now = query.double().view(BATCH, HEADS[1], 1, -1, head_dim)
        score = (now - entries).square().sum(-1) / (4 * now.square().sum(-1))  # [B, H, M, G]
        if granularity == "group":
            score = score.mean(-1, keepdim=True).expand_as(score)
        assert (score.amin(2) < 1).all()
        chosen = place_of[..., None] == source[:, :, None]
        assert (chosen.sum(2) == 1).all()
        # Two may be as near but for rounding.
        assert ((score * chosen).sum(2) <= score.amin(2) * (1 + 1e-5)).all()
