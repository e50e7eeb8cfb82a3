"""Steps of several query tokens, as speculative decoding has them to verify its drafts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import make_kv, make_q, one_thread, plain_dtype, random_walk, small_config
from compare import Twins, out_tolerance, state_tolerance
from test_decode_reference import DTYPES, EACH_DTYPE, FORMS, form_options

import mac_attn
from mac_attn import reference
from mac_attn.stats import COUNTERS


def ints(values: list[int], device: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("options", [{}, {"float8": "per head"}, {"strided": True}], ids=str)
@pytest.mark.parametrize(
    ("tokens", "group", "head_dim", "page_size"),
    [
        (1, 4, 64, 16),
        (2, 3, 80, 7),
        (4, 4, 128, 16),
        (5, 1, 64, 1),
        (7, 4, 128, 64),
        (16, 5, 64, 16),
    ]
    + [(4, 2, 256, 16), (3, 20, 96, 16), (4, 3, 512, 16)],
)
def test_exact(tokens, group, head_dim, page_size, options, device):
    """Ragged, with padding rows, with and without sinks; each query attends up to itself."""
    at = tokens + group
    dtype, layout = EACH_DTYPE[at % 3] or plain_dtype(device), "HND" if at % 2 else "NHD"
    lengths = [tokens, tokens + 1, 0, 63, 64, 65, 130 + tokens]
    query_lens = [tokens, max(1, tokens - 1), 5, 1, tokens, (tokens + 1) // 2, tokens]
    batch = len(lengths)
    kv = make_kv(
        at, batch=batch, length=max(lengths), num_kv_heads=2, head_dim=head_dim, dtype=dtype,
        page_size=page_size, layout=layout, device=device, **options,
    )  # fmt: skip
    kv.write([0] * batch, lengths)
    q = make_q(
        at + 1,
        batch,
        tokens,
        2 * group,
        head_dim,
        dtype=dtype,
        device=device,
        strided=bool(options),
    )
    call = (q, kv.cache, kv.table(lengths), ints(lengths, device))
    ragged = {"query_lens": ints(query_lens, device), "kv_layout": layout, **kv.scales}
    sinks = torch.randn(2 * group, generator=torch.Generator().manual_seed(at)).to(device)
    for rows in (ragged, ragged | {"sinks": sinks}, ragged | {"query_lens": None}):
        if rows["query_lens"] is None:  # all of a short request's tokens would be too many
            call = (*call[:3], ints([n if n >= tokens else 0 for n in lengths], device))
        out, lse = mac_attn.decode(*call, **rows, return_lse=True)
        with one_thread():
            want = reference.decode(*call, **rows)
        assert out.shape == q.shape and lse.shape == q.shape[:3]
        out_tolerance(dtype, device).check(out, want.out, "out")
        state_tolerance(dtype, device).check(lse, want.lse, "lse")
        assert not out[lse == -torch.inf].any()
    into = torch.empty(batch, 2 * group, tokens, head_dim, dtype=dtype, device=device)
    got = mac_attn.decode(*call, **rows, out=into.transpose(1, 2))
    assert torch.equal(got, out) and torch.equal(into.transpose(1, 2), out)


class Draft:
    """Requests whose steps verify some drafts, of which some are rejected."""

    def __init__(
        self,
        device: Any,
        cfg: mac_attn.ReuseConfig,
        tokens: int,
        *,
        dtype: torch.dtype | None = None,
        float8: str = "",
        softmax: dict[str, Any] | None = None,
        head_dim: int = 64,
        **walk: Any,
    ) -> None:
        self.steps, self.tokens, self.device = 150 + 54 * tokens, tokens, device
        self.dtype, self.softmax = dtype or plain_dtype(device), softmax or {}
        self.heads, self.dim, self.batch = (4, 2), head_dim, 3
        kind = {"dtype": self.dtype, "device": device}
        self.kv = make_kv(
            3, batch=self.batch, length=self.steps, num_kv_heads=2, head_dim=self.dim,
            float8=float8, **kind,
        )  # fmt: skip
        self.q = make_q(4, self.steps, self.batch, 4, self.dim, **kind)
        self.q_match = random_walk(5, self.steps, self.batch, 2, 2, self.dim, **walk, **kind)
        self.twins = Twins(cfg, num_slots=4, heads=self.heads, head_dim=self.dim, **kind)

    def step(
        self,
        begin: list[int],
        query_lens: list[int],
        *,
        wide: bool = True,
        slots: list[int] | None = None,
        **options: Any,
    ) -> Any:
        """Queries of the positions from `begin[b]` on, of a row of 0 none; without `wide` of one
        each, as ever."""
        end = [b + n for b, n in zip(begin, query_lens, strict=True)]
        self.kv.write(begin, end)
        rows = torch.arange(self.batch, device=self.device)

        def some(x: torch.Tensor) -> torch.Tensor:
            at = torch.tensor(begin, device=self.device)[:, None]
            at = (at + torch.arange(self.tokens, device=self.device)).clamp(max=self.steps - 1)
            return x[at, rows[:, None]] if wide else x[at[:, 0], rows]

        lengths = [e if n else 0 for e, n in zip(end, query_lens, strict=True)]
        if wide:
            options |= {"query_lens": query_lens}
        return self.twins.decode(
            self.kv, lengths, some(self.q), some(self.q_match), slots or [2, 0, 3],
            **self.softmax, **options,
        )  # fmt: skip


CONFIGS: dict[str, dict[str, Any]] = {
    "anchors": dict(anchors=4, band=4),
    "anchors, drift": dict(anchors=3, band=5, max_drift=3.0),
    "few entries": dict(anchors=4, band=4, entries=5, window=60),
    "group": dict(),
    "head": dict(granularity="head", max_reuse_depth=1),
    "chains": dict(max_reuse_depth=3),
    "chains of heads": dict(granularity="head"),
}


@pytest.mark.parametrize("tokens", [2, 5, 16])
@pytest.mark.parametrize("name", CONFIGS)
def test_drafts_are_verified_and_rejected(name, tokens, device):
    """Each token by an entry of its own, or all of them exactly; the first is stored. Ragged, with
    rows of padding and without a slot, between steps of one token."""
    follow_drafts(Draft(device, small_config(threshold=0.3, **CONFIGS[name]), tokens, **NEAR))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["anchors", "head"])
def test_drafts_over_dtypes(name, dtype, form, device):
    if device.type == "cuda" and dtype == torch.float32 and form == "float8":
        pytest.skip("a float8 cache is of 16-bit queries on a GPU")
    cfg = small_config(threshold=0.3, **CONFIGS[name])
    follow_drafts(Draft(device, cfg, 4, dtype=dtype, **form_options(form, 0, 4, device), **NEAR))


@pytest.mark.parametrize("tokens", [4, 5])
@pytest.mark.parametrize("name", ["anchors", "head"])
def test_drafts_of_the_largest_heads(name, tokens, device):
    """A GPU reads a miss's tokens for eight queries at a time: once for 4 tokens, twice for 5."""
    cfg = small_config(threshold=0.3, **CONFIGS[name])
    follow_drafts(Draft(device, cfg, tokens, head_dim=512, **NEAR))


