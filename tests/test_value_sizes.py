"""Values of fewer elements than keys, as multi-head latent attention has them: 128 and 192."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import make_kv, make_q, one_thread, small_config
from compare import Twins, out_tolerance
from op_steps import HEAD_DIM, make_reuse, op_arguments, slots_on, snapshot, two_steps
from test_decode_reference import (
    DTYPES,
    EACH_DTYPE,
    FORMS,
    GROUPS,
    chain,
    check_exact,
    form_options,
)
from test_ops import OPS, overload
from test_seed import Case

import mac_attn
from mac_attn import reference

# Of keys and of values. Those of 512 are not served on CUDA.
SIZES = [(192, 128), (64, 32), (80, 64), (96, 16), (128, 64), (128, 120), (256, 128), (136, 72)]
SIZES += [(24, 8), (256, 248), (512, 256)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_exact(sizes, dtype, form, device):
    """Beside every row lies a NaN, which is what a kernel that reads beyond it would answer."""
    group = GROUPS[SIZES.index(sizes) % 5]
    check_exact(
        seed=900 + SIZES.index(sizes),
        lengths=[1, 33, 0, 150],
        heads=(2 * group, 2),
        head_dim=sizes[0],
        head_dim_v=sizes[1],
        page_size=7,
        layout="HND" if group == 3 else "NHD",
        dtype=dtype,
        device=device,
        strided=True,
        **form_options(form, 0, 2 * group, device),
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_reuse(sizes, form, device):
    at = SIZES.index(sizes) + FORMS.index(form)
    chain(
        small_config(anchors=6 * (at % 2)),
        device=device,
        heads=(2 * GROUPS[at % 4], 2),
        head_dim=sizes[0],
        head_dim_v=sizes[1],
        page_size=7,
        dtype=EACH_DTYPE[at % 3],
        strided=at % 3 > 0,
        seed=1203 if at == 3 else 970 + at,  # in bfloat16 973 has a rest of next to nothing
        **form_options(form, at, 2 * GROUPS[at % 4], device),
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", [{}, {"anchors": 30}, {"granularity": "head"}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reuse_with_192_and_128(dtype, config, form, device):
    chain(
        small_config(**config),
        device=device,
        steps=45,  # of 32 entries
        heads=(16, 2),
        head_dim=192,
        head_dim_v=128,
        dtype=dtype,
        seed=953,
        **form_options(form, 1, 16, device),
    )


@pytest.mark.parametrize("sizes", [(192, 128), (64, 40)], ids=str)
def test_several_query_tokens(sizes, device):
    """Verified drafts, ragged, the result into a tensor of the caller."""
    kind = {"head_dim": sizes[0], "head_dim_v": sizes[1], "device": device}
    kv = make_kv(3, batch=2, length=150, num_kv_heads=2, **kind)
    kv.write([0, 0], [150, 150])
    q = make_q(4, 2, 4, 6, sizes[0], device=device)
    lengths = torch.tensor([150, 77], dtype=torch.int32, device=device)
    some = {"query_lens": torch.tensor([4, 3], dtype=torch.int32, device=device)}
    call = (q, kv.cache, kv.table([150, 77]), lengths)
    into = torch.empty(2, 6, 4, sizes[1], dtype=q.dtype, device=device).transpose(1, 2)
    out = mac_attn.decode(*call, **some, out=into)
    assert out is into
    with one_thread():
        out_tolerance(q.dtype, device).check(out, reference.decode(*call, **some).out, "out")
    twins = Twins(small_config(), num_slots=2, heads=(6, 2), **kind)
    same = q[:, :1].expand_as(q)  # so that all but the first step hit
    for i in range(4):
        twins.decode(kv, [140 + i, 60 + i], q, same, slots=[1, 0], query_lens=[4, 3])
    assert 0 < twins.hit_rate < 1


def test_seeding_writes_the_same_entries_as_the_reference(device):
    case = Case([90, 41], 20, device, head_dim=64, head_dim_v=24)
    case.seed_both()
    assert case.cache.ring_out.shape[-1] == 24 and bool(case.cache.ring_stored.any())


@pytest.mark.parametrize("tokens", [None, 3])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, tokens, device):
    args = op_arguments(make_reuse(device, head_dim_v=24), device, tokens)[op]
    torch.library.opcheck(overload(op), args)


def test_a_cache_of_shorter_values(device):
    """Its views, its bytes, a copy, and slots that move to another one; an audit of it."""
    reuse, full = make_reuse(device, head_dim_v=40), make_reuse(device)
    assert reuse.head_dim_v == 40 and full.head_dim_v == HEAD_DIM
    assert reuse.ring_out.shape == (3, 2, 16, 3, 40) and reuse.ring_query.shape[-1] == HEAD_DIM
    # Of 2 KV heads and 16 entries: 3 heads of 64 float32, and of 40, brought to a multiple of 64.
    assert full.ring.shape[1] - reuse.ring.shape[1] == 2 * 16 * (768 - 512)
    assert "head_dim_v=40" in repr(reuse)
    reuse.audit(every=1)
    q, kv, table, seq_lens, q_match = two_steps(reuse, device)
    slots = slots_on(device)
    twin = copy.deepcopy(reuse)
    other = make_reuse(device, head_dim_v=40)
    other.import_slots(slots, reuse.export_slots(slots))
    outs = [
        mac_attn.decode(q, kv, table, seq_lens, reuse=cache, slots=slots, q_match=q_match)
        for cache in (reuse, twin, other)
    ]
    assert outs[0].shape == (*q.shape[:-1], 40)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    assert reuse.stats().hit_rate == 0.5
    report = reuse.audited()
    assert report.steps > 0 and report.mean_error < 0.1
    exact = mac_attn.decode(q, kv, table, seq_lens)
    amended = mac_attn.amend(q, kv, table, seq_lens)
    assert torch.equal(mac_attn.complete(amended, seq_lens, q=q, dtype=q.dtype)[0], exact)


def test_bad_sizes_are_named_and_nothing_is_written(device):
    reuse = make_reuse(device, head_dim_v=40)
    q, (k, v), table, seq_lens, q_match = two_steps(reuse, device)
    wide = v.new_empty(*v.shape[:-1], HEAD_DIM + 8)
    out = q.new_full((*q.shape[:-1], 40), 7.0)
    good = {"kv_cache": (k, v), "out": out}
    rings = {"reuse": reuse, "slots": slots_on(device), "q_match": q_match}
    before = snapshot(reuse)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"kv_cache": (k, wide)}, "v_cache has rows of 72, must have at most those of k_cache, 64"),
        ({"kv_cache": (k, v[:, :, :1])}, r"v_cache has shape .*, must be .* 2, head_dim_v\]"),
        ({"out": torch.empty_like(q)}, r"out has shape \[2, 6, 64\], must be \[2, 6, 40\]"),
    ]
    for with_reuse in (False, True):
        for change, message in cases:
            with pytest.raises(ValueError, match=message):
                options = rings if with_reuse else {}
                mac_attn.decode(q, block_table=table, seq_lens=seq_lens, **good | change, **options)
    with pytest.raises(
        ValueError, match="v_cache has head_dim_v 20, must be a multiple of 8 up to"
    ):
        mac_attn.decode(q, (k, v[..., :20]), table, seq_lens)
    for other in ((k, v[..., :32]), (k, k), torch.stack((k, k), 1)):
        with pytest.raises(ValueError, match=r"v_cache has shape .*, must be .*2, 40\]"):
            mac_attn.decode(q, other, table, seq_lens, **rings)
    matched = mac_attn.match(reuse, q_match, seq_lens, rings["slots"])
    step = {"matched": matched, "reuse": reuse, "slots": rings["slots"]}
    with pytest.raises(ValueError, match="v_cache has shape"):
        mac_attn.amend(q, (k, v[..., :32]), table, seq_lens, **step)
    amended = mac_attn.amend(q, (k, v), table, seq_lens, **step)
    with pytest.raises(ValueError, match="states has shape"):
        mac_attn.complete(amended, seq_lens, q=q, q_match=q_match, out=torch.empty_like(q), **step)
    prompt = q[:, None].contiguous()
    with pytest.raises(ValueError, match="v_cache has shape"):
        options = {"q_match": prompt, "slots": rings["slots"]}
        mac_attn.seed(reuse, prompt, (k, v[..., :32]), table, seq_lens, **options)
    for a, b in zip(snapshot(reuse), before, strict=True):
        assert torch.equal(a, b)
    assert (out == 7).all()


@pytest.mark.parametrize("bad", [0, 20, 72, 504])
def test_a_cache_refuses_other_sizes(bad):
    with pytest.raises(ValueError, match=f"head_dim_v is {bad}, must be"):
        make_reuse("cpu", head_dim_v=bad)


def check_refused_on_cuda(device: torch.device) -> None:
    """What the kernels of a GPU do not have, in the words that they refuse it with."""
    for sizes, float8, reason in (
        ((512, 256), "", "head_dim_v is 256, must be 512 as head_dim, which is more than 256,"),
        (
            (64, 24),
            "0-d",
            "v_cache has head_dim_v 24, must be a multiple of 16 with a float8 cache",
        ),
    ):
        options = dict(head_dim=sizes[0], head_dim_v=sizes[1], dtype=torch.bfloat16, device=device)
        kv = make_kv(1, batch=1, length=4, num_kv_heads=1, float8=float8, **options)
        q = make_q(2, 1, 2, sizes[0], dtype=torch.bfloat16, device=device)
        lengths = torch.tensor([4], dtype=torch.int32, device=device)
        with pytest.raises(ValueError, match=f"{reason} on CUDA"):
            mac_attn.decode(q, kv.cache, kv.table([4]), lengths, **kv.scales)


def test_refused_on_cuda(cuda):
    check_refused_on_cuda(cuda)
