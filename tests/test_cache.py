"""ReuseCache: construction, reset, fork, truncate, statistics, errors found on the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mac_attn import ReuseCache, ReuseConfig, RotaryEmbedding
from mac_attn.cache import ERROR_BLOCK_TABLE, ERROR_SEQ_LENS, ERROR_SLOTS, _valid_slots
from mac_attn.slot_state import SLOT_TENSORS

OPTIONS: dict[str, Any] = dict(
    num_slots=5, num_qo_heads=6, num_kv_heads=2, head_dim=16, dtype=torch.float32
)
WINDOW, ANCHORS = 8, 3


def make_cache(**changes: Any) -> ReuseCache:
    return ReuseCache(ReuseConfig(window=WINDOW, anchors=ANCHORS, band=4), **OPTIONS | changes)


def fill(cache: ReuseCache) -> dict[str, Tensor]:
    """Random contents with a consistent history; returns copies of all tensors of the slots.

    Slot i ends at 20 + i, begins 6 before and is tagged accordingly.
    """
    for name in SLOT_TENSORS:
        tensor = getattr(cache, name)
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape))
        else:
            tensor.copy_(torch.randint(1, 100, tensor.shape))
    for slot in range(cache.num_slots):
        end = 20 + slot
        cache.slot_begin[slot], cache.slot_end[slot] = end - 6, end
        for position in range(end - WINDOW, end):
            cache.ring_position[slot, position % WINDOW] = position
    return {name: getattr(cache, name).clone() for name in SLOT_TENSORS}


def is_empty(cache: ReuseCache, slot: int) -> bool:
    return (
        cache.slot_begin[slot] == cache.slot_end[slot] == 0
        and cache.slot_request[slot] == -1
        and bool((cache.ring_position[slot] == -1).all())
        and not cache.counters[slot].any()
    )


def unchanged(cache: ReuseCache, before: dict[str, Tensor], slots: list[int]) -> bool:
    return all(torch.equal(getattr(cache, n)[slots], before[n][slots]) for n in SLOT_TENSORS)


GIVEN = {
    "list": list,
    "tuple": tuple,
    "int32 tensor": lambda values: torch.tensor(values, dtype=torch.int32),
    "int64 tensor": lambda values: torch.tensor(values, dtype=torch.int64),
}


@pytest.fixture(params=GIVEN)
def given(request, device):
    """How slots and lengths may be handed over; a tensor on the device among them."""
    make = GIVEN[request.param]

    def give(*values: int) -> Any:
        made = make(values)
        return made.to(device) if isinstance(made, Tensor) else made

    return give


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("anchors", [0, 3])
def test_tensors(dtype, anchors, device):
    cfg = ReuseConfig(window=WINDOW, anchors=anchors, threshold=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    cache = ReuseCache(cfg, **OPTIONS | dict(dtype=dtype), device=device, max_batch_size=7)
    shapes = {
        "ring_query": ((5, 2, 8, 3, 16), dtype),
        "ring_out": ((5, 2, 8, 3, 16), torch.float32),
        "ring_lse": ((5, 2, 8, 3), torch.float32),
        "ring_depth": ((5, 2, 8, 3), torch.int32),
        "ring_anchors": ((5, 2, 8, anchors), torch.int32),
        "ring_position": ((5, 8), torch.int32),
        "slot_begin": ((5,), torch.int32),
        "slot_end": ((5,), torch.int32),
        "slot_request": ((5,), torch.int64),
        "counters": ((5, 6), torch.int64),
        "threshold": ((6,), torch.float32),
        "error_flag": ((1,), torch.int32),
        "workspace": ((0 if device.type == "cpu" else 7 * (2 * (6 + 2) + 1) + 1,), torch.int32),
    }
    size = 0
    for name, (shape, kind) in shapes.items():
        tensor = getattr(cache, name)
        assert (tensor.shape, tensor.dtype, tensor.device) == (shape, kind, cache.device), name
        assert tensor.is_contiguous(), name
        size += tensor.nbytes
    assert cache.nbytes == size
    assert cache.device == torch.empty(0, device=device).device
    assert (cache.num_slots, cache.group_size, cache.dtype) == (5, 3, dtype)
    assert all(is_empty(cache, slot) for slot in range(5))
    assert (cache.ring_lse == -torch.inf).all() and (cache.ring_anchors == -1).all()
    assert torch.equal(cache.threshold.cpu(), cfg.threshold_per_head(6, 16))
    cache.check()
    assert "num_slots=5" in repr(cache) and "MiB" in repr(cache)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, "num_slots is 0", dict(num_slots=0)),
        (TypeError, "num_slots is of type float", dict(num_slots=2.0)),
        (ValueError, "max_batch_size is 4, must be .* 5", dict(max_batch_size=4)),
        (ValueError, "num_qo_heads is 6, must be a .* multiple .* = 4", dict(num_kv_heads=4)),
        (ValueError, "num_kv_heads is 0", dict(num_kv_heads=0)),
        (ValueError, "head_dim is 24, must be a multiple of 16", dict(head_dim=24)),
        (ValueError, "head_dim is 512, must be from 16 to 256", dict(head_dim=512)),
        (TypeError, "dtype is torch.float64", dict(dtype=torch.float64)),
        (TypeError, "rotary is of type Tensor", dict(rotary=torch.rand(8))),
        (ValueError, "rotary rotates 32", dict(rotary=RotaryEmbedding(torch.rand(16)))),
    ],
)
def test_refuses_bad_arguments(error, message, changes):
    with pytest.raises(error, match=message):
        make_cache(**changes)


def test_refuses_other_configs():
    with pytest.raises(TypeError, match="cfg is of type dict, must be a ReuseConfig"):
        ReuseCache({"window": 8}, **OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threshold has 2 numbers"):
        ReuseCache(ReuseConfig(threshold=[0.1, 0.2]), **OPTIONS)


def test_says_how_much_memory_is_missing():
    # 2^30 * 2^20 places: more than 2^57 bytes, which not even an address space holds.
    cfg = ReuseConfig(window=2**20, anchors=ANCHORS)
    with pytest.raises(MemoryError, match=r"num_slots = 1073741824 .* need \d+\.\d MiB on cpu"):
        ReuseCache(cfg, **OPTIONS | dict(num_slots=2**30))


def test_reset(given, device):
    cache = make_cache(device=device)
    before = fill(cache)
    cache.reset(given(3, 1, 3))
    assert is_empty(cache, 1) and is_empty(cache, 3)
    assert unchanged(cache, before, [0, 2, 4])
    cache.reset(0)
    assert is_empty(cache, 0) and unchanged(cache, before, [2, 4])
    cache.reset([])
    assert unchanged(cache, before, [2, 4])
    cache.reset()
    assert all(is_empty(cache, slot) for slot in range(5))
    cache.check()


def test_fork(given, device):
    cache = make_cache(device=device)
    before = fill(cache)
    cache.fork(given(0, 0, 4), given(2, 1, 3))
    for dst, src in ((2, 0), (1, 0), (3, 4)):
        for name in SLOT_TENSORS[:-1]:
            assert torch.equal(getattr(cache, name)[dst], before[name][src]), name
        assert not cache.counters[dst].any()
    assert unchanged(cache, before, [0, 4])
    cache.check()


def test_fork_of_one_slot_and_of_none(device):
    cache = make_cache(device=device)
    before = fill(cache)
    cache.fork(4, 0)
    assert torch.equal(cache.ring_out[0], before["ring_out"][4])
    cache.fork([], [])
    assert unchanged(cache, before, [1, 2, 3, 4])


def test_fork_names_the_requests_of_the_copies(given, device):
    cache = make_cache(device=device)
    before = fill(cache)
    cache.fork(given(0, 0), given(2, 1), request_ids=[2**62, 5])
    assert cache.slot_request[[2, 1]].tolist() == [2**62, 5]
    assert unchanged(cache, before, [0, 3, 4])
    assert torch.equal(cache.ring_out[2], before["ring_out"][0])
    cache.fork(given(0), given(3), request_ids=torch.tensor([9], device=device))
    assert cache.slot_request[3] == 9
    cache.check()


def test_fork_reads_before_it_writes(device):
    cache = make_cache(device=device)
    before = fill(cache)
    cache.fork([0, 1, 2], [1, 2, 0])
    for name in SLOT_TENSORS[:-1]:
        assert torch.equal(getattr(cache, name)[[1, 2, 0]], before[name][[0, 1, 2]]), name


def test_truncate(given, device):
    cache = make_cache(device=device)
    before = fill(cache)
    # Ends are 20 .. 24, begins 14 .. 18: within the entries, before all of them, at the end.
    cache.truncate(given(0, 1, 4), given(17, 3, 24))
    assert cache.slot_end.tolist() == [17, 3, 22, 23, 24]
    assert cache.slot_begin.tolist() == [14, 3, 16, 17, 18]
    for slot, length in ((0, 17), (1, 3)):
        tags = before["ring_position"][slot]
        want = torch.where(tags < length, tags, -1)
        assert torch.equal(cache.ring_position[slot], want)
    assert unchanged(cache, before, [2, 3, 4])
    for name in ("ring_query", "ring_out", "slot_request", "counters"):
        assert torch.equal(getattr(cache, name), before[name]), name
    before = {name: getattr(cache, name).clone() for name in SLOT_TENSORS}
    cache.truncate([2, 3], torch.tensor([23, 2**40]))  # nothing lies there
    assert unchanged(cache, before, [0, 1, 2, 3, 4])
    cache.truncate(2, 0)
    assert (cache.slot_begin[2], cache.slot_end[2]) == (0, 0)
    assert (cache.ring_position[2] == -1).all()
    cache.check()


BAD_SLOTS = [
    (ValueError, "{} is 5, must be from 0 to 4", [1, 5]),
    (ValueError, "{} is -1, must be from 0 to 4", [-1]),
    (ValueError, "{} is -1, must be from 0 to 4", torch.tensor([-1])),
    (ValueError, r"{} has shape \[1, 1\]", torch.tensor([[1]])),
    (TypeError, "{} is torch.float32", torch.rand(2)),
    (TypeError, "{} is torch.bool", torch.tensor([True])),
    (TypeError, "{} is of type str", "12"),
    (TypeError, "{} is of type float", [1.0]),
    (TypeError, "{} is None", [None]),
]


@pytest.mark.parametrize(("error", "message", "slots"), BAD_SLOTS)
def test_bad_slots_raise_and_change_nothing(error, message, slots):
    cache = make_cache()
    before = fill(cache)
    count = len(slots)
    for name, call in {
        "slots": lambda: cache.reset(slots),
        "src": lambda: cache.fork(slots, [0, 2][:count]),
        "dst": lambda: cache.fork([0, 2][:count], slots),
        "slots ": lambda: cache.truncate(slots, [1, 1][:count]),
    }.items():
        with pytest.raises(error, match=message.format(name.strip())):
            call()
    assert unchanged(cache, before, list(range(5)))


def test_bad_pairs_raise_and_change_nothing():
    cache = make_cache()
    before = fill(cache)
    with pytest.raises(ValueError, match="dst holds 3 twice"):
        cache.fork([0, 1], [3, 3])
    with pytest.raises(ValueError, match="dst has 1 slots, must have 2 as src"):
        cache.fork([0, 1], [3])
    with pytest.raises(ValueError, match="slots holds 2 twice"):
        cache.truncate([2, 2], [4, 5])
    with pytest.raises(ValueError, match="seq_lens has 1 lengths, must have 2 as slots"):
        cache.truncate([2, 3], [4])
    with pytest.raises(ValueError, match="seq_lens for slot 3 is -1, must not be negative"):
        cache.truncate([0, 3], [20, -1])
    with pytest.raises(ValueError, match="request_ids has 1 ids, must have 2 as dst"):
        cache.fork([0, 1], [3, 4], [7])
    with pytest.raises(ValueError, match=r"request_ids\[1\] is -1, must not be negative"):
        cache.fork([0, 1], [3, 4], [7, -1])
    with pytest.raises(TypeError, match="request_ids is torch.float32"):
        cache.fork([0, 1], [3, 4], torch.rand(2))
    assert unchanged(cache, before, list(range(5)))


# What the methods do with values that lie on a GPU, where a wrong one cannot raise. The same code
# runs on any device, so that it is tested here on the CPU too: `_valid_slots` stands in for the
# checks of host values.


@pytest.fixture
def unread(monkeypatch, device):
    """A filled cache that treats slots as if they were on a GPU."""
    cache = make_cache(device=device)

    def slots(name: str, given: Any, *, distinct: bool) -> tuple[Tensor, Tensor]:
        given = torch.as_tensor(given, device=device)
        index, valid = _valid_slots(given, cache.num_slots, distinct=distinct)
        cache._flag(~valid, ERROR_SLOTS)
        return index, valid

    monkeypatch.setattr(cache, "_slots", slots)
    return cache


def test_unread_slots_that_are_valid(unread):
    before = fill(unread)
    unread.fork([0, 0, 4], [2, 1, 3])
    assert torch.equal(unread.ring_out[[2, 1, 3]], before["ring_out"][[0, 0, 4]])
    assert torch.equal(unread.slot_request[[2, 1, 3]], before["slot_request"][[0, 0, 4]])
    unread.fork([4, 0], [3, 1], [70, 71])
    assert unread.slot_request[[3, 1]].tolist() == [70, 71]
    unread.truncate([2], [15])
    assert unread.slot_end.tolist() == [20, 20, 15, 24, 24]
    unread.reset([4])
    assert is_empty(unread, 4)
    unread.check()


def test_unread_bad_slots_of_reset(unread):
    before = fill(unread)
    unread.reset([5, 1, -7, 2**40])
    assert is_empty(unread, 1) and unchanged(unread, before, [0, 2, 3, 4])
    with pytest.raises(ValueError, match="slots held"):
        unread.check()
    unread.check()  # it has cleared the flag


@pytest.mark.parametrize(
    ("src", "dst", "copied", "emptied"),
    [
        ([0, 9], [1, 2], {1: 0}, [2]),  # no such source
        ([9, 0], [1, 2], {2: 0}, [1]),  # the first pair is the bad one
        ([0, 3], [1, -1], {1: 0}, []),  # no such target
        ([0, 3, 4], [1, 2, 1], {2: 3}, [1]),  # two sources for one target: neither
        ([9, 3], [1, 9], {}, [1]),  # no pair is left
    ],
)
def test_unread_bad_pairs_of_fork(src, dst, copied, emptied, unread):
    before = fill(unread)
    unread.fork(src, dst, request_ids=list(range(50, 50 + len(dst))))
    for target, source in copied.items():
        for name in SLOT_TENSORS[:-2]:
            assert torch.equal(getattr(unread, name)[target], before[name][source]), name
        assert unread.slot_request[target] == 50 + dst.index(target)
    assert all(is_empty(unread, slot) for slot in emptied)
    others = set(range(5)) - set(copied) - set(emptied)
    assert unchanged(unread, before, sorted(others))
    with pytest.raises(ValueError, match="slots held"):
        unread.check()


def test_flag_names_every_cause(device):
    cache = make_cache(device=device)
    for bit, text in ((ERROR_SEQ_LENS, "seq_lens"), (ERROR_BLOCK_TABLE, "block_table")):
        cache.error_flag.bitwise_or_(bit)
        with pytest.raises(ValueError, match=f"^{text} held"):
            cache.check()
        cache.check()
    cache.error_flag.fill_(ERROR_SEQ_LENS | ERROR_BLOCK_TABLE | ERROR_SLOTS)
    with pytest.raises(ValueError, match=r"seq_lens held.*block_table held.*slots held"):
        cache.check()


def test_wrong_lengths_on_the_gpu_are_flagged(device):
    if device.type == "cpu":
        pytest.skip("on the CPU they raise")
    cache = make_cache(device=device)
    fill(cache)
    cache.truncate(
        torch.tensor([0, 1, 2], device=device), torch.tensor([99, -4, 18], device=device)
    )  # 99 lies beyond the end, which is no mistake
    assert cache.slot_end.tolist() == [20, 0, 18, 23, 24]
    with pytest.raises(ValueError, match="seq_lens held"):
        cache.check()


def test_no_method_reads_back_from_the_gpu(device):
    if device.type == "cpu":
        pytest.skip("nothing to wait for")
    cache = make_cache(device=device)
    fill(cache)
    src, dst, lens = (torch.tensor(v, device=device) for v in ([0, 1], [2, 9], [3, 99]))
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.fork(src, dst)
        cache.truncate(dst, lens)
        cache.reset(dst)
        cache.reset()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_stats(device):
    cache = make_cache(device=device)
    stats = cache.stats()
    assert (stats.steps, stats.hit_rate, stats.kv_head_hit_rate, stats.kv_read_share) == (
        0,
        0,
        0,
        1,
    )
    # steps, kv_head_steps, kv_head_hits, query_head_hits, kv_tokens_read, kv_tokens_full
    cache.counters[1] = torch.tensor([10, 20, 12, 40, 3000, 10000])
    cache.counters[4] = torch.tensor([2, 4, 0, 1, 4000, 4000])
    stats = cache.stats()
    assert (stats.steps, stats.kv_head_steps, stats.kv_head_hits) == (12, 24, 12)
    assert (stats.query_head_hits, stats.kv_tokens_read, stats.kv_tokens_full) == (41, 7000, 14000)
    assert stats.hit_rate == 41 / (12 * 6)
    assert stats.kv_head_hit_rate == 0.5 and stats.kv_read_share == 0.5
    assert stats.per_slot.device.type == "cpu"
    one = stats.slot(1)
    assert (one.steps, one.hit_rate, one.kv_read_share) == (10, 40 / 60, 0.3)
    assert stats.slot(0).hit_rate == 0
    assert str(stats) == (
        "12 steps: 56.9% of query heads and 50.0% of KV heads hit, 50.0% of the KV read"
    )
    cache.counters.zero_()
    assert stats.steps == 12  # a snapshot
