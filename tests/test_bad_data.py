"""Numbers, page tables and sizes that no model should produce: what comes out, what stays safe."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from cases import make_kv, make_q, plain_dtype, random_walk, small_config
from compare import Twins, out_tolerance
from torch import Tensor

import mac_attn
from mac_attn import reference

HEADS, HEAD_DIM, LENGTH = (4, 2), 64, 60
BAD_NUMBERS = [math.nan, math.inf, -math.inf]


def make_step(device: torch.device, batch: int = 3) -> Any:
    """Queries, KV cache, block table and lengths of an exact step; pages beyond are garbage."""
    kv = make_kv(
        1, batch=batch, length=LENGTH, num_kv_heads=HEADS[1], head_dim=HEAD_DIM, device=device,
        page_size=7,
    )  # fmt: skip
    lengths = [LENGTH, 33, 50][:batch]
    kv.write([0] * batch, lengths)
    q = make_q(2, batch, HEADS[0], HEAD_DIM, device=device)
    return q, kv, kv.table(lengths), torch.tensor(lengths, dtype=torch.int32, device=device)


def exact(
    q: Tensor, kv: Any, table: Tensor, lens: Tensor, cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    return mac_attn.decode(q, kv.cache, table, lens, logits_soft_cap=cap, return_lse=True)


@pytest.mark.parametrize("bad", BAD_NUMBERS)
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("cap", [0.0, 30.0])
def test_a_bad_number_shows_in_its_own_head_and_nowhere_else(cap, where, bad, device):
    """Never a finite answer that hides it, never a bit of another head or request changed."""
    q, kv, table, lens = make_step(device)
    out, lse = exact(q, kv, table, lens, cap)
    if where == "q":
        q[1, 2, 5] = bad
        touched = [2]  # query heads of request 1
    else:
        pages, token = kv.cache[where == "v"], 20
        page = int(table[1, token // kv.page_size])
        pages[page, token % kv.page_size, 1, 5] = bad
        touched = [2, 3]  # those of KV head 1
    got, got_lse = exact(q, kv, table, lens, cap)
    others = torch.ones(3, HEADS[0], dtype=torch.bool, device=q.device)
    others[1, touched] = False
    assert torch.equal(got[others], out[others]) and torch.equal(got_lse[others], lse[others])
    for head in touched:
        if where == "v":
            assert not got[1, head, 5].isfinite()
            rest = torch.arange(HEAD_DIM, device=q.device) != 5
            assert torch.equal(got[1, head, rest], out[1, head, rest])
            assert torch.equal(got_lse[1, head], lse[1, head])
            continue
        # An infinite key is an infinite logit. If that is -inf the token weighs nothing; else NaN.
        # With a cap it is a logit like any other, of an infinite query too.
        assert got[1, head].isnan().all() or (math.isinf(bad) and (where == "k" or cap))
    if math.isinf(bad) and cap and where != "v":
        assert got[1, touched].isfinite().all()
    elif where == "k" and math.isinf(bad):
        signs = [bool(q[1, head, 5] * bad > 0) for head in touched]
        assert [bool(got[1, head].isnan().all()) for head in touched] == signs
        assert all(s or got[1, h].isfinite().all() for s, h in zip(signs, touched, strict=True))


@pytest.mark.parametrize("bad", BAD_NUMBERS)
@pytest.mark.parametrize("granularity", ["group", "head"])
def test_reuse_recovers_from_a_bad_query(granularity, bad, device):
    """The step itself is NaN; its entry is never matched, so all later steps are as if it had been
    any miss, which the comparison with the reference shows."""
    cfg = small_config(granularity=granularity)
    twins = Twins(cfg, num_slots=1, heads=HEADS, head_dim=HEAD_DIM, device=device)
    kv = make_kv(3, batch=1, length=70, num_kv_heads=HEADS[1], head_dim=HEAD_DIM, device=device)
    kv.write([0], [70])
    q = make_q(4, 70, 1, HEADS[0], HEAD_DIM, device=device)
    q_match = random_walk(5, 70, 1, 2, 2, HEAD_DIM, device=device)
    q_match[40:60] = q_match[39].clone()  # all of them hit
    q[50, 0, 1, 7] = q_match[50, 0, 1, 7] = bad
    table = kv.table([70])
    for p in range(70):
        lens = torch.tensor([p + 1], dtype=torch.int32, device=device)
        slots = torch.zeros(1, dtype=torch.int32, device=device)
        if p == 50:
            out = mac_attn.decode(
                q[p], kv.cache, table, lens, reuse=twins.cache, slots=slots, q_match=q_match[p]
            )
            assert out[0, 1].isnan().all()
            assert out[0, [0, 2, 3]].isfinite().all()
            # The reference takes the same step, so that both rings have it; its NaN is the same.
            reference.decode(
                q[p], kv.cache, table, lens, reuse=twins.reference, slots=slots, q_match=q_match[p]
            )
            continue
        step = twins.decode(kv, [p + 1], q[p], q_match[p], [0], rings=p < 50)
        assert step.out.isfinite().all()
        if 50 < p < 60:
            assert (step.source[0] != 50).any()
    assert twins.hit_rate > 0.2


@pytest.mark.parametrize("size", [1e30, 1e15])
def test_huge_numbers_answer_right_or_not_at_all(size, device):
    """Squares and logits overflow float32: that must end in NaN or infinity, not in a number."""
    q, kv, table, lens = make_step(device)
    q *= size
    out, lse = exact(q, kv, table, lens)
    want = reference.decode(q, kv.cache, table, lens)
    finite = out.isfinite().all(-1) & lse.isfinite()
    # Softmax over logits so far apart is the value of one token, which both must have found.
    tolerance = out_tolerance(q.dtype, device)
    tolerance.check(out[finite], want.out[finite.cpu()].float().to(device), "out")
    if size == 1e15:
        assert finite.all()


def test_huge_queries_never_match(device):
    """Their squared distance overflows: a miss, not a hit by accident."""
    for mode in ("relative", "absolute"):
        cfg = small_config(threshold_mode=mode, threshold=0.5, min_context=0)
        twins = Twins(cfg, num_slots=1, heads=HEADS, head_dim=HEAD_DIM, device=device)
        kv = make_kv(6, batch=1, length=40, num_kv_heads=2, head_dim=HEAD_DIM, device=device)
        kv.write([0], [40])
        q = make_q(7, 1, HEADS[0], HEAD_DIM, device=device)
        slots = torch.zeros(1, dtype=torch.int32, device=device)
        for n in range(1, 41):
            lens = torch.tensor([n], dtype=torch.int32, device=device)
            mac_attn.decode(
                q, kv.cache, kv.table([40]), lens, reuse=twins.cache, slots=slots,
                q_match=torch.full_like(q, 1e25),
            )  # fmt: skip
        assert twins.cache.stats().query_head_hits == 0


def test_denormals(device):
    """Tiny keys, values and queries are numbers like any other; whether the hardware rounds them to
    zero is below the tolerance."""
    q, kv, table, lens = make_step(device)
    for scale_q, scale_k, scale_v in [(1e-40, 1, 1), (1, 1e-40, 1), (1, 1, 1e-40), (1e-42,) * 3]:
        cut = (kv.cache[0] * scale_k, kv.cache[1] * scale_v)
        call = (q * scale_q, cut, table, lens)
        out, lse = mac_attn.decode(*call, return_lse=True)
        want = reference.decode(*call)
        tolerance = out_tolerance(q.dtype, device)
        tolerance.check(out, want.out, "out")
        tolerance.check(lse, want.lse, "lse")


@pytest.mark.parametrize("garbage", [-1, 2**31 - 1, -(2**31), 10**6])
def test_pages_beyond_those_in_use_are_not_read(garbage, device):
    q, kv, table, lens = make_step(device)
    out, lse = exact(q, kv, table, lens)
    table = table.clone()
    for b, n in enumerate(lens.tolist()):
        table[b, -(-n // kv.page_size) :] = garbage
    for got, want in zip(exact(q, kv, table, lens), (out, lse), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("page", [-1, 10**6, 2**31 - 1, -(2**31)])
def test_a_page_that_is_not_there(page, device):
    """On the CPU the call raises; on CUDA that request alone is NaN and `check` raises."""
    q, kv, table, lens = make_step(device)
    twins = Twins(small_config(), num_slots=3, heads=HEADS, head_dim=HEAD_DIM, device=device)
    slots = torch.arange(3, dtype=torch.int32, device=device)
    table[1, 2] = page
    call = dict(reuse=twins.cache, slots=slots, q_match=q)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"block_table\[1, 2\] is"):
            mac_attn.decode(q, kv.cache, table, lens, **call)
        assert not twins.cache.counters.any()
        return
    out = mac_attn.decode(q, kv.cache, table, lens, **call)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()
    with pytest.raises(ValueError, match="block_table held"):
        twins.cache.check()


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_sizes_whose_products_overflow_int32():
    """Views that repeat one page: more tokens than 2^31, in a table whose ids are all valid."""
    page = torch.randn(1, 2**16, 1, 16)
    table = torch.zeros(1, 2**16, dtype=torch.int32)
    q = torch.randn(1, 1, 16)
    want = mac_attn.decode(q, (page, page), table[:, :1], ints(3000))
    got = mac_attn.decode(q, (page, page), table, ints(3000))
    assert torch.equal(got, want)
    # More tokens than the kernels can count are refused.
    pages = torch.zeros(1, 2**15 + 1, dtype=torch.int32)
    with pytest.raises(
        ValueError, match=r"seq_lens\[0\] is 2147483647, must be from 0 to 2147479551"
    ):
        mac_attn.decode(q, (page, page), pages, ints(2**31 - 1))
    # A page that would hold 2^31 tokens and more is refused, and so are as many rows.
    wide = torch.zeros(1, 1, 1, 16).expand(1, 2**31, 1, 16)
    with pytest.raises(ValueError, match="page_size is 2147483648, must be from 1 to 2147483647"):
        mac_attn.decode(q, (wide, wide), table[:, :1], ints(1))
    many = torch.zeros(1, 1, 16).expand(2**16, 2**15, 16)
    lens = torch.zeros(1, dtype=torch.int32).expand(2**16).contiguous()
    with pytest.raises(ValueError, match="batch \\* num_qo_heads is 2147483648, must be below 2"):
        mac_attn.decode(many, (page, page), torch.zeros(2**16, 1, dtype=torch.int32), lens)


def test_the_longest_length_there_is():
    """Positions up to 2^31 - 2 in a ring, by exact attention of one token at a time elsewhere."""
    cfg = small_config(min_context=0)
    cache = mac_attn.ReuseCache(
        cfg, num_slots=1, num_qo_heads=2, num_kv_heads=1, head_dim=16, dtype=torch.float32
    )
    q = torch.randn(1, 2, 16)
    last = 2**31 - 1
    states, lse = torch.randn(2, 1, 2, 16), torch.randn(2, 1, 2)
    none = torch.empty(1, 1, 0)
    amended = mac_attn.Amended(states, lse, torch.zeros(1, 2), none.int(), none, ints(0)[None])
    for n in (last - 2, last - 1, last):
        matched = mac_attn.match(cache, q, ints(n), ints(0))
        assert matched.source.tolist() == [[-1, -1] if n == last - 2 else [n - 2, n - 2]]
        mac_attn.complete(
            amended, ints(n), reuse=cache, matched=matched, q=q, q_match=q, slots=ints(0)
        )
    assert int(cache.slot_end[0]) == last
    assert cache.stats().kv_tokens_full == 3 * last - 3
    cache.truncate(0, last - 1)
    assert mac_attn.match(cache, q, ints(last), ints(0)).source.tolist() == [[last - 2, last - 2]]


def test_an_output_that_overlaps_itself_is_refused(device):
    """Several threads write it: whichever row came last would be everybody's answer."""
    q, kv, table, lens = make_step(device)
    one = torch.empty(1, 1, HEAD_DIM, dtype=q.dtype, device=q.device)
    flat = torch.empty(10**4, dtype=q.dtype, device=q.device)
    shape = (3, HEADS[0], HEAD_DIM)
    for bad in (
        one.expand(shape),
        flat.as_strided(shape, (HEADS[0] * HEAD_DIM, HEAD_DIM - 1, 1)),
        flat.as_strided(shape, (HEAD_DIM, HEAD_DIM, 1)),
        flat.as_strided(shape, (HEAD_DIM, 2 * HEAD_DIM, 1)),
    ):
        with pytest.raises(ValueError, match="out has strides .*, must not overlap itself"):
            mac_attn.decode(q, kv.cache, table, lens, out=bad)
    want = mac_attn.decode(q, kv.cache, table, lens)
    for strides in [(HEAD_DIM, 3 * HEAD_DIM, 1), (1000, HEAD_DIM + 8, 1)]:
        good = flat.as_strided(shape, strides)
        mac_attn.decode(q, kv.cache, table, lens, out=good)
        assert torch.equal(good, want)


