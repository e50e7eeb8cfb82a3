"""float8 KV caches: what test_decode_reference.py does not have of them, scales that go wrong."""

from __future__ import annotations

import math

import pytest
import torch
from cases import make_kv, make_q, small_config
from compare import Twins, check_ring
from op_steps import HEAD_DIM, KV_HEADS, make_reuse, make_step, slots_on, snapshot, two_steps
from test_decode_reference import DTYPES

import mac_attn

FLOAT8 = torch.float8_e4m3fn
GPU_DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_seed_equals_the_reference(dtype, device):
    length, heads = 90, (6, 2)
    options = {"num_kv_heads": heads[1], "head_dim": 64, "dtype": dtype, "device": device}
    kv = make_kv(70, batch=2, length=length, float8="per head", **options)
    kv.write([0, 0], [length, 50])
    q = make_q(71, 2, 12, heads[0], 64, dtype=dtype, device=device)
    twins = Twins(
        small_config(anchors=4), num_slots=3, heads=heads, head_dim=64, dtype=dtype, device=device
    )
    lens, slots = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([90, 50], [2, 0]))
    twins.seed(q, kv.cache, kv.table([90, 50]), lens, slots=slots, q_match=q, **kv.scales)
    for slot in (0, 2):
        check_ring(twins.cache, twins.reference, slot, twins.state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_counts_what_it_stands_for(dtype, device):
    """All 256 bytes, one to a token that is attended alone: subnormals, zeros and NaN as well."""
    numbers = torch.arange(256, dtype=torch.uint8, device=device)
    v = numbers.view(FLOAT8)[:, None, None, None].expand(256, 1, 1, 64).contiguous()
    q = torch.ones(256, 1, 64, device=device, dtype=dtype)
    table = torch.arange(256, dtype=torch.int32, device=device)[:, None]
    lens = torch.ones(256, dtype=torch.int32, device=device)
    scale = torch.tensor(0.25, device=device)
    out, lse = mac_attn.decode(
        q, (v, v), table, lens, k_scale=scale, v_scale=scale, return_lse=True
    )
    want = numbers.view(FLOAT8).float() * 0.25  # exact in each dtype; a token alone has weight 1
    torch.testing.assert_close(
        out.float(), want[:, None, None].expand(256, 1, 64), rtol=0, atol=0, equal_nan=True
    )
    torch.testing.assert_close(lse[:, 0], want * 64 / 8, equal_nan=True, rtol=1e-6, atol=1e-6)


def test_huge_and_tiny_queries(device):
    """bfloat16 reaches further than the float16 that the GPU multiplies float8 in."""
    dtype = torch.bfloat16
    for size in (1e-30, 1e-6, 1.0, 1e6, 1e30):
        kv = make_kv(
            90, batch=1, length=80, num_kv_heads=2, head_dim=64, device=device, float8="per head"
        )
        kv.write([0], [80])
        q = make_q(91, 1, 6, 64, dtype=torch.float32, device=device)
        q[0, 1] *= 100  # heads differ
        q = (q * size).to(dtype)
        lens = torch.tensor([80], dtype=torch.int32, device=device)
        call = (q, kv.cache, kv.table([80]), lens)
        options = dict(sm_scale=0.125 / size, **kv.scales)
        out, lse = mac_attn.decode(*call, return_lse=True, **options)
        want = mac_attn.reference.decode(*call, **options)
        tolerance = Twins(
            small_config(), num_slots=1, heads=(6, 2), head_dim=64, dtype=dtype, device=device
        )
        tolerance.out.check(out, want.out, f"out at {size}")
        tolerance.state.check(lse, want.lse, f"lse at {size}")


def test_a_python_number_is_a_scale(device):
    q, kv, table, lens = make_step(device, torch.bfloat16)
    kv = kv.to(FLOAT8)
    scale = torch.tensor([0.5], device=device)
    want = mac_attn.decode(q, kv, table, lens, k_scale=scale, v_scale=3 * scale)
    assert torch.equal(mac_attn.decode(q, kv, table, lens, k_scale=0.5, v_scale=1.5), want)


def test_the_step_compiles(device):
    q, kv, table, lens = make_step(device, torch.bfloat16)
    kv, scale = kv.to(FLOAT8), torch.full((KV_HEADS,), 0.5, device=device)
    reuse, plain = make_reuse(device, torch.bfloat16), make_reuse(device, torch.bfloat16)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, lens, scale):
        return mac_attn.decode(
            q, kv, table, lens, reuse=reuse, slots=slots_on(device), q_match=q,
            k_scale=scale, v_scale=scale,
        )  # fmt: skip

    for i in range(2):
        want = mac_attn.decode(
            q, kv, table, lens + i, reuse=plain, slots=slots_on(device), q_match=q,
            k_scale=scale, v_scale=scale,
        )  # fmt: skip
        assert torch.equal(step(q, lens + i, scale), want)
    for a, b in zip(snapshot(reuse), snapshot(plain), strict=True):
        assert torch.equal(a, b)