# Of the walk: all of a step's tokens may hit, each on another entry.
NEAR = {"step": 0.1, "jump": 0.02, "revisit": 0.8, "reach": 20}


def follow_drafts(draft: Draft) -> None:
    """Steps beside the reference, until it is sure that all that can happen has."""
    tokens, generator = draft.tokens, torch.Generator().manual_seed(draft.tokens)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    # With anchors all of a step's tokens may read no more than half of the context.
    first = 24 * tokens if draft.twins.cache.cfg.anchors else 0
    at, hits, misses, differ, alone = [40 + first, 33 + first, 20 + first], 0, 0, 0, 0
    draft.kv.write([0] * 3, at)
    for i in range(50):
        wide = i % 3 > 0
        lens = [draw(1, tokens) if wide else 1 for _ in at]
        slots = [2, 0, 3]
        if i % 7 == 4:
            lens[draw(0, 2)] = 0
        if i % 7 == 6:
            slots[draw(0, 2)] = -1
        step = draft.step(at, lens, wide=wide, slots=slots)
        for head in (head for row in step.heads for head in row if wide and len(head.source) > 1):
            hit = head.source >= 0
            hits += int(hit.all())
            misses += int(not hit.any())
            differ += int((head.source != head.source[0]).any())
            near = torch.stack([(s < 1).any(-1) for s in head.scores])
            assert torch.equal(hit.any(0), near.all(0))
            alone += int((near.any(0) & ~near.all(0)).any())
        at = [b + min(n, draw(1, tokens)) for b, n in zip(at, lens, strict=True)]
        if max(at) + tokens >= draft.steps:
            break
    assert min(hits, misses, differ, alone) >= 3, (hits, misses, differ, alone)
    stored = draft.twins.cache.counters[:, COUNTERS.index("entries_stored")]
    assert (stored > 5).sum() == 3


def test_where_a_history_goes_on(device):
    """After the first token or any other of the last step; elsewhere it begins anew."""
    for gap, goes_on in ((0, True), (2, True), (3, True), (-1, False), (4, False)):
        draft = Draft(device, small_config(anchors=8, threshold=0.0), 4)
        draft.kv.write([0] * 3, [70] * 3)
        for n in range(50, 56):
            draft.step([n] * 3, [1] * 3, wide=False)
        draft.step([56] * 3, [4] * 3)
        before = draft.twins.cache.ring_stored[2, 0].item()
        assert before == 6  # all miss; the first step has no log-sum-exp to sample by
        draft.step([57 + gap] * 3, [1] * 3, wide=False)
        assert (draft.twins.cache.ring_stored[2, 0].item() > 1) == goes_on