def test_an_output_in_the_place_of_the_query(device):
    """It may be without reuse; with it the entry is made of the query after the output is there."""
    q, kv, table, lens = make_step(device)
    both = torch.stack([q, q], 1)
    q, q_match = both[:, 0], q.clone()  # a view that is not dense
    twins = Twins(
        small_config(anchors=3), num_slots=3, heads=HEADS, head_dim=HEAD_DIM, device=device
    )
    slots = torch.arange(3, dtype=torch.int32, device=device)
    options: dict[str, Any] = dict(reuse=twins.cache, slots=slots, q_match=q_match)
    before = twins.cache.ring.clone()
    for out, name in [(q, "q"), (q_match, "q_match"), (both[:, 0, :, :], "q")]:
        with pytest.raises(ValueError, match=f"out shares memory with {name}, must not"):
            mac_attn.decode(q, kv.cache, table, lens, out=out, **options)
    assert torch.equal(twins.cache.ring, before) and torch.equal(both[:, 0], both[:, 1])
    mac_attn.decode(q, kv.cache, table, lens, out=torch.empty_like(q), **options)

    want = mac_attn.decode(q, kv.cache, table, lens)
    got = mac_attn.decode(q, kv.cache, table, lens, out=q)
    assert torch.equal(got, want) and torch.equal(both[:, 0], want)


