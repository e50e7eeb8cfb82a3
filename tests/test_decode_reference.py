"""`mac_attn.decode` against the reference (and SDPA), over the shapes and layouts that go wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import make_kv, make_q, one_thread, plain_dtype, random_walk, small_config
from compare import Twins, check_ring, out_tolerance, state_tolerance
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import mac_attn
from mac_attn import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# For cases that take one each: None is `plain_dtype`.
EACH_DTYPE = [None, torch.bfloat16, torch.float16]
GROUPS = [1, 3, 5, 8, 32]
HEAD_DIMS = [64, 80, 96, 128, 256]
PAGE_SIZES = [1, 7, 16, 64]
BAND = 16
# Of keys and values as they are, of float8 ones, and with one more logit of each head.
FORMS = ["plain", "float8", "sinks"]


def make_sinks(heads: int, device: torch.device, seed: int = 0) -> Tensor:
    """From nothing to what outweighs some hundred tokens; one head has none."""
    sinks = 3 * torch.randn(heads, generator=torch.Generator().manual_seed(seed)) + 2
    sinks[heads // 2] = -math.inf
    return sinks.to(device)


def form_options(form: str, at: int, heads: int, device: torch.device) -> dict[str, Any]:
    """The options of `check_exact` and `chain` for a form; scales come in three shapes."""
    if form == "float8":
        return {"float8": ["per head", "0-d", "1-d"][at % 3]}
    return {"softmax": {"sinks": make_sinks(heads, device, at)}} if form == "sinks" else {}


def check_exact(
    *,
    seed: int,
    lengths: list[int],
    heads: tuple[int, int],
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
    strided: bool = False,
    softmax: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Exact decode of requests of the given lengths equals the reference and torch's SDPA."""
    softmax, dtype = softmax or {}, dtype or plain_dtype(device)
    kv = make_kv(
        seed,
        batch=len(lengths),
        length=max(lengths),
        num_kv_heads=heads[1],
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        strided=strided,
        **options,
    )
    kv.write([0] * len(lengths), lengths)
    shape = (len(lengths), heads[0], options.get("head_dim_v") or head_dim)
    q = make_q(seed + 1, *shape[:2], head_dim, dtype=dtype, device=device, strided=strided)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    call = (q, kv.cache, kv.table(lengths), seq_lens)
    cache = {"kv_layout": kv.layout, **kv.scales}
    out, lse = mac_attn.decode(*call, **cache, return_lse=True, **softmax)
    with one_thread():
        want = reference.decode(*call, **cache, **softmax)
    assert out.shape == shape and out.dtype == dtype and lse.dtype == torch.float32
    out_tolerance(dtype, device).check(out, want.out, "out")
    state_tolerance(dtype, device).check(lse, want.lse, "lse")
    if softmax.keys() & {"logits_soft_cap", "sinks"}:  # SDPA has none
        return
    for b, n in enumerate(lengths):
        if n:
            k, v = (x[b, :n].transpose(0, 1) for x in kv.double())
            row = scaled_dot_product_attention(
                q[b, :, None].double(), k, v, scale=softmax.get("sm_scale"), enable_gqa=True
            )
            out_tolerance(dtype, device).check(out[b], row[:, 0], f"out[{b}] beside SDPA")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group", GROUPS)
