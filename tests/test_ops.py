"""The ops as torch sees them: opcheck, torch.compile, the stages alone, and bad input."""

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mac_attn

BATCH, HEADS, KV_HEADS, HEAD_DIM, PAGE, PAGES = 2, 6, 2, 64, 16, 20
WINDOW, BAND = 16, 8


def make_step(device, dtype=torch.float32, n=100):
    """Queries, pages, table and lengths of one decode step."""
    kv = torch.randn(BATCH * PAGES, 2, PAGE, KV_HEADS, HEAD_DIM, device=device).to(dtype)
    table = torch.randperm(BATCH * PAGES, device=device).int().view(BATCH, PAGES)
    q = torch.randn(BATCH, HEADS, HEAD_DIM, device=device).to(dtype)
    seq_lens = torch.tensor([n, n - 30], dtype=torch.int32, device=device)
    return q, kv, table, seq_lens


def make_reuse(device, dtype=torch.float32, rotary=None, **options):
    options = {"window": WINDOW, "band": BAND, "anchors": 4, "min_context": 1, **options}
    return mac_attn.ReuseCache(
        mac_attn.ReuseConfig(**options),
        num_slots=3,
        num_qo_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
        device=device,
        rotary=rotary,
    )


def snapshot(reuse: mac_attn.ReuseCache) -> list[Tensor]:
    return [t.clone() for t in vars(reuse).values() if isinstance(t, Tensor)]


def slots_on(device) -> Tensor:
    return torch.tensor([2, 0], dtype=torch.int32, device=device)


def two_steps(reuse, device, dtype=torch.float32):
    """A miss, then a hit on a nearly equal query; returns the arguments of the second step."""
    q, kv, table, seq_lens = make_step(device, dtype)
    q_match = torch.randn_like(q)
    mac_attn.decode(q, kv, table, seq_lens, reuse=reuse, slots=slots_on(device), q_match=q_match)
    return q, kv, table, seq_lens + 1, q_match


def op_arguments(reuse, device):
    q, kv, table, seq_lens, q_match = two_steps(reuse, device)
    slots = slots_on(device)
    ring = (reuse.slot_begin, reuse.slot_end, reuse.slot_request)
    match = (q_match, seq_lens, slots, None, reuse.ring_query, reuse.ring_depth)
    match += (reuse.ring_position, *ring, reuse.threshold, True, False, BAND, 1, 2**31 - 1)
    match += (reuse.workspace, reuse.error_flag)
    source = torch.ops.mac_attn.match(*match)
    assert (source == seq_lens[:, None] - 2).all()  # the planted hit
    scale = 1 / math.sqrt(HEAD_DIM)
    amend = (q, kv[:, 0], kv[:, 1], table, seq_lens, source, slots)
    amend += (reuse.ring_anchors, WINDOW, BAND, scale, 0.0, reuse.workspace, reuse.error_flag)
    states, state_lse, anchors = torch.ops.mac_attn.amend(*amend)
    out, lse = torch.empty_like(q), torch.empty_like(state_lse[0])
    complete = (states, state_lse, anchors, source, q_match, seq_lens, slots, None)
    complete += (reuse.ring_query, reuse.ring_out, reuse.ring_lse, reuse.ring_depth)
    complete += (reuse.ring_anchors, reuse.ring_position, *ring, reuse.counters, BAND)
    complete += (reuse.workspace, out, lse)
    decode = (*amend[:5], slots, q_match, None, *complete[8:18])
    decode += (reuse.threshold, True, False, BAND, 1, 2**31 - 1, scale, 0.0)
    decode += (reuse.workspace, reuse.error_flag, None, False, 1.0)
    return {
        "match.default": match,
        "amend.default": amend,
        "complete.default": complete,
        "decode_exact.default": (*amend[:5], scale, 0.0),
        "decode_exact.into": (*amend[:5], scale, 0.0, out),
        "decode_reuse.default": decode,
        "decode_reuse.into": (*decode, out),
        "complete_exact.default": (states, state_lse, seq_lens, out, lse),
    }


OPS = [
    f"{name}.default"
    for name in ("match", "amend", "complete", "complete_exact", "decode_exact", "decode_reuse")
]
OPS += ["decode_exact.into", "decode_reuse.into"]


def overload(name: str) -> torch._ops.OpOverload:
    packet, kind = name.split(".")
    return getattr(getattr(torch.ops.mac_attn, packet), kind)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, device):
    args = op_arguments(make_reuse(device), device)[op]
    torch.library.opcheck(overload(op), args)


