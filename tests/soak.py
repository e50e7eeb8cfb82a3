"""Random serving traffic for a long time: `python tests/soak.py --seconds 1800`, or `make soak`.

Two caches of several hundred slots, as two layers of different options, take turns. One request in
`--every` is followed by the reference from its first token to its last: its outputs, its ring and
its counters are compared at each of its steps, and now and then a step is repeated with everything
of all other requests poisoned. The process's memory must not grow.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from serving import Request, Server, serving_config  # noqa: E402

HEAD_DIM, MAX_LENGTH = 32, 160
TOKENS = (None, None, 2, 4)  # of a step, at most
# The peak of the last third of the time may be so much above that of the middle third. The first is
# left out: allocators, pages and the reference's own rings fill up. Leaking 16 KB a step is more.
# In a short run all that still goes on.
MAX_GROWTH, MAX_GROWTH_SHORT, SHORT = 24 * 2**20, 96 * 2**20, 600

# Chances of each operation for one random request, CHANGES times before every step.
CHANGES = 4
CHANCES = {
    "start": 0.6,
    "finish": 0.25,
    "fork": 0.1,
    "truncate": 0.3,
    "swap out": 0.1,
    "resume": 0.35,
    "swap slots": 0.1,
    "reset": 0.03,
}


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def make_servers(num_slots: int, seed: int) -> list[Server]:
    options = dict(num_slots=num_slots, head_dim=HEAD_DIM, page_size=16, max_length=MAX_LENGTH)
    return [
        Server(
            serving_config(HEAD_DIM, entries=24, window=64, band=16, anchors=4, min_context=20),
            dtype=torch.bfloat16,
            ids=True,
            sampled=True,
            seed=seed,
            **options,
        ),
        Server(
            serving_config(
                HEAD_DIM,
                entries=24,
                window=24,
                band=8,
                anchors=0,
                granularity="head",
                max_reuse_depth=None,
            ),
            dtype=torch.float32,
            ids=False,
            sampled=True,
            seed=seed + 1,
            **options,
        ),
    ]


class Traffic:
    """What comes in and goes out of one server."""

    def __init__(self, server: Server, every: int, seed: int) -> None:
        self.server, self.every = server, every
        self.rng = np.random.default_rng(seed)

    def pick(self, requests: list[Request]) -> Request | None:
        return requests[int(self.rng.integers(len(requests)))] if requests else None

    def free_slots(self) -> list[int]:
        taken = {r.slot for r in self.server.requests}
        return [s for s in range(self.server.cache.num_slots) if s not in taken]

    def slot(self) -> int:
        """A free slot, or now and then one that is taken: its request is preempted."""
        free = self.free_slots()
        if free and self.rng.random() > 0.02:
            return int(self.rng.choice(free))
        return int(self.rng.integers(self.server.cache.num_slots))

    def start(self) -> None:
        self.server.start(
            self.slot(),
            int(self.rng.integers(1, 100)),
            seeded=int(self.rng.choice([0, 16])),
            chunks=int(self.rng.integers(1, 3)),
            checked=self.server.next_id % self.every == 0,
        )

    def change(self) -> None:
        """Some of what happens between two steps."""
        server, happens = self.server, {n for n, p in CHANCES.items() if self.rng.random() < p}
        served = [r for r in server.requests if r.slot is not None]
        crowded = len(server.requests) >= server.cache.num_slots * 5 // 4
        for request in [r for r in server.requests if len(r) > MAX_LENGTH - 4]:
            server.finish(request)
            served = [r for r in served if r is not request]
        if "start" in happens and not crowded:
            self.start()
        if "finish" in happens and (request := self.pick(server.requests)):
            server.finish(request)
        served = [r for r in server.requests if r.slot is not None]
        if "fork" in happens and not crowded and (request := self.pick(served)):
            slot = self.slot()
            if slot != request.slot:
                server.fork(request, slot)
        if "truncate" in happens and (request := self.pick(server.requests)):
            server.truncate(request, int(self.rng.integers(12)))
        served = [r for r in server.requests if r.slot is not None]
        if "swap out" in happens and (request := self.pick(served)):
            server.swap_out(request)
        waiting = [r for r in server.requests if r.slot is None]
        if "resume" in happens and (request := self.pick(waiting)):
            server.resume(request, self.slot())
        served = [r for r in server.requests if r.slot is not None]
        if "swap slots" in happens and len(served) > 1:
            one, other = self.rng.choice(len(served), 2, replace=False)
            server.swap_slots(served[one], served[other])
        if "reset" in happens and (request := self.pick(served)):
            assert request.slot is not None
            server.reset_slot(request.slot)

    def step(self) -> None:
        """Changes, then a decode step of a random share of the requests."""
        for _ in range(CHANGES):
            self.change()
        served = [r for r in self.server.requests if r.slot is not None]
        share = self.rng.random()
        batch = [r for r in served if self.rng.random() < share] or served[:1]
        if batch:
            self.server.decode(batch, tokens=TOKENS[int(self.rng.integers(len(TOKENS)))])


def soak(seconds: float, num_slots: int, every: int, seed: int) -> bool:
    """Run; print the counts; True if the memory stayed flat."""
    traffic = [Traffic(s, every, seed + i) for i, s in enumerate(make_servers(num_slots, seed))]
    for one in traffic:
        while len(one.free_slots()) > num_slots // 10:
            one.start()
    began = time.monotonic()
    peaks, at = [0, 0, 0], 0
    while (passed := time.monotonic() - began) < seconds:
        for one in traffic:
            one.step()
        if at % 20 == 0:
            isolated_step(traffic[at // 20 % 2])
        at += 1
        third = int(3 * passed / seconds)
        peaks[third] = max(peaks[third], resident())
    for name, one in zip(("bfloat16, group, anchors, ids", "float32, head"), traffic, strict=True):
        one.server.cache.check()
        print(f"{name}: {one.server.counts}")
    flat = peaks[2] - peaks[1] <= (MAX_GROWTH_SHORT if seconds < SHORT else MAX_GROWTH)
    thirds = ", ".join(f"{peak / 2**20:.0f}" for peak in peaks)
    print(
        f"{time.monotonic() - began:.0f} s, {num_slots} slots: {thirds} MiB at most in each third "
        f"of the time{'' if flat else ': IT GROWS'}"
    )
    return flat


def isolated_step(traffic: Traffic) -> None:
    """A step of a few requests, repeated under poison.

    The repetition is the same bit for bit if the work is cut alike, and how it is cut depends on
    how much there is in all; this little is always cut into the smallest pieces.
    """
    served = [r for r in traffic.server.requests if r.slot is not None and len(r) < MAX_LENGTH]
    if served:
        traffic.server.decode(served[-4:], isolate=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--slots", type=int, default=384)
    parser.add_argument("--every", type=int, default=40, help="one request in so many is checked")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    print(f"soak: seed {args.seed}", flush=True)
    return 0 if soak(args.seconds, args.slots, args.every, args.seed) else 1


if __name__ == "__main__":
    raise SystemExit(main())
