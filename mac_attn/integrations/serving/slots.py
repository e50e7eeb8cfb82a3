"""Which request has which ring slot.

Rows of a batch move from step to step, so that slots follow requests. A request keeps its slot
until it is over, or until another needs one while it is not scheduled. It also has a number, which
`mac_attn` checks as its request id: a new one whenever the tokens of a step do not follow those of
the step before (a request that was preempted and computes its KV cache anew, or whose prompt was
continued), so that no entry outlives the KV cache it was made from.
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
    def is_decode(self) -> bool:
        """Whether the step computes one token."""
        return self.end - self.begin == 1


@dataclass(frozen=True)
class Place:
    """Where a request's entries are: the slot, and the number that marks them as this request's."""

    slot: int
    number: int


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
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
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
        for row in rows:  # first, so that no request of this step loses its slot to another
            if (slot := self._slot_of.get(row.key)) is not None:
                self._continue(self._tenants[slot], row)
        return [
            self._place(row, is_alive) if wanted or row.key in self._slot_of else None
            for row, wanted in zip(rows, wants, strict=True)
        ]

    def _continue(self, tenant: _Tenant | None, row: Row) -> None:
        assert tenant is not None  # by _slot_of
        if tenant.step == self._step:
            return
        if row.begin != tenant.end:
            tenant.number = self._next_number()
        tenant.end, tenant.step = row.end, self._step

    def _place(self, row: Row, is_alive: Callable[[Hashable], bool]) -> Place | None:
        slot = self._slot_of.get(row.key)
        if slot is None:
            slot = self._vacate(is_alive)
            if slot is None:
                return None
            self._slot_of[row.key] = slot
            self._tenants[slot] = _Tenant(row.key, self._next_number(), row.end, self._step)
        tenant = self._tenants[slot]
        assert tenant is not None
        return Place(slot, tenant.number)

    def _vacate(self, is_alive: Callable[[Hashable], bool]) -> int | None:
        """A free slot: never used, of a request that is over, or of the one longest away."""
        absent: list[tuple[bool, int, int]] = []
        for slot, tenant in enumerate(self._tenants):
            if tenant is None:
                return slot
            if tenant.step != self._step:
                absent.append((is_alive(tenant.key), tenant.step, slot))
        if not absent:
            return None
        slot = min(absent)[2]
        tenant = self._tenants[slot]
        assert tenant is not None
        del self._slot_of[tenant.key]
        self._tenants[slot] = None
        return slot

    def _next_number(self) -> int:
        self._numbers += 1
        return self._numbers