def test_strides_of_a_dimension_of_one_do_not_count(device):
    """As torch gives them to views: on CUDA none of them would be a multiple of 16 bytes."""
    q, kv, table, lens = make_step(device, batch=1)
    want = mac_attn.decode(q, kv.cache, table, lens)
    got = mac_attn.decode(q.as_strided(q.shape, (3, HEAD_DIM, 1)), kv.cache, table, lens)
    assert torch.equal(got, want)


@pytest.mark.parametrize("reused", [False, True])
def test_nothing_of_anything(reused, device):
    """No requests, no pages, only padding rows: empty states, and no slot is touched."""
    dtype = plain_dtype(device)
    pages = torch.empty(0, 16, 2, HEAD_DIM, dtype=dtype, device=device)
    for batch in (0, 2):
        q = torch.randn(batch, 4, HEAD_DIM, device=device).to(dtype)
        zero = torch.zeros(batch, dtype=torch.int32, device=device)
        options: dict[str, Any] = {}
        if reused:
            twins = Twins(
                small_config(anchors=3), num_slots=2, heads=HEADS, head_dim=HEAD_DIM, device=device
            )
            slots = torch.full_like(zero, 10**9)
            options = dict(reuse=twins.cache, slots=slots, q_match=q)
        for width in (0, 3):
            table = torch.full((batch, width), 10**9, dtype=torch.int32, device=device)
            out, lse = mac_attn.decode(q, (pages, pages), table, zero, return_lse=True, **options)
            assert out.shape == q.shape and (out == 0).all() and (lse == -torch.inf).all()
        if reused:
            assert not twins.cache.counters.any() and not twins.cache.slot_end.any()
            twins.cache.check()


