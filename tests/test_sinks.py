"""Attention sinks: a learned logit of each head; over shapes in test_decode_reference.py."""

from __future__ import annotations

import math

import pytest
import torch
from cases import make_kv, make_q, small_config
from compare import out_tolerance, state_tolerance
from op_steps import BATCH, HEADS, KV_HEADS, make_reuse, make_step, slots_on, snapshot, two_steps
from test_decode_reference import DTYPES, OneRequest, chain, check_exact, make_sinks

import mac_attn


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_in_the_layout_of_gpt_oss(dtype, device):
    """64 query heads and 8 KV heads of 64."""
    check_exact(
        seed=530,
        lengths=[1, 129, 700],
        heads=(64, 8),
        head_dim=64,
        dtype=dtype,
        device=device,
        softmax={"sinks": make_sinks(64, device)},
    )


@pytest.mark.parametrize("anchors", [0, 5])
def test_reuse_with_float8(anchors, device):
    softmax = {"sinks": make_sinks(4, device)}
    config = small_config(anchors=anchors)
    chain(config, device=device, softmax=softmax, float8="per head", seed=21)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reuse_in_the_layout_of_gpt_oss(dtype, device):
    chain(
        small_config(anchors=6),
        device=device,
        steps=50,
        heads=(64, 8),
        dtype=dtype,
        softmax={"sinks": make_sinks(64, device)},
        seed=22,
    )


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("anchors", [0, 5])
def test_rings_do_not_depend_on_sinks(anchors, tokens, device):
    """Bit for bit: entries, the log-sum-exps that samples are weighed by, and decisions."""
    states = []
    for sinks in (None, make_sinks(HEADS, device)):
        torch.manual_seed(3)
        reuse = make_reuse(device, torch.bfloat16, anchors=anchors)
        q, kv, table, lens = make_step(device, torch.bfloat16)
        q_match = q
        for i in range(6):
            q_match = torch.randn_like(q) if i % 2 == 0 else q_match
            queries = (q, q_match)
            if tokens > 1:
                queries = tuple(x[:, None].expand(-1, tokens, -1, -1) for x in queries)
            options = {} if sinks is None else {"sinks": sinks}
            mac_attn.decode(
                queries[0], kv, table, lens + i + tokens - 1, reuse=reuse, slots=slots_on(device),
                q_match=queries[1], **options,
            )  # fmt: skip
        assert reuse.stats().hit_rate > 0
        states.append(snapshot(reuse))
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b)


def test_seeded_entries_serve_steps_with_sinks(device):
    case = OneRequest(small_config(anchors=5), device)
    last = slice(48, 70)
    call = (case.q[last].transpose(0, 1), case.kv.cache, case.kv.table([70]), case.ints(70))
    rows = {"slots": case.ints(1), "q_match": case.q_match[last].transpose(0, 1)}
    case.twins.seed(*call, **rows)
    sinks = make_sinks(4, device)
    for p in range(70, 100):
        case.twins.decode(case.kv, [p + 1], case.q[p], case.q_match[p], [1], sinks=sinks)
    assert 0 < case.twins.hit_rate < 1


def test_what_sinks_are(device):
    """Beside softmax with one more column; none and a huge one."""
    kv = make_kv(1, batch=1, length=50, num_kv_heads=1, head_dim=64, device=device)
    kv.write([0], [50])
    q = make_q(2, 1, 4, 64, device=device)
    lens = torch.tensor([50], dtype=torch.int32, device=device)
    sinks = torch.tensor([0.5, -math.inf, 40.0, -3.0], device=device)
    out, lse = mac_attn.decode(q, kv.cache, kv.table([50]), lens, sinks=sinks, return_lse=True)
    logits = (q[0].double() @ kv.k[0, :, 0].double().T) / 8
    logits = torch.cat([logits, sinks[:, None].double()], dim=1)
    want = logits.softmax(-1)[:, :-1] @ kv.v[0, :, 0].double()
    out_tolerance(q.dtype, device).check(out[0], want, "out")
    state_tolerance(q.dtype, device).check(lse[0], logits.logsumexp(-1), "lse")
    plain = mac_attn.decode(q, kv.cache, kv.table([50]), lens)
    assert torch.equal(out[0, 1], plain[0, 1])
    assert out[0, 2].abs().max() < 1e-12


