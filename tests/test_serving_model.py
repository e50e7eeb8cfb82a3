"""Random traffic, driven by hypothesis: every operation of a server, in any order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import one_thread
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from serving import Request, Server, serving_config

import mac_attn

NUM_SLOTS, MAX_LENGTH = 4, 64
SETTINGS = settings(
    max_examples=100,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)

CONFIGS: list[dict[str, Any]] = [
    dict(),
    dict(anchors=0),
    dict(anchors=0, granularity="head"),
    dict(max_reuse_depth=2),
    dict(window=5, band=7, anchors=3),
]


class ServingMachine(RuleBasedStateMachine):
    """One server. Requests are named by a number that is taken modulo how many there are."""

    options: dict[str, Any] = {}

    @initialize(config=st.sampled_from(CONFIGS), ids=st.booleans(), seed=st.integers(0, 2**16))
    def make(self, config: dict[str, Any], ids: bool, seed: int) -> None:
        head_dim = self.options.get("head_dim", 16)
        self.server = Server(
            serving_config(head_dim, **config),
            num_slots=NUM_SLOTS,
            max_length=MAX_LENGTH,
            ids=ids,
            seed=seed,
            **self.options,
        )

    def served(self) -> list[Request]:
        return [r for r in self.server.requests if r.slot is not None]

    def waiting(self) -> list[Request]:
        return [r for r in self.server.requests if r.slot is None]

    def room(self) -> bool:
        return len(self.server.requests) < 2 * NUM_SLOTS

    @precondition(room)
    @rule(
        slot=st.integers(0, NUM_SLOTS - 1),
        length=st.integers(1, 30),
        seeded=st.integers(0, 8),
        chunks=st.integers(1, 3),
        meets_old_end=st.booleans(),
    )
    def start(self, slot: int, length: int, seeded: int, chunks: int, meets_old_end: bool) -> None:
        if meets_old_end:  # the trap: this prompt ends where the slot's last request stopped
            end = int(self.server.cache.slot_end[slot])
            length = end if 1 <= end <= 40 else length
        self.server.start(slot, length, seeded=seeded, chunks=chunks)

    @precondition(lambda self: self.served())
    @rule(
        some=st.integers(1, 2**NUM_SLOTS - 1),
        steps=st.integers(1, 6),
        isolate=st.booleans(),
    )
    def decode(self, some: int, steps: int, isolate: bool) -> None:
        """The others are not in the batch: they pause."""
        for _ in range(steps):
            going = [r for r in self.served() if len(r) < MAX_LENGTH]
            batch = [r for i, r in enumerate(going) if some >> i & 1] or going[:1]
            if batch:
                self.server.decode(batch, isolate=isolate)

    @precondition(lambda self: self.served())
    @rule(steps=st.integers(4, 16), isolate=st.booleans())
    def decode_all(self, steps: int, isolate: bool) -> None:
        self.decode(2**NUM_SLOTS - 1, steps, isolate)

    @precondition(lambda self: self.served() and self.room())
    @rule(who=st.integers(0, 7), slot=st.integers(0, NUM_SLOTS - 1))
    def fork(self, who: int, slot: int) -> None:
        request = self.served()[who % len(self.served())]
        if request.slot != slot:
            self.server.fork(request, slot)

    @precondition(lambda self: self.served())
    @rule(who=st.integers(0, 7), count=st.integers(0, 9))
    def truncate(self, who: int, count: int) -> None:
        self.server.truncate(self.served()[who % len(self.served())], count)

    @precondition(lambda self: self.served())
    @rule(who=st.integers(0, 7))
    def swap_out(self, who: int) -> None:
        self.server.swap_out(self.served()[who % len(self.served())])

    @precondition(lambda self: self.waiting())
    @rule(who=st.integers(0, 7), slot=st.integers(0, NUM_SLOTS - 1))
    def resume(self, who: int, slot: int) -> None:
        self.server.resume(self.waiting()[who % len(self.waiting())], slot)

    @precondition(lambda self: len(self.served()) > 1)
    @rule(who=st.integers(0, 7))
    def swap_slots(self, who: int) -> None:
        served = self.served()
        self.server.swap_slots(served[who % len(served)], served[(who + 1) % len(served)])

    @precondition(lambda self: self.served())
    @rule(who=st.integers(0, 7))
    def reset(self, who: int) -> None:
        request = self.served()[who % len(self.served())]
        assert request.slot is not None
        self.server.reset_slot(request.slot)

    @precondition(lambda self: self.server.requests)
    @rule(who=st.integers(0, 7))
    def finish(self, who: int) -> None:
        self.server.finish(self.server.requests[who % len(self.server.requests)])

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "server"):
            self.server.check_slots()


def run(machine: type[ServingMachine], using: settings = SETTINGS, rounds: int = 1) -> list[Server]:
    """Run the machine, each round from another seed; returns the servers of all examples."""
    servers: list[Server] = []

    class Kept(machine):  # type: ignore[misc, valid-type]
        def teardown(self) -> None:
            if hasattr(self, "server"):
                servers.append(self.server)

    with one_thread():  # the operations are tiny
        for number in range(rounds):
            run_state_machine_as_test(seed(number)(Kept), settings=using)
    return servers


def summary(servers: list[Server]) -> str:
    """The counts of all of them, once it is sure that they say something."""
    counts = [s.counts for s in servers]
    steps, compared, hits, isolated = (
        sum(getattr(c, name) for c in counts) for name in ("steps", "compared", "hits", "isolated")
    )
    operations = {name for c in counts for name in c.operations}
    assert operations >= {"fork", "truncate", "swap out", "swap in", "swap slots", "preempt"}
    assert operations >= {"start", "seed", "reset", "finish"}
    assert hits > compared / 4 and isolated > steps / 4
    return (
        f"{len(servers)} random servers: {steps} steps, {compared} outputs compared, "
        f"{hits} KV head hits, {isolated} steps repeated under poison"
    )


def test_random_traffic_agrees_with_the_reference(capsys):
    # hypothesis spends later examples on variants of earlier ones: better four short rounds.
    found = summary(run(ServingMachine, settings(SETTINGS, max_examples=30), rounds=4))
    with capsys.disabled():
        print(f"\n{found}")


# --- proof that it can fail -----------------------------------------------------------------------

PLANTED = settings(SETTINGS, phases=[Phase.generate])


def drop_the_tag_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in a place of the ring counts as the entry of the position that belongs there."""
    decode = mac_attn.decode

    def planted(q: Any, kv: Any, table: Any, lens: Any, *, reuse: Any, slots: Any, **rest: Any):
        for n, slot in zip(lens.tolist(), slots.tolist(), strict=True):
            if n > 0:
                window = reuse.cfg.window
                at = torch.arange(max(0, n - 1 - window), n - 1)
                reuse.ring_position[slot, at % window] = at.int()
        return decode(q, kv, table, lens, reuse=reuse, slots=slots, **rest)

    monkeypatch.setattr(mac_attn, "decode", planted)


