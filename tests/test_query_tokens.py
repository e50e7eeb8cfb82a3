"""Steps of several query tokens, as speculative decoding has them to verify its drafts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import make_kv, make_q, one_thread, random_walk, small_config
from compare import Twins, out_tolerance, state_tolerance

import mac_attn
from mac_attn import reference
from mac_attn.stats import COUNTERS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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
    + [(4, 2, 256, 16), (3, 20, 96, 16)],
)
def test_exact(tokens, group, head_dim, page_size, options, device):
    """Ragged, with padding rows, with and without sinks; each query attends up to itself."""
    at = tokens + group
    dtype, layout = DTYPES[at % 3], "HND" if at % 2 else "NHD"
    if device.type == "cuda" and dtype == torch.float32:
        dtype = torch.bfloat16
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
    """A request whose steps verify some drafts, of which some are rejected."""

    def __init__(self, device: Any, cfg: mac_attn.ReuseConfig, tokens: int, **twins: Any) -> None:
        self.steps, self.tokens, self.device = 260, tokens, device
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.heads, self.dim, self.batch = (4, 2), 64, 3
        self.kv = make_kv(
            3, batch=self.batch, length=self.steps, num_kv_heads=2, head_dim=self.dim,
            dtype=self.dtype, device=device,
        )  # fmt: skip
        kind = {"dtype": self.dtype, "device": device}
        self.q = make_q(4, self.steps, self.batch, 4, self.dim, **kind)
        self.q_match = random_walk(5, self.steps, self.batch, 2, 2, self.dim, **kind)
        self.twins = Twins(cfg, num_slots=4, heads=self.heads, head_dim=self.dim, **kind, **twins)

    def step(self, begin: list[int], query_lens: list[int], wide: bool = True, **options: Any):
        """Queries of the positions from `begin[b]` on; without `wide` one of each, as ever."""
        end = [b + n for b, n in zip(begin, query_lens, strict=True)]
        self.kv.write(begin, end)
        rows = torch.arange(self.batch, device=self.device)

        def some(x: torch.Tensor) -> torch.Tensor:
            at = torch.tensor(begin, device=self.device)[:, None]
            at = (at + torch.arange(self.tokens, device=self.device)).clamp(max=self.steps - 1)
            return x[at, rows[:, None]] if wide else x[at[:, 0], rows]

        if wide:
            options |= {"query_lens": query_lens}
        return self.twins.decode(
            self.kv, end, some(self.q), some(self.q_match), [2, 0, 3], **options
        )


@pytest.mark.parametrize("tokens", [2, 5])
@pytest.mark.parametrize("anchors", [0, 8])
def test_drafts_are_verified_and_rejected(anchors, tokens, device):
    """Exact, stored by their first tokens, which later steps of one token then reuse."""
    draft = Draft(device, small_config(anchors=anchors, threshold=0.3), tokens)
    generator = torch.Generator().manual_seed(tokens)
    at, hits = [40, 33, 20], 0
    draft.kv.write([0] * 3, at)
    for i in range(36):
        wide = i % 3 > 0
        lens = torch.randint(1, tokens + 1, (3,), generator=generator).tolist() if wide else [1] * 3
        step = draft.step(at, lens, wide)
        hits += int((step.source >= 0).sum())
        assert not wide or (step.source == -1).all()
        kept = [int(torch.randint(1, n + 1, (), generator=generator)) for n in lens]
        at = [b + n for b, n in zip(at, kept, strict=True)]
    assert hits > 20
    stored = draft.twins.cache.counters[:, COUNTERS.index("entries_stored")]
    assert (stored > 10).sum() == 3


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
    """Without `q_match` the first token's query is turned back by its own position."""
    rotary = mac_attn.RotaryEmbedding(1e4 ** (-torch.arange(0, 64, 2, device=device) / 64))
    cfg = small_config(anchors=8)
    rings = []
    for given in (True, False):
        draft = Draft(device, cfg, 4)
        cache = mac_attn.ReuseCache(
            cfg, num_slots=4, num_qo_heads=4, num_kv_heads=2, head_dim=64, dtype=draft.dtype,
            device=device, rotary=rotary,
        )  # fmt: skip
        for begin in (50, 54):
            draft.kv.write([0] * 3, [begin + 4] * 3)
            q = draft.q[begin : begin + 4].transpose(0, 1)
            lens = [4, 2, 1]
            first = ints([begin + 4 - n for n in lens], device)
            q_match = q.clone()
            q_match[:, 0] = mac_attn.unrotate(q[:, 0], first, rotary)
            mac_attn.decode(
                q, draft.kv.cache, draft.kv.table([begin + 4] * 3), ints([begin + 4] * 3, device),
                query_lens=ints(lens, device), reuse=cache, slots=ints([2, 0, 3], device),
                q_match=q_match if given else None,
            )  # fmt: skip
        rings.append(cache.ring_query.clone())
    assert rings[0].any() and torch.equal(*rings)


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
