"""How long a step takes, on either device, when nothing it reads lies in a cache (or all may).

CUDA: the step is captured in a CUDA graph. One round is
    put back | overwrite the L2 cache, read it over | event | the step's graph | event
all in one stream without a synchronisation. The GPU is still busy with the cache when the CPU has
enqueued the rest, so the events see the step alone and no launch latency. The L2 cache is read over
after it was overwritten, so that the step does not pay for writing the dirty lines back.

CPU: the steps take turns, and before each a plain loop reads a buffer larger than the processor's
caches on the same threads. What that loop takes is the bandwidth that the steps are compared with:
on a shared machine another one a minute later is another. Steps that take long are measured in
fewer of the rounds.

Warm: nothing is read or overwritten in between; a step finds in the caches what the one before it
left. On CUDA the GPU spins instead, so that it is busy while the CPU enqueues.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch

FLUSH_BYTES = 256 * 2**20  # several times the L2 of an H200 (50 MB)
# Reading 256 MB leaves parts of a 32 MB L3 as they were: an all-hit step took 251 us after it and
# 305 after this.
CPU_FLUSH_BYTES = 768 * 2**20
COPY_BYTES = 2**30
SPIN_CYCLES = 400_000  # 200 us at 2 GHz; enqueuing a round takes some 100


@dataclass(frozen=True)
class Step:
    """What is timed: `call`; before each round `put_back`, which is not."""

    name: str
    call: Callable[[], object]
    put_back: Callable[[], None] | None = None


@dataclass(frozen=True)
class Timing:
    """Microseconds: the median of the rounds, and the first and third quartile.

    `calls` counts the step's calls, those that warmed up included.
    """

    us: float
    low: float
    high: float
    rounds: int
    calls: int

    @staticmethod
    def of(times: Sequence[float], warmup: int) -> Timing:
        low, _, high = quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
        return Timing(median(times), low, high, len(times), len(times) + warmup)


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second that plain code reaches on this machine, and how it was measured."""

    bytes_per_s: float
    how: str

    def us(self, num_bytes: int) -> float:
        return 1e6 * num_bytes / self.bytes_per_s