def test_truncate_and_fork(device):
    draft = Draft(device, small_config(anchors=8), 4)
    draft.kv.write([0] * 3, [60] * 3)
    draft.step([56] * 3, [4] * 3)
    for ring in (draft.twins.cache, draft.twins.reference):
        ring.truncate([2, 0], [58, 56])
        ring.fork([3], [1])
    ends = [draft.twins.cache.slot_end.tolist(), draft.twins.cache.slot_reach.tolist()]
    assert ends == [[56, 57, 57, 57], [56, 60, 58, 60]]
    draft.step([58, 56, 59], [2, 4, 1])


def test_queries_are_turned_back(device):
    """Without `q_match` each token's query is turned back by its own position."""
    rotary = mac_attn.RotaryEmbedding(1e4 ** (-torch.arange(0, 64, 2, device=device) / 64))
    results = []
    for given in (True, False):
        draft = Draft(device, small_config(anchors=2, band=2, threshold=0.3), 4)
        cache = mac_attn.ReuseCache(
            draft.twins.cache.cfg, num_slots=4, num_qo_heads=4, num_kv_heads=2, head_dim=64,
            dtype=draft.dtype, device=device, rotary=rotary,
        )  # fmt: skip
        lens, kind = torch.tensor([4, 2, 1]), {"dtype": draft.dtype, "device": device}
        walk = random_walk(9, 30, 3, 2, 2, 64, step=0.1, jump=0.0, **kind)
        outs = []
        for at in range(50, 70):
            draft.kv.write([0] * 3, [at + 4] * 3)
            positions = at + torch.arange(4).expand(3, 4)
            pre_rope = walk[at - 50 : at - 46].transpose(0, 1)
            q = mac_attn.rotate(pre_rope, positions.to(device), rotary)
            # Such strides as a fused projection's output has.
            q = torch.cat([q, q], dim=-2)[..., :4, :]
            flat = mac_attn.unrotate(q.flatten(0, 1), positions.int().flatten().to(device), rotary)
            outs += mac_attn.decode(
                q, draft.kv.cache, draft.kv.table([at + 4] * 3), ints((at + lens).tolist(), device),
                query_lens=lens.int().to(device), reuse=cache, slots=ints([2, 0, 3], device),
                q_match=flat.view(q.shape) if given else None, return_lse=True,
            )  # fmt: skip
        assert cache.stats().hit_rate > 0.3
        results.append([*outs, cache.ring])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"q": (3, 0, 4, 64)}, r"q(_match)? has 0 tokens, must have from 1 to 16"),
    (
        {"q": (3, 1 + mac_attn.MAX_QUERY_TOKENS, 4, 64)},
        rf"q(_match)? has 17 tokens, must have from 1 to {mac_attn.MAX_QUERY_TOKENS}",
    ),
    ({"query_lens": [4, 0, 4]}, r"query_lens\[1\] is 0, must be from 1 to 4"),
    ({"query_lens": [4, 4, 5]}, r"query_lens\[2\] is 5, must be from 1 to 4"),
    ({"seq_lens": [50, 50, 3]}, r"seq_lens\[2\] is 3, must be 0 or at least the query tokens, 4"),
    ({"query_lens": [4, 4]}, r"query_lens has shape \[2\]"),
    ({"query_lens": torch.ones(3, dtype=torch.int64)}, r"query_lens is"),
    ({"q_match": (3, 4, 64)}, r"q_match has shape \[3, 4, 64\]|q has shape \[3, 4, 4, 64\]"),
    ({"out": (3, 4, 64)}, r"out has shape \[3, 4, 64\]"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
@pytest.mark.parametrize("with_reuse", [False, True])
def test_refuses_bad_arguments_and_writes_nothing(wrong, message, with_reuse):
    if "q_match" in wrong and not with_reuse:
        return
    draft = Draft(torch.device("cpu"), small_config(anchors=8), 4)
    draft.kv.write([0] * 3, [50] * 3)
    shape = wrong.get("q", (3, 4, 4, 64))
    q = torch.randn(shape)
    out = torch.full(wrong.get("out", shape), 7.0)
    call: dict[str, Any] = {"query_lens": [4, 2, 4], "seq_lens": [50] * 3} | wrong
    for name in ("query_lens", "seq_lens"):
        if isinstance(call[name], list):
            call[name] = ints(call[name], "cpu")
    reuse: dict[str, Any] = {}
    if with_reuse:
        q_match = torch.randn(wrong.get("q_match", shape))
        reuse = {"reuse": draft.twins.cache, "slots": ints([2, 0, 3], "cpu"), "q_match": q_match}
    before = draft.twins.cache.ring.clone()
    with pytest.raises((ValueError, TypeError), match=message):
        mac_attn.decode(
            q, draft.kv.cache, draft.kv.table([50] * 3), call["seq_lens"],
            query_lens=call["query_lens"], out=out, **reuse,
        )  # fmt: skip
    assert (out == 7).all() and torch.equal(draft.twins.cache.ring, before)
