"""ReuseCache: construction, reset, fork, truncate, statistics, errors found on the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from poison import same_bits
from torch import Tensor

from mac_attn import ReuseCache, ReuseConfig, RotaryEmbedding
from mac_attn._slot_numbers import valid_slots
from mac_attn.cache import ERROR_BLOCK_TABLE, ERROR_SEQ_LENS, ERROR_SLOTS

OPTIONS: dict[str, Any] = dict(
    num_slots=5, num_qo_heads=6, num_kv_heads=2, head_dim=16, dtype=torch.float32
)
ENTRIES, ANCHORS = 8, 3
# Views of the ring, with their shapes behind the slots' dimension; None is the queries' dtype.
PARTS: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
    "slot_end": ((), torch.int32),
    "slot_reach": ((), torch.int32),
    "slot_request": ((), torch.int64),
    "counters": ((8,), torch.int64),
    "ring_stored": ((2,), torch.int32),
    "ring_tau": ((2,), torch.float32),
    "ring_spread": ((2,), torch.float32),
    "ring_missed": ((2,), torch.int32),
    "ring_last_lse": ((2, 3), torch.float32),
    "ring_position": ((2, ENTRIES), torch.int32),
    "ring_depth": ((2, ENTRIES, 3), torch.int32),
    "ring_query": ((2, ENTRIES, 3, 16), None),
    "ring_out": ((2, ENTRIES, 3, 16), torch.float32),
    "ring_lse": ((2, ENTRIES, 3), torch.float32),
    "ring_rotated": ((2, ENTRIES, 3, 16), None),
    "ring_anchors": ((2, ENTRIES, ANCHORS), torch.int32),
    "ring_anchor_weights": ((2, ENTRIES, ANCHORS), torch.float32),
}


def make_cache(**changes: Any) -> ReuseCache:
    return ReuseCache(ReuseConfig(entries=ENTRIES, anchors=ANCHORS, band=4), **OPTIONS | changes)


def fill(cache: ReuseCache) -> dict[str, Tensor]:
    """Random bytes with a consistent history; returns copies of `ring` and of all its parts.

    Slot i ends at 20 + i and has entries of the last positions.
    """
    entries = cache.cfg.entries
    cache.ring.copy_(torch.randint(0, 256, cache.ring.shape, dtype=torch.uint8))
    cache.ring_stored.fill_(entries)
    cache.slot_request.copy_(torch.randint(1, 100, (cache.num_slots,)))
    for slot in range(cache.num_slots):
        end = 20 + slot
        cache.slot_end[slot] = cache.slot_reach[slot] = end
        cache.ring_position[slot] = torch.arange(end - entries, end, dtype=torch.int32)
    return {name: getattr(cache, name).clone() for name in ("ring", *PARTS)}


def is_empty(cache: ReuseCache, slot: int) -> bool:
    return (
        cache.slot_end[slot] == cache.slot_reach[slot] == 0
        and cache.slot_request[slot] == -1
        and not cache.ring_stored[slot].any()
        and not cache.ring_tau[slot].any()
        and not cache.ring_missed[slot].any()
        and not cache.counters[slot].any()
    )


def unchanged(cache: ReuseCache, before: dict[str, Tensor], slots: list[int]) -> bool:
    return torch.equal(cache.ring[slots], before["ring"][slots])


def assert_copied(
    cache: ReuseCache,
    dst: list[int],
    before: dict[str, Tensor],
    src: list[int],
    but: tuple[str, ...] = ("counters",),
) -> None:
    """Slots `dst` hold what `src` held before, all parts except some."""
    for name in set(PARTS) - set(but):
        assert same_bits(getattr(cache, name)[dst], before[name][src]), name


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
@pytest.mark.parametrize("anchors", [0, ANCHORS])
def test_tensors(dtype, anchors, device):
    cfg = ReuseConfig(entries=ENTRIES, anchors=anchors, threshold=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    cache = ReuseCache(cfg, **OPTIONS | dict(dtype=dtype), device=device, max_batch_size=7)
    assert cache.device == torch.empty(0, device=device).device
    used = torch.zeros(cache.ring.shape, dtype=torch.uint8)
    for name, (shape, kind) in PARTS.items():
        tensor = getattr(cache, name)
        if "anchor" in name:
            shape = (*shape[:-1], anchors)
        if name == "ring_rotated" and not anchors:
            shape = (2, ENTRIES, 0, 16)
        assert (tensor.shape, tensor.dtype) == ((5, *shape), kind or dtype), name
        assert tensor.device == cache.device, name
        if tensor.numel():  # of its own bytes, none of which another part has
            assert tensor.untyped_storage().data_ptr() == cache.ring.data_ptr()
            used += bytes_of(tensor, cache.ring)
    assert used.max() == 1 and used.sum() > 0.5 * used.numel()  # the rest is padding
    assert cache.ring.is_contiguous() and cache.ring.shape[1] % 64 == 0
    assert (cache.threshold.shape, cache.threshold.dtype) == ((6,), torch.float32)
    assert (cache.error_flag.shape, cache.error_flag.dtype) == ((1,), torch.int32)
    size = sum(t.nbytes for t in (cache.ring, cache.threshold, cache.error_flag, cache.workspace))
    assert cache.nbytes == size
    assert (cache.num_slots, cache.group_size, cache.dtype, cache.layer) == (5, 3, dtype, 0)
    assert all(is_empty(cache, slot) for slot in range(5))
    assert torch.equal(cache.threshold.cpu(), cfg.threshold_per_head(6, 16))
    cache.check()
    assert "num_slots=5" in repr(cache) and "MiB" in repr(cache)


def bytes_of(part: Tensor, ring: Tensor) -> Tensor:
    """1 for the bytes of `ring` that belong to a part, 0 for the others."""
    before = ring.clone()
    ring.zero_()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[part.itemsize]
    part.view(integers).fill_(-1)
    mask = (ring != 0).to(torch.uint8).cpu()
    ring.copy_(before)
    return mask


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, "num_slots is 0", dict(num_slots=0)),
        (TypeError, "num_slots is of type float", dict(num_slots=2.0)),
        (ValueError, "max_batch_size is 4, must be .* 5", dict(max_batch_size=4)),
        (ValueError, "num_qo_heads is 6, must be a .* multiple .* = 4", dict(num_kv_heads=4)),
        (ValueError, "num_kv_heads is 0", dict(num_kv_heads=0)),
        (ValueError, "layer is -1", dict(layer=-1)),
        (ValueError, "head_dim is 20, must be a multiple of 8 up to 256", dict(head_dim=20)),
        (ValueError, "head_dim is 264, must be .* up to 256, or 512", dict(head_dim=264)),
        (ValueError, "head_dim is 520, must be from 8 to 512", dict(head_dim=520)),
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
        ReuseCache({"entries": 8}, **OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threshold has 2 numbers"):
        ReuseCache(ReuseConfig(threshold=[0.1, 0.2]), **OPTIONS)


def test_says_how_much_memory_is_missing():
    # 2^30 * 2^20 places: more than 2^57 bytes, which not even an address space holds.
    cfg = ReuseConfig(entries=2**20, anchors=ANCHORS)
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
    assert_copied(cache, [2, 1, 3], before, [0, 0, 4])
    assert not cache.counters[[2, 1, 3]].any()
    assert unchanged(cache, before, [0, 4])
    cache.check()


def test_fork_of_one_slot_and_of_none(device):
    cache = make_cache(device=device)
    before = fill(cache)
    cache.fork(4, 0)
    assert_copied(cache, [0], before, [4])
    cache.fork([], [])
    assert unchanged(cache, before, [1, 2, 3, 4])


def test_fork_names_the_requests_of_the_copies(given, device):
    cache = make_cache(device=device)
    before = fill(cache)
    cache.fork(given(0, 0), given(2, 1), request_ids=[2**62, 5])
    assert cache.slot_request[[2, 1]].tolist() == [2**62, 5]
    assert unchanged(cache, before, [0, 3, 4])
    assert_copied(cache, [2], before, [0], but=("counters", "slot_request"))
    cache.fork(given(0), given(3), request_ids=torch.tensor([9], device=device))
    assert cache.slot_request[3] == 9
    cache.check()


def test_fork_reads_before_it_writes(device):
    cache = make_cache(device=device)
    before = fill(cache)
    cache.fork([0, 1, 2], [1, 2, 0])
    assert_copied(cache, [1, 2, 0], before, [0, 1, 2])


def test_truncate(given, device):
    cache = make_cache(device=device)
    before = fill(cache)
    # Ends are 20 .. 24: within the entries, before all of them, at the end.
    cache.truncate(given(0, 1, 4), given(17, 3, 24))
    assert cache.slot_end.tolist() == [17, 3, 22, 23, 24]
    assert cache.ring_position[0].tolist() == [[12, 13, 14, 15, 16, -1, -1, -1]] * 2
    assert (cache.ring_position[1] == -1).all()
    assert unchanged(cache, before, [2, 3, 4])
    assert_copied(cache, [0, 1], before, [0, 1], but=("slot_end", "slot_reach", "ring_position"))
    before = {"ring": cache.ring.clone()}
    cache.truncate([2, 3], torch.tensor([23, 2**40]))  # nothing lies there
    assert unchanged(cache, before, [0, 1, 2, 3, 4])
    cache.truncate(2, 0)
    assert cache.slot_end[2] == 0 and (cache.ring_position[2] == -1).all()
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
# runs on any device, so that it is tested here on the CPU too: `valid_slots` stands in for the
# checks of host values.


@pytest.fixture
def unread(monkeypatch, device):
    """A filled cache that treats slots as if they were on a GPU."""
    cache = make_cache(device=device)

    def slots(name: str, given: Any, *, distinct: bool) -> tuple[Tensor, Tensor]:
        given = torch.as_tensor(given, device=device)
        index, valid = valid_slots(given, cache.num_slots, distinct=distinct)
        cache._flag(~valid, ERROR_SLOTS)
        return index, valid

    monkeypatch.setattr(cache, "_slots", slots)
    return cache


def test_unread_slots_that_are_valid(unread):
    before = fill(unread)
    unread.fork([0, 0, 4], [2, 1, 3])
    assert_copied(unread, [2, 1, 3], before, [0, 0, 4])
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
        assert_copied(unread, [target], before, [source], but=("counters", "slot_request"))
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
    # steps, kv_head_steps, kv_head_hits, query_head_hits, kv_tokens_read, kv_tokens_full,
    # anchors_read, entries_stored
    cache.counters[1] = torch.tensor([10, 20, 12, 40, 3000, 10000, 600, 7])
    cache.counters[4] = torch.tensor([2, 4, 0, 1, 4000, 4000, 5, 4])
    stats = cache.stats()
    assert (stats.steps, stats.kv_head_steps, stats.kv_head_hits) == (12, 24, 12)
    assert (stats.query_head_hits, stats.kv_tokens_read, stats.kv_tokens_full) == (41, 7000, 14000)
    assert (stats.anchors_read, stats.entries_stored) == (605, 11)
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