def test_one_op_does_what_the_stages_do(device):
    """`decode` is match, amend, complete: outputs, rings and counters, over misses and hits."""
    whole, apart = make_reuse(device), make_reuse(device)
    q, kv, table, seq_lens = make_step(device)
    slots, q_match = slots_on(device), q
    for i in range(4):
        q_match = torch.randn_like(q) if i % 2 == 0 else q_match
        lens = seq_lens + i
        expected = mac_attn.decode(
            q, kv, table, lens, reuse=whole, slots=slots, q_match=q_match, return_lse=True
        )
        source = mac_attn.match(apart, q_match, lens, slots)
        amended = mac_attn.amend(q, kv, table, lens, source=source, reuse=apart, slots=slots)
        got = mac_attn.complete(
            amended, lens, reuse=apart, source=source, q_match=q_match, slots=slots
        )
        for a, b in zip((*got, *snapshot(apart)), (*expected, *snapshot(whole)), strict=True):
            assert torch.equal(a, b)
    assert whole.stats().hit_rate == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_decode_turns_queries_back_itself(interleaved, dtype, device):
    """With the cache's `rotary` a step is, to the bit, the one with `unrotate`'s queries."""
    frequencies = 10000 ** -(torch.arange(HEAD_DIM // 4) / (HEAD_DIM // 4))
    rotary = mac_attn.RotaryEmbedding(frequencies, interleaved, 1.5)
    given, turned = make_reuse(device, dtype), make_reuse(device, dtype, rotary)
    q, kv, table, seq_lens = make_step(device, dtype)
    pre_rope = q
    for i in range(4):
        pre_rope = torch.randn_like(q) if i % 2 == 0 else pre_rope
        lens = seq_lens + i
        q = mac_attn.rotate(pre_rope, lens - 1, rotary.to(device))
        q_match = mac_attn.unrotate(q, lens - 1, rotary.to(device))
        step = dict(slots=slots_on(device), return_lse=True, out=torch.empty_like(q))
        if i % 2:
            del step["out"]
        expected = mac_attn.decode(q, kv, table, lens, reuse=given, q_match=q_match, **step)
        expected = [t.clone() for t in expected]
        got = mac_attn.decode(q, kv, table, lens, reuse=turned, **step)
        for a, b in zip((*got, *snapshot(turned)), (*expected, *snapshot(given)), strict=True):
            assert torch.equal(a, b)
    assert turned.stats().hit_rate == 0.5


def test_the_op_takes_queries_or_a_rotation():
    args = list(op_arguments(make_reuse("cpu"), torch.device("cpu"))["decode_reuse.default"])
    op = torch.ops.mac_attn.decode_reuse
    with pytest.raises(ValueError, match="both are given"):
        op(*args[:-3], torch.ones(4), *args[-2:])
    args[6] = None
    with pytest.raises(ValueError, match="neither is given"):
        op(*args)
    args[-3] = torch.ones(4)
    torch.library.opcheck(op.default, tuple(args))
    args[-3] = torch.ones(HEAD_DIM)
    with pytest.raises(ValueError, match="inv_freq has"):
        op(*args)
    args[4] = args[4].long()
    with pytest.raises(TypeError, match="seq_lens"):
        op(*args)


class Recorded(TorchDispatchMode):
    """The ops that pass through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_of_the_dispatcher_see_a_step(device):
    """A step does not go by torch.ops, but it goes by the dispatcher all the same."""
    reuse = make_reuse(device)
    q, kv, table, seq_lens = make_step(device)
    options = dict(reuse=reuse, slots=slots_on(device), q_match=q)
    with Recorded() as recorded:
        mac_attn.decode(q, kv, table, seq_lens)
        mac_attn.decode(q, kv, table, seq_lens, **options, out=torch.empty_like(q))
    assert "mac_attn.decode_exact.default" in recorded.names
    assert "mac_attn.decode_reuse.into" in recorded.names
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.empty_like(q)
        out = mac_attn.decode(fake, kv, table, seq_lens, **options)
    assert isinstance(out, FakeTensor) and out.shape == q.shape and out.device == q.device


def test_compiles_without_graph_breaks(device):
    """The compiled step gives what the plain one gives, to the rings too."""
    plain, compiled = make_reuse(device), make_reuse(device)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, kv, table, seq_lens, slots, q_match):
        out = mac_attn.decode(
            q * 2, kv, table, seq_lens, reuse=compiled, slots=slots, q_match=q_match
        )
        return out + 1

    q, kv, table, seq_lens = make_step(device)
    slots, q_match = slots_on(device), q
    for i in range(3):
        q_match = torch.randn_like(q) if i % 2 == 0 else q_match
        args = (kv, table, seq_lens + i)
        expected = mac_attn.decode(q * 2, *args, reuse=plain, slots=slots, q_match=q_match) + 1
        assert torch.equal(step(q, *args, slots, q_match), expected)
        for a, b in zip(snapshot(plain), snapshot(compiled), strict=True):
            assert torch.equal(a, b)
    assert plain.stats().hit_rate == pytest.approx(1 / 3)


def test_stages_alone_compose_with_another_attention(device):
    """match and complete around an attention of one's own, here plain torch on dense tensors."""
    reuse = make_reuse(device, anchors=0)
    twin = make_reuse(device, anchors=0)
    args = two_steps(reuse, device)
    torch.manual_seed(0)
    two_steps(twin, device)
    q, kv, table, seq_lens, q_match = args
    slots = slots_on(device)
    expected = mac_attn.decode(
        q, kv, table, seq_lens, reuse=twin, slots=slots, q_match=q_match, return_lse=True
    )

    source = mac_attn.match(reuse, q_match, seq_lens, slots)
    states, lse = torch.zeros(2, *q.shape, device=device), torch.full((2, *q.shape[:2]), -math.inf)
    lse = lse.to(device)
    for b in range(BATCH):
        k, v = (kv[table[b].long(), i].flatten(0, 1).repeat_interleave(3, 1) for i in (0, 1))
        n = int(seq_lens[b])
        for h in range(HEADS):
            start = max(0, int(source[b, h]) + 1 - BAND)
            for row, span in enumerate([slice(start, n - BAND), slice(n - BAND, n)]):
                logits = k[span, h] @ q[b, h] / math.sqrt(HEAD_DIM)
                lse[row, b, h] = logits.logsumexp(0)
                states[row, b, h] = logits.softmax(0) @ v[span, h]
    amended = mac_attn.Amended(
        states, lse, torch.empty(BATCH, KV_HEADS, 0, dtype=torch.int32, device=device)
    )
    got = mac_attn.complete(
        amended, seq_lens, reuse=reuse, source=source, q_match=q_match, slots=slots
    )
    # float32 sums over 100 tokens in two orders
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(snapshot(reuse), snapshot(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_merge_states_of_empty_and_full_sets(device):
    out = torch.randn(2, 5, 4, 8, dtype=torch.float64, device=device)
    lse = torch.randn(2, 5, 4, dtype=torch.float64, device=device)
    lse[0, 0], lse[1, 1], lse[:, 2] = -math.inf, -math.inf, -math.inf
    out[0, 0], out[1, 1], out[:, 2] = 0, 0, 0
    merged, merged_lse = mac_attn.merge_states(out[0], lse[0], out[1], lse[1])
    assert torch.equal(merged[0], out[1, 0]) and torch.equal(merged[1], out[0, 1])
    assert (merged[2] == 0).all() and (merged_lse[2] == -math.inf).all()
    weights = lse[:, 3:].softmax(0).unsqueeze(-1)
    torch.testing.assert_close(merged[3:], (out[:, 3:] * weights).sum(0))
    torch.testing.assert_close(merged_lse, lse.logsumexp(0))
    with pytest.raises(ValueError, match="lse2 has shape"):
        mac_attn.merge_states(out[0], lse[0], out[1], lse[1, 0])


# Each case changes one argument; the error names it and nothing is written.
def bad_cases(device) -> dict[str, tuple[dict, type[Exception], str]]:
    q, kv, table, seq_lens = make_step(device)
    other_heads = torch.randn(BATCH * PAGES, 2, PAGE, 3, HEAD_DIM, device=device)
    return {
        "q a list": ({"q": [1.0]}, TypeError, "q is of type list"),
        "q of two dims": ({"q": q[0]}, ValueError, "q has shape"),
        "q int": ({"q": q.int()}, TypeError, "q is"),
        "q of another head_dim": ({"q": q[..., :32]}, ValueError, "q"),
        "q of another head count": ({"q": q[:, :4]}, ValueError, "q"),
        "q strided in the last dim": (
            {"q": torch.randn(BATCH, HEADS, HEAD_DIM * 2, device=device)[..., ::2]},
            ValueError,
            "q has stride",
        ),
        "kv of another dtype": ({"kv_cache": kv.bfloat16()}, TypeError, "k_cache is"),
        "kv on another device": ({"kv_cache": kv.to("meta")}, ValueError, "k_cache is on"),
        "kv of another head count": ({"kv_cache": other_heads}, ValueError, "k_cache has shape"),
        "kv layout": ({"kv_layout": "NDH"}, ValueError, "kv_layout is 'NDH'"),
        "kv in the other layout": ({"kv_layout": "HND"}, ValueError, "k_cache has shape"),
        "block_table int64": ({"block_table": table.long()}, TypeError, "block_table is"),
        "block_table of another batch": ({"block_table": table[:1]}, ValueError, "block_table"),
        "seq_lens int64": ({"seq_lens": seq_lens.long()}, TypeError, "seq_lens is"),
        "seq_lens of another batch": ({"seq_lens": seq_lens[:1]}, ValueError, "seq_lens has shape"),
        "slots None": ({"slots": None}, TypeError, "slots is None"),
        "slots int64": ({"slots": slots_on(device).long()}, TypeError, "slots is"),
        "request_ids int32": ({"request_ids": slots_on(device)}, TypeError, "request_ids is"),
        "q_match None": ({"q_match": None}, ValueError, "q_match is None"),
        "q_match of another shape": ({"q_match": q[:, :3]}, ValueError, "q_match has shape"),
        "q_match of another dtype": ({"q_match": q.half()}, TypeError, "q_match is"),
        "out of another dtype": ({"out": q.half()}, TypeError, "out is"),
        "out of another shape": ({"out": q[:1].clone()}, ValueError, "out has shape"),
        "out strided in the last dim": (
            {"out": torch.empty(BATCH, HEADS, 2 * HEAD_DIM, device=device)[..., ::2]},
            ValueError,
            "out has stride",
        ),
        "sm_scale NaN": ({"sm_scale": math.nan}, ValueError, "sm_scale is"),
        "soft cap negative": ({"logits_soft_cap": -1.0}, ValueError, "logits_soft_cap is"),
        "reuse of another kind": ({"reuse": 3}, TypeError, "reuse is of type int"),
    }


@pytest.mark.parametrize("name", bad_cases("cpu"))
def test_bad_argument_is_named_and_nothing_is_written(name, device):
    reuse = make_reuse(device)
    q, kv, table, seq_lens, q_match = two_steps(reuse, device)
    out = torch.randn_like(q)
    args = {
        "q": q,
        "kv_cache": kv,
        "block_table": table,
        "seq_lens": seq_lens,
        "reuse": reuse,
        "slots": slots_on(device),
        "q_match": q_match,
        "out": out,
    }
    before, out_before = snapshot(reuse), out.clone()
    change, error, message = bad_cases(device)[name]
    with pytest.raises(error, match=message):
        mac_attn.decode(**{**args, **change})
    for a, b in zip(snapshot(reuse), before, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(out, out_before)
    mac_attn.decode(**args)  # and the step can still be made
    assert reuse.stats().hit_rate == 0.5


# Values that only the CPU looks at before it writes; on CUDA see ReuseCache.check.
def bad_values() -> dict[str, tuple[dict, str]]:
    def ints(*values, dtype=torch.int32):
        return torch.tensor(values, dtype=dtype)

    return {
        "length beyond the table": (
            {"seq_lens": ints(101, PAGES * PAGE + 1)},
            r"seq_lens\[1\] is 321, must be from 0 to 320",
        ),
        "negative length": ({"seq_lens": ints(-1, 71)}, r"seq_lens\[0\] is -1"),
        "slot out of range": ({"slots": ints(2, 3)}, r"slots\[1\] is 3, must be from 0 to 2"),
        "negative slot": ({"slots": ints(-1, 0)}, r"slots\[0\] is -1"),
        "slot twice": ({"slots": ints(1, 1)}, r"slots\[1\] is 1, which slots\[0\] has too"),
        "negative id": (
            {"request_ids": ints(5, -1, dtype=torch.int64)},
            r"request_ids\[1\] is -1",
        ),
    }


@pytest.mark.parametrize("name", bad_values())
def test_bad_value_is_named_and_nothing_is_written(name):
    reuse = make_reuse("cpu")
    q, kv, table, seq_lens, q_match = two_steps(reuse, "cpu")
    before, out = snapshot(reuse), torch.full_like(q, 7)
    args = {"seq_lens": seq_lens, "slots": slots_on("cpu")}
    change, message = bad_values()[name]
    with pytest.raises(ValueError, match=message):
        mac_attn.decode(q, kv, table, **{**args, **change}, reuse=reuse, q_match=q_match, out=out)
    for a, b in zip(snapshot(reuse), before, strict=True):
        assert torch.equal(a, b)
    assert (out == 7).all()


@pytest.mark.parametrize("page_id", [-1, BATCH * PAGES, 2**31 - 1])
def test_only_pages_that_are_read_are_checked(page_id):
    """A page beyond the length is never looked at; on a hit neither is one below the source."""
    reuse = make_reuse("cpu", anchors=0)
    q, kv, table, seq_lens, q_match = two_steps(reuse, "cpu")
    slots = slots_on("cpu")
    beyond = table.clone()
    beyond[0, 101 // PAGE + 1 :] = page_id
    expected = mac_attn.decode(q, kv, table, seq_lens)
    assert torch.equal(mac_attn.decode(q, kv, beyond, seq_lens), expected)
    below = table.clone()
    below[:, 0] = page_id
    before = snapshot(reuse)
    with pytest.raises(ValueError, match=r"block_table\[0, 0\] is"):
        mac_attn.decode(q, kv, below, seq_lens)
    with pytest.raises(ValueError, match=r"block_table\[0, 0\] is"):  # a miss reads everything
        mac_attn.decode(
            q, kv, below, seq_lens, reuse=reuse, slots=slots, q_match=torch.randn_like(q)
        )
    for a, b in zip(snapshot(reuse), before, strict=True):
        assert torch.equal(a, b)
    mac_attn.decode(q, kv, below, seq_lens, reuse=reuse, slots=slots, q_match=q_match)
    assert reuse.stats().hit_rate == 0.5


def test_foreign_source_is_refused():
    """amend and complete check a source they are given: it may come from anywhere."""
    reuse = make_reuse("cpu")
    q, kv, table, seq_lens, q_match = two_steps(reuse, "cpu")
    slots = slots_on("cpu")
    source = torch.full((BATCH, HEADS), -1, dtype=torch.int32)
    too_old, apart, not_there = source.clone(), source.clone(), source.clone()
    too_old[0] = 100 - WINDOW - 1
    apart[1, 0] = 69
    not_there[1, :3] = 60
    for bad, message in [(too_old, "must be -1 or from"), (apart, "must be the same for all")]:
        with pytest.raises(ValueError, match=r"source\[.*" + message):
            mac_attn.amend(q, kv, table, seq_lens, source=bad, reuse=reuse, slots=slots)
    amended = mac_attn.amend(q, kv, table, seq_lens, source=source, reuse=reuse, slots=slots)
    before = snapshot(reuse)
    with pytest.raises(ValueError, match=r"source\[1, 0\] is 60, but its place in the ring holds"):
        mac_attn.complete(
            amended, seq_lens, reuse=reuse, source=not_there, q_match=q_match, slots=slots
        )
    for a, b in zip(snapshot(reuse), before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("source", [2**31 - 1, -(2**31), 7])
def test_padding_rows_may_hold_any_source(source, device):
    """A row of length 0 reads nothing; a sum with it that overflows shows in `make sanitize`."""
    args = op_arguments(make_reuse(device), device)
    seq_lens, sources = args["amend.default"][4].clone(), args["amend.default"][5].clone()
    seq_lens[1], sources[1] = 0, source
    states, state_lse, anchors = torch.ops.mac_attn.amend(
        *args["amend.default"][:4], seq_lens, sources, *args["amend.default"][6:]
    )
    assert (state_lse[:, 1] == -math.inf).all() and state_lse[:, 0].isfinite().any()
    before = args["complete.default"][9][0].clone()  # the ring of the padding row's slot
    out, lse = args["complete.default"][-2:]
    torch.ops.mac_attn.complete(
        states,
        state_lse,
        anchors,
        sources,
        args["complete.default"][4],
        seq_lens,
        *args["complete.default"][6:],
    )
    assert (lse[1] == -math.inf).all() and lse[0].isfinite().all() and not out[1].any()
    assert torch.equal(args["complete.default"][9][0], before)


def test_the_depth_of_an_entry_does_not_wrap(device):
    """Reached by a slot that was written by hand only: match refuses entries of such a depth."""
    args = op_arguments(make_reuse(device), device)["complete.default"]
    depth, position = args[11], int(args[5][0]) - 1
    depth.fill_(2**31 - 1)
    torch.ops.mac_attn.complete(*args)
    assert (depth[int(args[6][0]), :, position % WINDOW] == 2**31 - 1).all()
