"""Arguments that do not fit: each is named, nothing is written, and the step can still be made."""

import math

import pytest
import torch
from op_steps import (
    BATCH,
    ENTRIES,
    HEAD_DIM,
    PAGE,
    PAGES,
    make_reuse,
    make_step,
    slots_on,
    snapshot,
    two_steps,
)

import mac_attn


# Each case changes one argument; the error names it and nothing is written.
def bad_cases(device) -> dict[str, tuple[dict, type[Exception], str]]:
    q, kv, table, seq_lens = make_step(device)
    other_heads = torch.empty(BATCH * PAGES, 2, PAGE, 3, HEAD_DIM, dtype=q.dtype, device=device)
    return {
        "q a list": ({"q": [1.0]}, TypeError, "q is of type list"),
        "q of two dims": ({"q": q[0]}, ValueError, "q has shape"),
        "q int": ({"q": q.int()}, TypeError, "q is"),
        "q of another head_dim": ({"q": q[..., :32]}, ValueError, "q"),
        "q of another head count": ({"q": q[:, :4]}, ValueError, "q"),
        "q strided in the last dim": (
            {"q": torch.cat([q, q], dim=-1)[..., ::2]},
            ValueError,
            "q has stride",
        ),
        "kv of another dtype": ({"kv_cache": kv.half()}, TypeError, "k_cache is"),
        "kv on another device": ({"kv_cache": kv.to("meta")}, ValueError, "k_cache is on"),
        "kv of another head count": ({"kv_cache": other_heads}, ValueError, "k_cache has shape"),
        "kv a pair without v": ({"kv_cache": (kv[:, 0], None)}, TypeError, "v_cache is None"),
        "kv one in a pair": ({"kv_cache": (kv, None)}, ValueError, "k_cache has shape"),
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
            {"out": torch.cat([q, q], dim=-1)[..., ::2]},
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
        "negative slot": ({"slots": ints(-2, 0)}, r"slots\[0\] is -2"),
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


def test_what_match_did_not_answer_is_refused():
    """amend and complete check what they are given: it may come from anywhere."""
    reuse = make_reuse("cpu")
    q, kv, table, seq_lens, q_match = two_steps(reuse, "cpu")
    slots = slots_on("cpu")
    good = mac_attn.match(reuse, q_match, seq_lens, slots)
    amended = mac_attn.amend(q, kv, table, seq_lens, matched=good, reuse=reuse, slots=slots)
    before = snapshot(reuse)

    def changed(part: str, where: tuple, value: int) -> mac_attn.Matched:
        tensor = getattr(good, part).clone()
        tensor[where] = value
        return good._replace(**{part: tensor})

    row = (1, slice(0, 3))
    for bad, message in [
        (changed("source", row, 70), r"source\[1, 0\] is 70, must be -1 or from 8 to 69"),
        (changed("source", row, 7), r"source\[1, 0\] is 7, must be -1 or from 8"),
        (changed("source", row, 60), r"source\[1, 0\] is 60, but its place in the ring, 0, holds"),
        (changed("source", (1, 1), -1), r"source\[1, 1\] is -1 at place 0, must be the same"),
        (changed("place", row, ENTRIES), r"place\[1, 0\] is 16, must be from 0 to 15"),
        (changed("place", row, 3), r"source\[1, 0\] is 69, but its place in the ring, 3, holds"),
        (changed("stored", (1, 0), 2 * ENTRIES), r"stored\[1, 0\] is 32, must be from -1 to 31"),
        (changed("stored", (1, 0), -2), r"stored\[1, 0\] is -2, must be from -1 to 31"),
    ]:
        with pytest.raises(ValueError, match=message):
            mac_attn.amend(q, kv, table, seq_lens, matched=bad, reuse=reuse, slots=slots)
        with pytest.raises(ValueError, match=message):
            mac_attn.complete(
                amended, seq_lens, reuse=reuse, matched=bad, q=q, q_match=q_match, slots=slots
            )
    with pytest.raises(ValueError, match="matched is None"):
        mac_attn.complete(amended, seq_lens, reuse=reuse, q=q, q_match=q_match, slots=slots)
    with pytest.raises(ValueError, match="matched and reuse: one is None"):
        mac_attn.amend(q, kv, table, seq_lens, matched=good)
    for a, b in zip(snapshot(reuse), before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [93, 2**31 - 1, -2, -(2**31)])
def test_anchors_that_no_entry_can_have_are_refused(bad):
    """As a slot may hold that was imported from who knows where; nothing is read there."""
    reuse = make_reuse("cpu")
    q, kv, table, seq_lens, q_match = two_steps(reuse, "cpu")
    place = int(mac_attn.match(reuse, q_match, seq_lens, slots_on("cpu")).place[0, 0])
    reuse.ring_anchors[2, 0, place, 1] = bad  # E(99) is 92
    before = snapshot(reuse)
    options = dict(reuse=reuse, slots=slots_on("cpu"), q_match=q_match)
    with pytest.raises(ValueError, match=f"ring_anchors of slot 2, position 99 hold {bad}, must"):
        mac_attn.decode(q, kv, table, seq_lens, **options)
    for a, b in zip(snapshot(reuse), before, strict=True):
        assert torch.equal(a, b)
