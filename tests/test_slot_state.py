"""Slots swapped out to host memory and in again: export_slots, import_slots."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from test_cache import (  # noqa: F401
    ENTRIES,
    OPTIONS,
    assert_copied,
    fill,
    is_empty,
    make_cache,
    unchanged,
    unread,
)

from mac_attn import ReuseCache, ReuseConfig, SlotState


def holds(cache: ReuseCache, slot: int, state: SlotState, row: int) -> bool:
    return torch.equal(cache.ring[slot].cpu(), state.ring[row])


def test_round_trip_into_other_slots(device):
    cache = make_cache(device=device)
    before = fill(cache)
    state = cache.export_slots([3, 1], pin_memory=True)
    assert unchanged(cache, before, [0, 1, 2, 3, 4])
    assert len(state) == 2 and state.ring.device.type == "cpu"
    assert state.nbytes == cache.ring[:2].nbytes
    cache.reset([1, 3])
    cache.import_slots(torch.tensor([0, 4], device=device), state)
    assert holds(cache, 0, state, 0) and holds(cache, 4, state, 1)
    assert_copied(cache, [0, 4], before, [3, 1], but=())
    assert unchanged(cache, before, [2]) and is_empty(cache, 1) and is_empty(cache, 3)
    cache.check()


def test_a_state_is_a_copy_and_can_be_pickled(device):
    cache = make_cache(device=device)
    before = fill(cache)
    state = pickle.loads(pickle.dumps(cache.export_slots(2)))
    fill(cache)
    other = make_cache(device=device)
    other.import_slots(1, state)
    assert_copied(other, [1], before, [2], but=())
    assert is_empty(other, 0) and is_empty(other, 2)
    none = cache.export_slots([])
    assert len(none) == 0
    cache.import_slots([], none)


@pytest.mark.parametrize(
    ("name", "cfg", "changes"),
    [
        ("entries", dict(entries=ENTRIES + 1), {}),
        ("band", dict(band=5), {}),
        ("anchors", dict(anchors=2), {}),
        ("granularity", dict(granularity="head"), {}),
        ("num_qo_heads", {}, dict(num_qo_heads=4)),
        ("num_kv_heads", {}, dict(num_kv_heads=3)),
        ("head_dim", {}, dict(head_dim=32)),
        ("head_dim_v", {}, dict(head_dim_v=8)),
        ("dtype", {}, dict(dtype=torch.bfloat16)),
    ],
)
def test_a_cache_of_another_form_refuses(name, cfg, changes):
    def make(cfg: dict[str, Any], **changes: Any) -> ReuseCache:
        options: dict[str, Any] = dict(entries=ENTRIES, anchors=0, band=4) | cfg
        return ReuseCache(ReuseConfig(**options), **OPTIONS | changes)

    state = make({}).export_slots([0])
    cache = make(cfg, **changes)
    before = fill(cache)
    with pytest.raises(ValueError, match=f"state has {name} .*, must have .* as the cache"):
        cache.import_slots([1], state)
    assert unchanged(cache, before, list(range(5)))


def test_bad_arguments_raise_and_change_nothing():
    cache = make_cache()
    before = fill(cache)
    state = cache.export_slots([0, 1])
    for error, message, slots in [
        (ValueError, "slots is 5, must be from 0 to 4", [5, 1]),
        (ValueError, "slots holds 2 twice", [2, 2]),
        (ValueError, "state has 2 slots, must have 1 as slots", [2]),
    ]:
        with pytest.raises(error, match=message):
            cache.import_slots(slots, state)
    with pytest.raises(TypeError, match="state is of type dict, must be a SlotState"):
        cache.import_slots([2, 3], vars(state))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="slots is -1"):
        cache.export_slots(-1)
    assert unchanged(cache, before, list(range(5)))


def test_unread_bad_slots(unread):  # noqa: F811
    before = fill(unread)
    state = unread.export_slots([4, 9])
    assert holds(unread, 4, state, 0)
    if unread.device.type != "cpu":  # where no such slot gets so far
        assert not state.ring[1].any()
    with pytest.raises(ValueError, match="slots held"):
        unread.check()
    unread.import_slots([7, 0], unread.export_slots([1, 2]))
    assert_copied(unread, [0], before, [2], but=())
    unread.import_slots([1, 1], unread.export_slots([3, 4]))
    assert is_empty(unread, 1)
    unread.import_slots([-1], unread.export_slots([3]))
    assert unchanged(unread, before, [2, 3, 4])
    with pytest.raises(ValueError, match="slots held"):
        unread.check()


@pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy"])
def test_a_copy_has_a_ring_and_views_of_its_own(how, device):
    cache = make_cache(device=device)
    before = fill(cache)
    if how == "deepcopy":
        twin = copy.deepcopy(cache)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(cache))
    else:
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert_copied(twin, [0, 1, 2, 3, 4], before, [0, 1, 2, 3, 4], but=())
    twin.reset([1])
    assert is_empty(twin, 1) and unchanged(cache, before, [0, 1, 2, 3, 4])
    assert twin.ring_arguments[0] is twin.ring
    assert twin.ring_out.untyped_storage().data_ptr() == twin.ring.data_ptr()
