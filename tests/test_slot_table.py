"""Which request has which slot, in the plugins of vLLM and SGLang, and how many slots there are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mac_attn
from mac_attn.integrations.serving.budget import Plan, slots_within
from mac_attn.integrations.serving.slots import Row, SlotTable


class TestSlots:
    @staticmethod
    def always(key: object) -> bool:
        return True

    def test_rows_move_and_slots_stay(self) -> None:
        table = SlotTable(2)
        a, b = Row("a", 9, 10, 10), Row("b", 4, 5, 5)
        first = table.place([a, b], [True, True], self.always)
        a, b = Row("a", 10, 11, 11), Row("b", 5, 6, 6)
        assert table.place([b, a], [True, True], self.always) == first[::-1]
        # And again, for another group of layers.
        assert table.place([b, a], [True, True], self.always, same_step=True) == first[::-1]

    def test_no_more_than_there_are(self) -> None:
        table = SlotTable(1)
        rows = [Row("a", 9, 10, 10), Row("b", 4, 5, 5)]
        places = table.place(rows, [True, True], self.always)
        assert places[0] is not None
        assert places[1] is None

    def test_the_longest_have_them(self) -> None:
        table = SlotTable(1)
        short, long, longer = Row("a", 9, 10, 10), Row("b", 29, 30, 30), Row("c", 59, 60, 60)
        assert table.place([short, long], [True, True], self.always)[0] is None
        assert table.turned_away == 1
        # Twice as long, and no less.
        rows = [Row("b", 30, 31, 31), longer]
        places = table.place(rows, [True, True], self.always)
        assert places[0] is not None and places[1] is None
        assert table.turned_away == 2
        rows = [Row("b", 31, 32, 32), Row("c", 63, 64, 64)]
        places = table.place(rows, [True, True], self.always)
        assert places[0] is None and places[1] is not None
        assert table.turned_away == 3
        # And again for another group of layers, and at the next step: nothing more happens.
        assert table.place(rows, [True, True], self.always, same_step=True) == places
        rows = [Row("b", 32, 33, 33), Row("c", 64, 65, 65)]
        assert table.place(rows, [True, True], self.always) == places
        assert table.turned_away == 3

    def test_one_that_finds_no_slot_speaks_for_all_shorter_ones(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The slots are looked through once a step, however many want one and have none."""
        searches: list[int] = []
        search = SlotTable._vacate
        monkeypatch.setattr(
            SlotTable, "_vacate", lambda *given: searches.append(given[1].end) or search(*given)
        )
        table = SlotTable(2)
        rows = [Row(key, n - 1, n, n) for key, n in enumerate([30, 50, 45, 60, 40])]
        first = table.place(rows, [True] * 5, self.always)
        assert [place is not None for place in first] == [False, True, False, True, False]
        assert searches == [60, 50, 45]
        assert table.turned_away == 3  # those that nothing was looked for too
        searches.clear()
        assert table.place(rows, [True] * 5, self.always, same_step=True) == first
        assert searches == [45]
        assert table.turned_away == 3

    def test_requests_turned_away_long_ago_are_forgotten(self) -> None:
        table = SlotTable(1)
        for i in range(6000):
            table.place([Row("long", i, i + 1, 1), Row(i, 0, 1, 1)], [True, True], self.always)
        assert table.turned_away == 6000
        assert len(table._without) <= 4096

    def test_who_is_over_leaves_before_who_is_away(self) -> None:
        table = SlotTable(2)
        (away,) = table.place([Row("away", 1, 2, 2)], [True], self.always)
        (over,) = table.place([Row("over", 1, 2, 2)], [True], self.always)
        new = [Row("new", 0, 1, 1)]
        (place,) = table.place(new, [True], lambda key: key != "over")
        assert away and over and place
        assert place.slot == over.slot
        assert place.number not in (away.number, over.number)

    @pytest.mark.parametrize("begin", [0, 9, 11])
    def test_another_number_after_a_gap(self, begin: int) -> None:
        table = SlotTable(1)
        (before,) = table.place([Row("a", 9, 10, 10)], [True], self.always)
        (after,) = table.place([Row("a", begin, begin + 1, 99)], [True], self.always)
        assert before and after
        assert after.slot == before.slot
        assert after.number != before.number

    @pytest.mark.parametrize(("begin", "same"), [(6, False), (7, True), (10, True), (11, False)])
    def test_the_same_number_where_drafts_may_have_been_rejected(
        self, begin: int, same: bool
    ) -> None:
        table = SlotTable(1, most_drafts=3)
        (before,) = table.place([Row("a", 6, 10, 10)], [True], self.always)
        (after,) = table.place([Row("a", begin, begin + 1, 99)], [True], self.always)
        assert before and after
        assert (after.number == before.number) is same

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(st.data())
    def test_nobody_shares_a_number_and_no_number_has_a_gap(self, data: st.DataObject) -> None:
        """A scheduler that adds, ends, preempts and resumes at random."""
        table = SlotTable(data.draw(st.integers(1, 3)))
        alive: dict[str, int] = {}  # tokens computed
        seen: dict[int, tuple[str, int]] = {}  # who had a number, and up to where
        names = iter(range(1000))
        for _ in range(data.draw(st.integers(1, 25))):
            if data.draw(st.booleans()):
                alive[f"request {next(names)}"] = 0
            for name in data.draw(st.sets(st.sampled_from(sorted(alive) or ["none"]), max_size=2)):
                alive.pop(name, None)
            scheduled = data.draw(st.permutations(sorted(alive)))
            rows = []
            for name in scheduled[: data.draw(st.integers(0, 5))]:
                if data.draw(st.integers(0, 4)) == 0:
                    alive[name] = 0  # preempted before, computed anew
                end = alive[name] + data.draw(st.sampled_from([1, 1, 1, 7]))
                rows.append(Row(name, alive[name], end, end))
                alive[name] = end
            wants = [data.draw(st.booleans()) for _ in rows]
            places = table.place(rows, wants, alive.__contains__)
            used = [place.slot for place in places if place is not None]
            assert len(used) == len(set(used))
            for row, place in zip(rows, places, strict=True):
                if place is None:
                    continue
                if place.number in seen:
                    assert seen[place.number] == (row.key, row.begin)
                seen[place.number] = (str(row.key), row.end)


def test_slots_are_what_a_share_of_the_memory_holds() -> None:
    config = mac_attn.ReuseConfig(entries=4, anchors=8, window=8, band=4)
    layer = Plan(config, 8, 2, 64, torch.bfloat16)
    ring = mac_attn.ReuseCache(
        config, num_slots=3, num_qo_heads=8, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16
    )
    assert ring.ring.shape == (3, layer.nbytes)
    layers = [layer] * 5
    memory = 10 * 7 * 5 * layer.nbytes
    assert slots_within(0.1, memory, 100, layers) == 7
    assert slots_within(0.1, memory - 10, 100, layers) == 6
    assert slots_within(0.1, memory, 4, layers) == 4
    assert slots_within(0.1, 0, 4, layers) == 1