def test_stages_and_audit_know_sinks(device):
    reuse = make_reuse(device, threshold=0.0)
    reuse.audit(every=1)
    q, kv, table, lens, q_match = two_steps(reuse, device)
    sinks = make_sinks(HEADS, device)
    out = mac_attn.decode(
        q, kv, table, lens, reuse=reuse, slots=slots_on(device), q_match=q_match, sinks=sinks
    )
    tolerance = out_tolerance(q.dtype, device, 2)
    # Nothing hits: it is exact, with the sinks.
    limit = 1e-5 if q.dtype == torch.float32 else tolerance.absolute + tolerance.relative
    assert reuse.audited().max_error.max() < limit
    amended = mac_attn.amend(q, kv, table, lens)
    alone, _ = mac_attn.complete(amended, lens, dtype=q.dtype, sinks=sinks)
    tolerance.check(alone, out, "out")


def test_the_step_compiles(device):
    q, kv, table, lens = make_step(device, torch.bfloat16)
    sinks = make_sinks(HEADS, device)
    torch.compiler.reset()
    step = torch.compile(mac_attn.decode, fullgraph=True, backend="aot_eager")
    got = step(q, kv, table, lens, sinks=sinks)
    assert torch.equal(got, mac_attn.decode(q, kv, table, lens, sinks=sinks))


def bad_sinks(device) -> dict[str, tuple[object, type[Exception], str]]:
    ones = torch.ones(HEADS, device=device)
    cases: dict[str, tuple[object, type[Exception], str]] = {
        "of another length": (ones[:-1], ValueError, "sinks has shape"),
        "of the KV heads": (ones[:KV_HEADS], ValueError, "sinks has shape"),
        "2-d": (ones[None], ValueError, "sinks has shape"),
        "a number": (1.0, TypeError, "sinks is of type float"),
        "bfloat16": (ones.bfloat16(), TypeError, "sinks is torch.bfloat16|sinks is BFloat16"),
        "strided": (torch.ones(2 * HEADS, device=device)[::2], ValueError, "sinks has stride"),
        "elsewhere": (ones.to("meta"), ValueError, "sinks is on meta|must be on one device"),
    }
    if device.type == "cpu":  # values on a GPU are not read back
        for bad in (math.nan, math.inf):
            values = ones.clone()
            values[3] = bad
            cases[f"one of {bad}"] = (values, ValueError, r"sinks\[3\] is ")
    return cases


@pytest.mark.parametrize("reuses", [False, True])
@pytest.mark.parametrize("name", bad_sinks(torch.device("cpu")))
def test_bad_sinks_are_named_and_nothing_is_written(name, reuses, device):
    if name not in bad_sinks(device):
        pytest.skip("values on a GPU are not read back")
    sinks, error, text = bad_sinks(device)[name]
    reuse = make_reuse(device)
    q, kv, table, lens, q_match = two_steps(reuse, device)
    before, out = snapshot(reuse), torch.full_like(q, 7)
    options = dict(reuse=reuse, slots=slots_on(device), q_match=q_match) if reuses else {}
    with pytest.raises(error, match=text):
        mac_attn.decode(q, kv, table, lens, sinks=sinks, out=out, **options)
    assert (out == 7).all()
    for a, b in zip(before, snapshot(reuse), strict=True):
        assert torch.equal(a, b)


def test_a_nan_sink_on_a_gpu_is_nan_in_its_head(cuda):
    q, kv, table, lens = make_step(cuda, torch.bfloat16)
    reuse = make_reuse(cuda, torch.bfloat16)
    sinks = torch.zeros(HEADS, device=cuda)
    sinks[2] = math.nan
    for i in range(3):
        out = mac_attn.decode(
            q, kv, table, lens + i, reuse=reuse, slots=slots_on(cuda), q_match=q, sinks=sinks
        )
        finite = out.isfinite().all(-1)
        assert not finite[:, 2].any() and finite.sum() == BATCH * (HEADS - 1)
    # Nothing of it stays in the rings.
    out = mac_attn.decode(q, kv, table, lens + 3, reuse=reuse, slots=slots_on(cuda), q_match=q)
    assert out.isfinite().all()