def share_memory_on_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork's entries lie where its source's lie, so that each sees what the other writes."""
    fork, decode = mac_attn.ReuseCache.fork, mac_attn.decode
    shared: list[tuple[Any, int, int]] = []

    def planted_fork(self: Any, src: list[int], dst: list[int], request_ids: Any = None) -> None:
        fork(self, src, dst, request_ids)
        if len(src) == 1:  # not two slots that swap
            shared.append((self, src[0], dst[0]))

    def planted_decode(*args: Any, reuse: Any, slots: Any, **rest: Any):
        result = decode(*args, reuse=reuse, slots=slots, **rest)
        for n, slot in zip(args[3].tolist(), slots.tolist(), strict=True):
            for cache, src, dst in shared:
                if n > 0 and cache is reuse and slot in (src, dst):
                    other, at = src + dst - slot, (n - 1) % reuse.cfg.window
                    for name in ("query", "out", "lse", "depth", "anchors"):
                        ring = getattr(reuse, f"ring_{name}")
                        ring[other, :, at] = ring[slot, :, at]
        return result

    monkeypatch.setattr(mac_attn.ReuseCache, "fork", planted_fork)
    monkeypatch.setattr(mac_attn, "decode", planted_decode)


def truncate_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rejected entry stays."""
    truncate = mac_attn.ReuseCache.truncate
    monkeypatch.setattr(
        mac_attn.ReuseCache,
        "truncate",
        lambda self, slots, lens: truncate(self, slots, [n + 1 for n in lens]),
    )


def add_nothing_of_a_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another request's value enters with weight 0, which shows only where it is not finite."""
    decode = mac_attn.decode

    def planted(q: Any, kv: Any, table: Any, lens: Any, **rest: Any):
        out, lse = decode(q, kv, table, lens, **rest)
        stray = kv[1][(table[:, 0].long() + 1) % len(kv[1]), 0, 0]
        return out + 0 * stray[:, None], lse

    monkeypatch.setattr(mac_attn, "decode", planted)


@pytest.mark.parametrize(
    "plant",
    [drop_the_tag_check, share_memory_on_fork, truncate_off_by_one, add_nothing_of_a_neighbour],
)
def test_a_planted_bug_is_found(plant, monkeypatch):
    plant(monkeypatch)
    # The ops themselves refuse some of what follows from it.
    with pytest.raises((AssertionError, ValueError)):
        run(ServingMachine, PLANTED)