def test_exact_over_shapes(group, head_dim, form, device):
    # Every page size and dtype meets every group size and head_dim somewhere in this grid.
    at = GROUPS.index(group) * len(HEAD_DIMS) + HEAD_DIMS.index(head_dim)
    page_size, dtype = PAGE_SIZES[at % 4], EACH_DTYPE[at % 3]
    check_exact(
        seed=100 + at,
        lengths=[1, BAND, BAND + 1, 0, 2 * page_size, 2 * page_size + 1, 63, 150],
        heads=(2 * group, 2),
        head_dim=head_dim,
        page_size=page_size,
        layout="NHD" if at % 2 else "HND",
        dtype=dtype,
        device=device,
        **form_options(form, at // 2, 2 * group, device),
    )


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_over_layouts(dtype, layout, combined, strided, form, device):
    check_exact(
        seed=7,
        lengths=[1, 33, 14, 28],
        heads=(6, 2),
        head_dim=64,
        page_size=7,
        layout=layout,
        combined=combined,
        strided=strided,
        dtype=dtype,
        device=device,
        **form_options(form, 0, 6, device),
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softmax", [{"logits_soft_cap": 2.0}, {"sm_scale": 0.3}])
def test_exact_with_soft_cap_and_scale(softmax, dtype, form, device):
    """A sink is a logit as it is: neither scaled nor capped."""
    options = form_options(form, 1, 4, device)
    softmax = softmax | options.pop("softmax", {})
    check_exact(
        seed=9,
        lengths=[1, 33, 200],
        heads=(4, 2),
        head_dim=64,
        dtype=dtype,
        device=device,
        softmax=softmax,
        **options,
    )


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_at_100k_tokens(dtype, form, device):
    check_exact(
        seed=11,
        lengths=[100_000],
        heads=(3, 1),
        head_dim=64,
        page_size=64,
        dtype=dtype,
        device=device,
        **form_options(form, 2, 3, device),
    )


def test_exact_of_large_logits_does_not_overflow(device):
    check_exact(
        seed=12,
        lengths=[1, 300],
        heads=(4, 2),
        head_dim=64,
        device=device,
        # Logits of about ±300, far beyond exp's range in float32; they cost the tolerance nothing
        # here, because one token dominates. The lse's tolerance is relative.
        softmax={"sm_scale": 12.0},
    )


@pytest.mark.parametrize("with_reuse", [False, True])
def test_empty_batch(with_reuse, device):
    kv = make_kv(5, batch=1, length=4, num_kv_heads=2, head_dim=64, device=device)
    ints = torch.empty(0, dtype=torch.int32, device=device)
    q = torch.empty(0, 4, 64, dtype=plain_dtype(device), device=device)
    options = {}
    if with_reuse:
        twins = Twins(small_config(), num_slots=1, heads=(4, 2), head_dim=64, device=device)
        options = {"reuse": twins.cache, "slots": ints, "q_match": q}
    out, lse = mac_attn.decode(q, kv.cache, ints.view(0, 1), ints, return_lse=True, **options)
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


# --- with reuse ---------------------------------------------------------------------------------


def chain(
    cfg: mac_attn.ReuseConfig,
    *,
    device: torch.device,
    steps: int = 70,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    softmax: dict[str, Any] | None = None,
    **options: Any,
) -> Twins:
    """Decode three requests for `steps` steps from empty rings and compare everything each time.

    They start at different lengths, change places in the batch, and one of them pauses now and then
    (a padding row).
    """
    batch, first = 3, [1, 40, 17]
    kv = make_kv(
        seed,
        batch=batch,
        length=max(first) + steps,
        num_kv_heads=heads[1],
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        **options,
    )
    q = make_q(seed + 1, steps, batch, heads[0], head_dim, dtype=dtype, device=device)
    group = heads[0] // heads[1]
    q_match = random_walk(
        seed + 2, steps, batch, heads[1], group, head_dim, dtype=dtype, device=device
    )
    sizes = {"head_dim": head_dim, "head_dim_v": options.get("head_dim_v")}
    twins = Twins(cfg, num_slots=5, heads=heads, **sizes, dtype=dtype, device=device)
    lengths = [n - 1 for n in first]
    kv.write([0] * batch, lengths)
    generator = torch.Generator().manual_seed(seed)
    for t in range(steps):
        before, paused = list(lengths), t % 7 == 3
        lengths = [n + (b != 1 or not paused) for b, n in enumerate(lengths)]
        kv.write(before, lengths)
        twins.decode(
            kv,
            [0 if b == 1 and paused else n for b, n in enumerate(lengths)],
            q[t],
            q_match[t],
            slots=[4, 0, 2],
            order=torch.randperm(batch, generator=generator).tolist(),
            **(softmax or {}),
        )
    assert 0 < twins.hit_rate < 1
    return twins


CONFIGS = {
    "head": dict(granularity="head"),
    "head absolute": dict(granularity="head", threshold_mode="absolute", threshold=0.75),
    "group": dict(),
    "group absolute": dict(threshold_mode="absolute", threshold=0.75),
    "threshold per head": dict(granularity="head", threshold=[0.1, 0.2, 0.3, 0.15]),
    "group, threshold per head": dict(threshold=(0.1, 0.2, 0.3, 0.15)),
    "depth": dict(max_reuse_depth=2),
    "depth per head": dict(granularity="head", max_reuse_depth=3),
    "depth 1": dict(max_reuse_depth=1),
    "anchors": dict(anchors=5),
    "anchors, threshold per head": dict(anchors=5, threshold=(0.1, 0.2, 0.3, 0.15)),
    "one anchor": dict(anchors=1),
    "more anchors than tokens at first": dict(anchors=40),
    "more anchors than tokens ever": dict(anchors=300),
    "few entries, long window": dict(entries=5, window=60, anchors=8),
    "few entries, short window": dict(entries=7, window=10),
    "more entries than the window": dict(entries=50, window=10, anchors=3),
    "min_context": dict(min_context=60),
    "one entry": dict(entries=1),
    "one entry, anchors": dict(entries=1, anchors=4),
    "window 1": dict(window=1),
    "band 1": dict(band=1),
    "band 1, anchors": dict(band=1, anchors=6),
    "band beyond the window": dict(window=8, band=20, anchors=4),
}


# Of these also with float8 and sinks, whose rings hold neither.
FEW = ["anchors", "group", "head", "depth", "one entry, anchors", "band 1, anchors"]
FEW += ["more anchors than tokens ever"]


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, "plain") for name in CONFIGS] + [(name, form) for name in FEW for form in FORMS[1:]],
)
def test_reuse_over_options(name, form, device):
    seed = 22 if name == "one anchor" else 20  # in bfloat16 20 has a rest of next to nothing
    options = form_options(form, 0, 4, device)
    chain(small_config(**CONFIGS[name]), device=device, seed=seed, **options)


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("at", range(5))
def test_reuse_over_shapes(at, form, device):
    group, head_dim, page_size = GROUPS[at], HEAD_DIMS[(at + 2) % 5], PAGE_SIZES[at % 4]
    chain(
        small_config(anchors=6),
        device=device,
        heads=(2 * group, 2) if group < 32 else (32, 1),
        head_dim=head_dim,
        page_size=page_size,
        dtype=None if form == "plain" else EACH_DTYPE[(at + 1) % 3],
        seed=40 + at,
        **form_options(form, at, 2 * group, device),
    )


