"""The ops as torch sees them: opcheck, torch.compile, modes; the stages alone and in one op."""

import math

import pytest
import torch
from compare import out_tolerance, state_tolerance
from op_steps import (
    BAND,
    BATCH,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    make_reuse,
    make_step,
    op_arguments,
    prime,
    slots_on,
    snapshot,
    two_steps,
)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mac_attn

OPS = [
    f"{name}.default"
    for name in ("match", "amend", "complete", "complete_exact", "decode_exact", "decode_reuse")
]
OPS += ["decode_exact.into", "decode_reuse.into"]


def overload(name: str) -> torch._ops.OpOverload:
    packet, kind = name.split(".")
    return getattr(getattr(torch.ops.mac_attn, packet), kind)


def prime_both(one, other, *step):
    """`prime` both alike."""
    for reuse in (one, other):
        torch.manual_seed(1)
        prime(reuse, *step)


@pytest.mark.parametrize("tokens", [None, 3])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, tokens, device):
    args = op_arguments(make_reuse(device), device, tokens)[op]
    torch.library.opcheck(overload(op), args)


@pytest.mark.parametrize("query_lens", [None, [3, 2]])
def test_one_op_does_what_the_stages_do(query_lens, device):
    """`decode` is match, amend, complete: outputs, rings and counters, over misses and hits."""
    whole, apart = make_reuse(device), make_reuse(device)
    q, kv, table, seq_lens = make_step(device)
    prime_both(whole, apart, q, kv, table, seq_lens)
    slots, some, more = slots_on(device), {}, 0
    if query_lens:
        q = torch.randn(BATCH, 3, HEADS, HEAD_DIM, device=device).to(kv.dtype)
        some["query_lens"] = torch.tensor(query_lens, dtype=torch.int32, device=device)
        more = some["query_lens"] - 1
    for i in range(4):
        if i % 2 == 0:  # of several tokens the same
            one = torch.randn(BATCH, HEADS, HEAD_DIM, device=device).to(kv.dtype)
            q_match = one[:, None].expand_as(q) if query_lens else one
        lens = seq_lens + i + more
        expected = mac_attn.decode(
            q, kv, table, lens, reuse=whole, slots=slots, q_match=q_match, return_lse=True, **some
        )
        matched = mac_attn.match(apart, q_match, lens, slots, **some)
        amended = mac_attn.amend(
            q, kv, table, lens, matched=matched, reuse=apart, slots=slots, **some
        )
        got = mac_attn.complete(
            amended, lens, reuse=apart, matched=matched, q=q, q_match=q_match, slots=slots, **some
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
    prime_both(given, turned, q, kv, table, seq_lens)
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


@pytest.mark.parametrize("granularity, anchors", [("group", 8), ("head", 0)])
def test_a_request_without_a_slot_is_exact_and_leaves_no_trace(granularity, anchors, device):
    """Among others that miss and hit; those answer and are stored as if it were not there."""
    dtype = torch.bfloat16
    mixed, alone = (
        make_reuse(device, dtype, granularity=granularity, anchors=anchors) for _ in range(2)
    )
    q, kv, table, seq_lens = make_step(device, dtype)
    prime_both(mixed, alone, q, kv, table, seq_lens)
    mixed.audit(every=1)
    slots, other = slots_on(device).clone(), 1
    slots[other] = -1
    pre_rope = torch.randn_like(q)
    for i in range(3):
        lens = seq_lens + i
        call = (q, kv, table, lens)
        out, lse = mac_attn.decode(
            *call, reuse=mixed, slots=slots, q_match=pre_rope, return_lse=True
        )
        exact = [t[other] for t in mac_attn.decode(*call, return_lse=True)]
        out_tolerance(dtype, device, 2).check(out[other], exact[0], "out")
        state_tolerance(dtype, device).check(lse[other], exact[1], "lse")
        rest = [b for b in range(len(q)) if b != other]
        few = [t[rest].contiguous() for t in (q, pre_rope, table, lens, slots)]
        expected = mac_attn.decode(few[0], kv, *few[2:4], reuse=alone, slots=few[4], q_match=few[1])
        out_tolerance(dtype, device, 2).check(out[rest], expected, "the others")
    assert mixed.stats().hit_rate == alone.stats().hit_rate == pytest.approx(2 / 3)
    assert mixed.audited().steps == 3 * len(rest)
    for a, b in zip(snapshot(mixed), snapshot(alone), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
    mixed.check()


def test_more_rows_than_there_is_room_for_are_refused(cuda):
    reuse = make_reuse(cuda, torch.bfloat16)  # of 3 slots
    q, kv, table, seq_lens = make_step(cuda, torch.bfloat16)
    q, table, seq_lens = (torch.cat([t, t]) for t in (q, table, seq_lens))
    slots = torch.full((4,), -1, dtype=torch.int32, device=cuda)
    with pytest.raises(ValueError, match="batch is 4, must be at most max_batch_size .* 3"):
        mac_attn.decode(q, kv, table, seq_lens, reuse=reuse, slots=slots, q_match=q)


def test_a_source_needs_a_slot():
    reuse = make_reuse("cpu")
    q, kv, table, seq_lens, _ = two_steps(reuse, "cpu")
    slots = slots_on("cpu").clone()
    slots[0] = -1
    source = torch.full(q.shape[:2], 99, dtype=torch.int32)
    matched = mac_attn.Matched(source, source - 99, torch.zeros(BATCH, KV_HEADS, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"source\[0, 0\] is 99, must be -1, as slots\[0\] is -1"):
        mac_attn.amend(q, kv, table, seq_lens, matched=matched, reuse=reuse, slots=slots)


def test_the_op_takes_queries_or_a_rotation():
    args = list(op_arguments(make_reuse("cpu"), torch.device("cpu"))["decode_reuse.default"])
    op = torch.ops.mac_attn.decode_reuse
    with pytest.raises(ValueError, match="both are given"):
        op(*args[:-3], torch.ones(4), *args[-2:])
    args[10] = None
    with pytest.raises(ValueError, match="neither is given"):
        op(*args)
    args[-3] = torch.ones(4)
    torch.library.opcheck(op.default, tuple(args))
    args[-3] = torch.ones(HEAD_DIM)
    with pytest.raises(ValueError, match="inv_freq has"):
        op(*args)
    args[7] = args[7].long()
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


def test_a_backward_pass_raises(device):
    """It would leave wrong gradients without a word. What is stored has no part in it."""
    reuse = make_reuse(device)
    q, kv, table, seq_lens = make_step(device)
    q.requires_grad_()
    for options in ({}, dict(reuse=reuse, slots=slots_on(device), q_match=q)):
        out = mac_attn.decode(q, kv, table, seq_lens, **options)
        with pytest.raises(RuntimeError, match="derivative for mac_attn::decode_.* is not impl"):
            out.sum().backward()
    assert q.grad is None and not reuse.ring.requires_grad


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
    prime_both(plain, compiled, q * 2, kv, table, seq_lens)
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

    matched = mac_attn.match(reuse, q_match, seq_lens, slots)
    states, lse = torch.zeros(2, *q.shape, device=device), torch.full((2, *q.shape[:2]), -math.inf)
    lse = lse.to(device)
    for b in range(BATCH):
        tokens = kv[table[b].long()].float()
        k, v = (x.flatten(0, 1).repeat_interleave(3, 1) for x in tokens.unbind(1))
        n = int(seq_lens[b])
        for h in range(HEADS):
            start = max(0, int(matched.source[b, h]) + 1 - BAND)
            for row, span in enumerate([slice(start, n - BAND), slice(n - BAND, n)]):
                logits = k[span, h] @ q[b, h].float() / math.sqrt(HEAD_DIM)
                lse[row, b, h] = logits.logsumexp(0)
                states[row, b, h] = logits.softmax(0) @ v[span, h]
    none = torch.empty(BATCH, KV_HEADS, 0, dtype=torch.int32, device=device)
    amended = mac_attn.Amended(
        states, lse, torch.zeros_like(lse[0]), none, none.float(), torch.zeros_like(matched.stored)
    )
    got = mac_attn.complete(
        amended, seq_lens, reuse=reuse, matched=matched, q=q, q_match=q_match, slots=slots
    )
    out_tolerance(q.dtype, device, 2).check(got[0], expected[0], "out")
    states = zip((got[1], *snapshot(reuse)), (expected[1], *snapshot(twin)), strict=True)
    for i, (a, b) in enumerate(states):
        state_tolerance(q.dtype, device).check(a, b, f"lse and states, {i}")


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


@pytest.mark.parametrize("source", [2**31 - 1, -(2**31), 7])
def test_padding_rows_may_hold_any_source(source, device):
    """A row of length 0 reads nothing; a sum with it that overflows shows in `make sanitize`."""
    reuse = make_reuse(device)
    args = op_arguments(reuse, device)
    amend, complete = args["amend.default"], args["complete.default"]
    seq_lens, matched = amend[6].clone(), [t.clone() for t in amend[8:11]]
    seq_lens[1] = 0
    for t in matched:
        t[1] = source
    amended = torch.ops.mac_attn.amend(*amend[:6], seq_lens, None, *matched, *amend[11:])
    state_lse = amended[1]
    assert (state_lse[:, 1] == -math.inf).all() and state_lse[:, 0].isfinite().any()
    before = reuse.ring[0].clone()  # of the padding row's slot
    out, lse = complete[-2:]
    torch.ops.mac_attn.complete(*amended, *matched, *complete[9:11], seq_lens, *complete[12:])
    assert (lse[1] == -math.inf).all() and lse[0].isfinite().all() and not out[1].any()
    assert torch.equal(reuse.ring[0], before)


def test_the_depth_of_an_entry_does_not_wrap(device):
    """Reached by a slot that was written by hand only: match refuses entries of such a depth."""
    reuse = make_reuse(device, anchors=0, max_reuse_depth=None)
    args = op_arguments(reuse, device)["complete.default"]
    reuse.ring_depth.fill_(2**31 - 1)
    before = reuse.ring_stored.clone()
    torch.ops.mac_attn.complete(*args)
    assert torch.equal(reuse.ring_stored, before)  # nothing can be deeper, so it is not stored
    assert reuse.slot_end[2] == int(args[11][0])