class CudaTimer:
    """Times steps as replays of CUDA graphs. A `call` that several steps share is captured once.

    `budget_s` limits the rounds of one step: at least 5, however long it takes.
    """

    def __init__(
        self, rounds: int, warmup: int, budget_s: float = 5.0, *, warm: bool = False
    ) -> None:
        self.rounds, self.warmup, self.budget_s, self.warm = rounds, warmup, budget_s, warm
        self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")
        self._graphs: dict[Callable[[], object], torch.cuda.CUDAGraph] = {}

    def measure(
        self, steps: Sequence[Step], done: Callable[[Step], None] = lambda step: None
    ) -> dict[str, Timing]:
        timings = {}
        for step in steps:
            timings[step.name] = self._measure(step)
            done(step)
        self._graphs.clear()  # they hold memory and tensors of their case
        return timings

    def run(self, step: Step) -> None:
        """One round, untimed; waits for it."""
        graph = self._graph(step.call)  # a capture runs the step, so before the state is put back
        if step.put_back is not None:
            step.put_back()
        graph.replay()
        torch.cuda.synchronize()

    def _measure(self, step: Step) -> Timing:
        graph = self._graph(step.call)
        rounds = self.rounds
        times: list[float] = []
        # The first rounds are apart: they warm up, and they tell how many more the budget allows.
        for part in range(2):
            count = self.warmup if part == 0 else rounds
            events = []
            for i in range(count):
                if self.warm:
                    torch.cuda._sleep(SPIN_CYCLES)
                if step.put_back is not None:
                    step.put_back()
                if not self.warm:
                    self._flush.fill_(i)
                    self._flush.sum()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                events.append((start, end))
            torch.cuda.synchronize()
            times = [1e3 * start.elapsed_time(end) for start, end in events]
            rounds = min(rounds, max(5, int(1e6 * self.budget_s / median(times))))
        return Timing.of(times, self.warmup)

    def _graph(self, call: Callable[[], object]) -> torch.cuda.CUDAGraph:
        if call not in self._graphs:
            # Three calls first, on another stream as a capture needs it: they load the kernels.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            self._graphs[call] = graph
        return self._graphs[call]

    def bandwidth(self) -> Bandwidth:
        """Of a copy (read and written) or of a sum (read), whichever is faster."""
        source, target = (
            torch.zeros(COPY_BYTES // 4, dtype=torch.float32, device="cuda") for _ in range(2)
        )
        copy = self._measure(Step("copy", lambda: target.copy_(source)))
        total = self._measure(Step("sum", lambda: torch.sum(source)))
        self._graphs.clear()
        return max(
            Bandwidth(2 * COPY_BYTES / copy.us * 1e6, "copy of 1 GiB, read and written"),
            Bandwidth(COPY_BYTES / total.us * 1e6, "sum of 1 GiB"),
            key=lambda bandwidth: bandwidth.bytes_per_s,
        )


class CpuTimer:
    """Times steps in turns, each on data that no cache holds. Arguments as for `CudaTimer`."""

    def __init__(
        self, rounds: int, warmup: int, budget_s: float = 5.0, *, warm: bool = False
    ) -> None:
        self.rounds, self.warmup, self.budget_s, self.warm = rounds, warmup, budget_s, warm
        self._flush = torch.ones(CPU_FLUSH_BYTES // 4, dtype=torch.float32)
        self._flush_times: list[float] = []
        self._loop: Callable[[torch.Tensor], object] = torch.Tensor.sum
        try:
            self._loop = read_loop()
            self._how = "read loop of all threads (bench/read_loop.cpp)"
        except (OSError, subprocess.CalledProcessError) as error:
            name = type(error).__name__
            self._how = f"torch.sum, as the read loop could not be compiled ({name})"

    def measure(
        self, steps: Sequence[Step], done: Callable[[Step], None] = lambda step: None
    ) -> dict[str, Timing]:
        self._flush_times.clear()
        times: dict[str, list[float]] = {step.name: [] for step in steps}
        every: dict[str, int] = {}
        for step in steps:
            first = min(self._timed(step) for _ in range(self.warmup))
            wanted = min(self.rounds, max(5, int(self.budget_s / first)))
            every[step.name] = max(1, self.rounds // wanted)
        for i in range(self.rounds):
            for step in steps:
                if i % every[step.name] == 0:
                    times[step.name].append(1e6 * self._timed(step))
                if i == self.rounds - 1:
                    done(step)
        return {name: Timing.of(values, self.warmup) for name, values in times.items()}

    def run(self, step: Step) -> None:
        """One round, untimed."""
        if step.put_back is not None:
            step.put_back()
        step.call()

    def _timed(self, step: Step) -> float:
        if step.put_back is not None:
            step.put_back()
        if not self.warm:
            self._clear_caches()
        start = time.perf_counter()
        step.call()
        return time.perf_counter() - start

    def _clear_caches(self) -> None:
        start = time.perf_counter()
        self._loop(self._flush)
        self._flush_times.append(time.perf_counter() - start)

    def bandwidth(self) -> Bandwidth:
        """Of the loop that clears the caches, beside the steps that were measured last."""
        while len(self._flush_times) < 6:
            self._clear_caches()
        return Bandwidth(self._flush.nbytes / median(self._flush_times[1:]), self._how)


Timer = CudaTimer | CpuTimer


def make_timer(device: torch.device, rounds: int, warmup: int, *, warm: bool = False) -> Timer:
    timer = CudaTimer if device.type == "cuda" else CpuTimer
    return timer(max(1, rounds), max(1, warmup), warm=warm)


def read_loop() -> Callable[[torch.Tensor], object]:
    """The function of read_loop.cpp over a tensor, on all of torch's threads.

    Raises OSError or CalledProcessError if it cannot be compiled.
    """
    folder = Path(tempfile.mkdtemp(prefix="mac_attn_"))
    try:
        source, library = Path(__file__).with_name("read_loop.cpp"), folder / "loop.so"
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        compiler = shutil.which("c++") or "g++"
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).read_loop
    finally:
        shutil.rmtree(folder)
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_uint64
    threads = torch.get_num_threads()
    return lambda data: function(data.data_ptr(), data.nbytes, threads)