@pytest.mark.parametrize("head_dim, length, anchors", [(64, 12_000, 20), (512, 3_000, 300)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_anchors_of_a_long_context(dtype, head_dim, length, anchors, device):
    """Two misses, of which the first has nothing to weigh tokens by, and a hit."""
    heads, kind = (12, 2), {"head_dim": head_dim, "dtype": dtype, "device": device}
    kv = make_kv(60, batch=1, length=length + 3, num_kv_heads=heads[1], **kind)
    q = make_q(61, 3, 1, heads[0], head_dim, dtype=dtype, device=device)
    q_match = make_q(62, 2, 1, heads[0], head_dim, dtype=dtype, device=device)
    twins = Twins(small_config(anchors=anchors), num_slots=1, heads=heads, **kind)
    kv.write([0], [length])
    for i, matching in enumerate((q_match[0], q_match[1], q_match[1])):
        kv.write([length + i], [length + i + 1])
        step = twins.decode(kv, [length + i + 1], q[i], matching, slots=[0])
        assert [head.anchors for head in step.heads[0]] == [anchors * (i == 2)] * 2
        assert [head.stored for head in step.heads[0]] == [i == 1] * 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout, combined, strided", [("NHD", True, True), ("HND", False, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reuse_over_dtypes_and_layouts(dtype, layout, combined, strided, form, device):
    chain(
        small_config(anchors=6),
        device=device,
        heads=(6, 2),
        dtype=dtype,
        layout=layout,
        combined=combined,
        strided=strided,
        page_size=7,
        seed=60,
        **form_options(form, 0, 6, device),
    )


def test_reuse_with_soft_cap_and_scale(device):
    softmax = {"sm_scale": 0.2, "logits_soft_cap": 3.0}
    chain(small_config(anchors=6), device=device, softmax=softmax, seed=70)


class OneRequest:
    """Slots of one cache that follow copies of one sequence of tokens."""

    def __init__(
        self, cfg: mac_attn.ReuseConfig, device: torch.device, *, length: int = 120
    ) -> None:
        self.kv = make_kv(80, batch=1, length=length, num_kv_heads=2, head_dim=64, device=device)
        self.kv.write([0], [length])
        self.q = make_q(81, length, 1, 4, 64, device=device)
        self.q_match = random_walk(82, length, 1, 2, 2, 64, device=device)
        self.twins = Twins(cfg, num_slots=3, heads=(4, 2), head_dim=64, device=device)
        self.device = device

    def decode(self, positions: range, slot: int = 0, request: int | None = None) -> None:
        """Decode the given positions and compare the slot after each."""
        for p in positions:
            self.twins.decode(
                self.kv,
                [p + 1],
                self.q[p],
                self.q_match[p],
                [slot],
                request_ids=None if request is None else [request],
            )

    def ints(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def check(self) -> None:
        """Compare all slots."""
        for slot in range(3):
            check_ring(self.twins.cache, self.twins.reference, slot, self.twins.state)


def test_history_rule(device):
    case = OneRequest(small_config(anchors=3), device)
    case.decode(range(30, 60), request=7)
    case.decode(range(59, 80), request=7)  # the last token again: the slot starts anew
    case.decode(range(82, 90), request=7)  # a gap
    case.decode(range(90, 100), request=8)  # another request
    case.decode(range(100, 110))  # no ids
    assert 0 < case.twins.hit_rate < 1


def test_truncate_fork_reset(device):
    case = OneRequest(small_config(anchors=3), device)
    cache, twin = case.twins.cache, case.twins.reference
    case.decode(range(80))
    cache.fork(case.ints(0, 0), case.ints(2, 1))
    twin.fork([0, 0], [2, 1])
    case.check()
    case.decode(range(80, 90), slot=2)
    cache.truncate(case.ints(2, 0), case.ints(85, 60))
    twin.truncate([2, 0], [85, 60])
    case.check()
    case.decode(range(85, 100), slot=2)
    case.decode(range(60, 70), slot=0)
    cache.reset(case.ints(2))
    twin.reset([2])
    case.check()
    case.decode(range(90, 110), slot=2)
    cache.reset()
    twin.reset()
    case.check()
    assert 0 < case.twins.hit_rate < 1


@pytest.mark.parametrize("anchors", [0, 5])
def test_seed_then_decode(anchors, device):
    case = OneRequest(small_config(anchors=anchors), device)
    last = slice(48, 70)
    call = (
        case.q[last].transpose(0, 1),
        case.kv.cache,
        case.kv.table([70]),
        case.ints(70),
    )
    rows = {"slots": case.ints(1), "q_match": case.q_match[last].transpose(0, 1)}
    case.twins.seed(*call, **rows)
    case.check()
    case.decode(range(70, 110), slot=1)
    assert 0 < case.twins.hit_rate < 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("granularity", ["head", "group"])
def test_non_finite_query_is_a_miss_and_is_never_matched(granularity, bad, device):
    case = OneRequest(small_config(granularity=granularity), device)
    case.decode(range(60))
    case.q_match[60:70] = case.q_match[59].clone()  # all of them hit
    case.q_match[62, 0, 1, 5] = bad
    case.q_match[66, 0, 2, 63] = -bad
    case.decode(range(60, 75))


def test_hit_reads_nothing_below_the_source_but_the_anchors(device):
    case = OneRequest(small_config(anchors=3), device)
    case.decode(range(79))
    sources = [case.twins.reference.entries(0, head) for head in range(2)]
    for head, entries in enumerate(sources):
        newest = next(iter(entries.values()))
        heads = slice(2 * head, 2 * head + 2)
        case.q_match[79, :, heads] = case.q_match[newest.position, :, heads].clone()
        kept = newest.anchors.tolist()
        at = torch.tensor([i for i in range(newest.position + 1 - 16) if i not in kept])
        at = at.to(device)
        for pages in case.kv.cache:
            pages[case.kv.pages[0, at // 16], at % 16, head] = math.nan
    case.decode(range(79, 80))  # compares with the reference, which gathers but does not use them
    out = mac_attn.decode(case.q[79], case.kv.cache, case.kv.table([80]), case.ints(80))
    assert out.isnan().all()  # the poison is where exact attention reads