def bad_scales(device) -> dict[str, tuple[dict, type[Exception], str]]:
    one = torch.ones((), device=device)
    cases = {
        "no scales": (dict(k_scale=None, v_scale=None), ValueError, "k_scale is None, must be"),
        "no v_scale": (dict(v_scale=None), ValueError, "v_scale is None, must be given"),
        "of three heads": (dict(k_scale=torch.ones(3, device=device)), ValueError, "k_scale has"),
        "of no head": (dict(k_scale=torch.ones(0, device=device)), ValueError, "k_scale has shape"),
        "2-d": (dict(v_scale=torch.ones(1, 2, device=device)), ValueError, "v_scale has shape"),
        "strided": (
            dict(k_scale=torch.ones(2 * KV_HEADS, device=device)[::2]), ValueError, "k_scale has s",
        ),
        "float64": (dict(v_scale=one.double()), TypeError, "v_scale is torch.float64"),
        "elsewhere": (dict(k_scale=one.to("meta")), ValueError, "k_scale is on meta"),
        "a list": (dict(k_scale=[1.0]), TypeError, "k_scale is of type list"),
        "number 0": (dict(k_scale=0.0), ValueError, "k_scale is 0"),
        "number NaN": (dict(v_scale=math.nan), ValueError, "v_scale is nan"),
        "number below 0": (dict(v_scale=-1.0), ValueError, "v_scale is -1"),
        "a bool": (dict(v_scale=True), TypeError, "v_scale is of type bool"),
        "e5m2": (dict(e5m2=True), TypeError, "k_cache is .*[Ff]loat8_e5m2"),
        "bytes": (dict(bytes=True), TypeError, "k_cache is"),
        "v of another dtype": (dict(v_only=True), TypeError, "v_cache is"),
    }  # fmt: skip
    if device.type == "cpu":  # values on a GPU are not read back
        for bad in (0.0, -1.0, math.nan, math.inf):
            values = torch.tensor([1.0, bad])
            cases[f"one of {bad}"] = (dict(v_scale=values), ValueError, r"v_scale\[1\] is ")
    return cases


@pytest.mark.parametrize("how", ["exact", "reuse", "seed", "amend"])
@pytest.mark.parametrize("name", bad_scales(torch.device("cpu")))
def test_bad_scales_are_named_and_nothing_is_written(name, how, device):
    if name not in bad_scales(device):
        pytest.skip("values on a GPU are not read back")
    changes, error, text = bad_scales(device)[name]
    reuse = make_reuse(device, torch.bfloat16)
    two_steps(reuse, device)
    q, kv, table, lens = make_step(device, torch.bfloat16)
    kv = kv.to(FLOAT8)
    scale = torch.ones(KV_HEADS, device=device)
    options = {"k_scale": scale, "v_scale": scale} | {
        k: v for k, v in changes.items() if k.endswith("scale")
    }
    k, v = (x.contiguous() for x in kv.unbind(1))
    if "e5m2" in changes:
        k, v = (x.view(torch.float8_e5m2) for x in (k, v))
    if "bytes" in changes:
        k, v = (x.view(torch.uint8) for x in (k, v))
    if "v_only" in changes:
        v = v.bfloat16()
    before = snapshot(reuse)
    out = torch.full_like(q, 7)
    with pytest.raises(error, match=text):
        if how == "exact":
            mac_attn.decode(q, (k, v), table, lens, out=out, **options)
        elif how == "amend":
            mac_attn.amend(q, (k, v), table, lens, **options)
        elif how == "reuse":
            mac_attn.decode(
                q, (k, v), table, lens + 1, out=out, reuse=reuse, slots=slots_on(device),
                q_match=q, **options,
            )  # fmt: skip
        else:
            mac_attn.seed(
                reuse, q[:, None], (k, v), table, lens, slots=slots_on(device),
                q_match=q[:, None], **options,
            )  # fmt: skip
    assert (out == 7).all()
    for a, b in zip(before, snapshot(reuse), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_scales_of_a_cache_that_has_none(name, device):
    q, kv, table, lens = make_step(device, torch.bfloat16)
    with pytest.raises(ValueError, match=f"{name} is given, must be None, as kv_cache is BFloat16"):
        mac_attn.decode(q, kv, table, lens, **{name: 1.0})


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_a_nan_scale_on_a_gpu_is_nan_in_its_heads(name, cuda):
    """Nothing reads it back; the entries of those heads are not stored, or hold it and are NaN."""
    q, kv, table, lens = make_step(cuda, torch.bfloat16)
    kv = kv.to(FLOAT8)
    scales = {n: torch.ones(KV_HEADS, device=cuda) for n in ("k_scale", "v_scale")}
    scales[name][1] = math.nan
    reuse = make_reuse(cuda, torch.bfloat16)
    slots = slots_on(cuda)
    for i in range(3):
        out = mac_attn.decode(q, kv, table, lens + i, reuse=reuse, slots=slots, q_match=q, **scales)
        heads = out.view(len(q), KV_HEADS, -1)
        assert heads[:, 1].isnan().all() and heads[:, 0].isfinite().all()
    # The request goes on when the scale is right: what it stored may be NaN, a new one is not.
    reuse.reset(slots)
    scales[name][1] = 1.0
    out = mac_attn.decode(q, kv, table, lens + 3, reuse=reuse, slots=slots, q_match=q, **scales)
    assert out.isfinite().all()
    reuse.check()


@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_rows_that_are_not_aligned_are_refused_on_a_gpu(dtype, cuda):
    q, kv, table, lens = make_step(cuda, dtype)
    wide = torch.zeros(*kv.shape[:-1], HEAD_DIM + 8, device=cuda, dtype=FLOAT8)
    with pytest.raises(ValueError, match="k_cache has strides"):
        mac_attn.decode(q, wide[..., :HEAD_DIM], table, lens, k_scale=1.0, v_scale=1.0)