LITTLE_MEMORY = """
import resource, gc
import torch, mac_attn
def size():
    return int(open("/proc/self/statm").read().split()[0]) * 4096
def make(slots):
    cfg = mac_attn.ReuseConfig(entries=256, anchors=64)
    return mac_attn.ReuseCache(cfg, num_slots=slots, num_qo_heads=8, num_kv_heads=2, head_dim=64,
                               dtype=torch.float32)
make(1)
before = size()
resource.setrlimit(resource.RLIMIT_AS, (before + (400 << 20),) * 2)
for _ in range(20):  # each asks for 900 MiB
    try:
        make(500)
    except MemoryError as error:
        assert "num_slots = 500 of 1.8 MiB need 895.8 MiB" in str(error), error
    else:
        raise AssertionError("it fits?")
    gc.collect()
assert size() - before < 256 << 20, size() - before
make(100)
print("ok")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer takes all addresses"
)
def test_a_cache_that_does_not_fit_leaves_nothing_behind():
    result = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and result.stdout == "ok\n", result.stderr


SHORT_OF_MEMORY = """
import resource
import torch, mac_attn
torch.set_num_threads(2)
q = torch.randn(2, 16, 1024, 128)
pages = torch.randn(4, 512, 1, 128)
table = torch.arange(4, dtype=torch.int32).view(2, 2)
lens = torch.tensor([1000, 900], dtype=torch.int32)
out = torch.empty_like(q)
mac_attn.decode(q[:, 0, :4].contiguous(), (pages, pages), table, lens)  # starts the threads
size = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (size + ({extra} << 20),) * 2)
try:
    mac_attn.decode(q, (pages, pages), table, lens, out=out)
except (MemoryError, RuntimeError) as error:
    assert "alloc" in str(error), error
else:
    assert {extra} > 20, "it fits?"
print("ok")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer takes all addresses"
)
@pytest.mark.parametrize("extra", [20, 80])  # MiB: where either thread was left waiting
def test_a_thread_without_memory_keeps_nobody_waiting(extra):
    result = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY.format(extra=extra)], capture_output=True,
        text=True, check=False, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0 and result.stdout == "ok\n", result.stderr


def test_sizes_that_no_machine_has():
    for entries, anchors in [(2**24, 2**24), (2**24, 0), (1, 2**24), (2**16, 512)]:
        with pytest.raises(MemoryError, match=r"num_slots = 2147483647 of \d+\.\d MiB need"):
            mac_attn.ReuseCache(
                mac_attn.ReuseConfig(entries=entries, anchors=anchors), num_slots=2**31 - 1,
                num_qo_heads=64, num_kv_heads=8, head_dim=256, dtype=torch.float32,
            )  # fmt: skip
