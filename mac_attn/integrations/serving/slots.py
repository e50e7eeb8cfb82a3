"""Which request has which ring slot.

Rows of a batch move from step to step, so that slots follow requests. A request keeps its slot
until it is over, until another needs one while it is not scheduled, or until one that is twice as
long finds none: the longer the context, the more a ring saves. It also has a number, which
`mac_attn` checks as its request id: a new one whenever the tokens of a step do not follow those of
the step before (a request that was preempted and computes its KV cache anew, or whose prompt was
continued), so that no entry outlives the KV cache it was made from. Where drafts are verified, a
step may begin before the last one ended; where exactly it may is for `mac_attn` to check.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One request of a step.

    Attributes:
        key: what tells the request from all others, also from one of the same name before it.
        begin, end: the step computes the tokens [begin, end); `end` is its seq_len.
        total: tokens that are known already; the prompt's, where end <= total in prefill.
    """

    key: Hashable
    begin: int
    end: int
    total: int

    @property
    def tokens(self) -> int:
        """How many the step computes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Place:
    """Where a request's entries are: the slot, and the number that marks them as this request's."""

    slot: int
    number: int


# How many times as long a request must be to take the slot of another that is scheduled too. What
# the other one loses it cannot have back, so that slots must not go to and fro.
_LONGER = 2


@dataclass
class _Tenant:
    key: Hashable
    number: int
    end: int  # tokens computed
    step: int  # last step the request was part of


class SlotTable:
    """The slots of one engine, the same for all of its layers.

    Args:
        num_slots: how many there are.
        most_drafts: how many of a step's tokens may be rejected, so that the next step begins as
            many before its end.

    Attributes:
        turned_away: requests that wanted a slot and have found none, or have lost theirs to a
            longer one; counted once each, at the first time.
    """

    def __init__(self, num_slots: int, most_drafts: int = 0) -> None:
        self.num_slots = num_slots
        self._most_drafts = most_drafts
        self.turned_away = 0
        # Who is, and the last step it wanted one; hashes, so that no request is kept alive.
        self._without: dict[int, int] = {}
        self._tenants: list[_Tenant | None] = [None] * num_slots
        self._slot_of: dict[Hashable, int] = {}
        self._numbers = 0
        self._step = 0

    def place(
        self,
        rows: Sequence[Row],
        wants: Sequence[bool],
        is_alive: Callable[[Hashable], bool],
        *,
        same_step: bool = False,
    ) -> list[Place | None]:
        """The place of every row of a step, None for those without one.

        Args:
            rows: the requests of the step, all different.
            wants: which of them should get a slot if they have none.
            is_alive: whether a request that is not part of the step may still come back.
            same_step: the call repeats the one before it, for another KV cache group: the answer is
                the same.
        """
        self._step += not same_step
        # First, so that who is of this step loses its slot to nobody but one that is much longer.
        for row in rows:
            if (slot := self._slot_of.get(row.key)) is not None:
                self._continue(self._tenants[slot], row)
        wanting = [row for row, wanted in zip(rows, wants, strict=True) if wanted]
        for row in sorted(wanting, key=lambda row: -row.end):  # the longest first
            if row.key not in self._slot_of and not self._admit(row, is_alive):
                break  # what it did not find no shorter one does
        for row in wanting:
            self._count(row.key)
        return [self._place(row.key) for row in rows]

    def _count(self, key: Hashable) -> None:
        """Count a request that wanted a slot, if it has none."""
        if key in self._slot_of:
            return
        self.turned_away += hash(key) not in self._without
        self._without[hash(key)] = self._step
        if len(self._without) > 4096:  # those long gone are forgotten
            newest = sorted(self._without.items(), key=lambda item: item[1])[2048:]
            self._without = dict(newest)

    def _continue(self, tenant: _Tenant | None, row: Row) -> None:
        assert tenant is not None  # by _slot_of
        if tenant.step == self._step:
            return
        if not tenant.end - self._most_drafts <= row.begin <= tenant.end:
            tenant.number = self._next_number()
        tenant.end, tenant.step = row.end, self._step

    def _place(self, key: Hashable) -> Place | None:
        slot = self._slot_of.get(key)
        if slot is None:
            return None
        tenant = self._tenants[slot]
        assert tenant is not None
        return Place(slot, tenant.number)

    def _admit(self, row: Row, is_alive: Callable[[Hashable], bool]) -> bool:
        """Give a request a slot, if there is one for it; whether there was."""
        slot = self._vacate(row, is_alive)
        if slot is None:
            return False
        self._slot_of[row.key] = slot
        self._tenants[slot] = _Tenant(row.key, self._next_number(), row.end, self._step)
        return True

    def _vacate(self, row: Row, is_alive: Callable[[Hashable], bool]) -> int | None:
        """A slot for a request: one never used, of a request that is over, of the one longest away.

        Failing these, of the shortest that is scheduled, if this one is so much longer.
        """
        absent: list[tuple[bool, int, int]] = []
        present: list[tuple[int, int]] = []
        for slot, tenant in enumerate(self._tenants):
            if tenant is None:
                return slot
            if tenant.step != self._step:
                absent.append((is_alive(tenant.key), tenant.step, slot))
            else:
                present.append((tenant.end, slot))
        if absent:
            slot = min(absent)[2]
        else:
            shortest, slot = min(present)
            if row.end < _LONGER * shortest:
                return None
        tenant = self._tenants[slot]
        assert tenant is not None
        del self._slot_of[tenant.key]
        self._tenants[slot] = None
        return slot

    def _next_number(self) -> int:
        self._numbers += 1
        return self._numbers
