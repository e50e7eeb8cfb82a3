"""What the compiler made of the CUDA kernels, read from `cuobjdump` of a built extension.

`cuobjdump --dump-resource-usage` gives registers, memory and stack of each kernel, `--dump-sass`
its instructions (CUDA Binary Utilities, https://docs.nvidia.com/cuda/cuda-binary-utilities).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# Per multiprocessor: registers, threads, CTAs and shared memory (CUDA Programming Guide, "Technical
# Specifications per Compute Capability").
LIMITS = {
    "sm_80": {"registers": 65536, "threads": 2048, "ctas": 32, "shared": 167936},
    "sm_90": {"registers": 65536, "threads": 2048, "ctas": 32, "shared": 233472},
    "sm_100": {"registers": 65536, "threads": 2048, "ctas": 32, "shared": 233472},
    "sm_120": {"registers": 65536, "threads": 1536, "ctas": 24, "shared": 102400},
}
KERNEL = re.compile(
    r"(?P<stage>match|amend|complete|unrotate)_kernelI\w*?(?P<dtype>bf16|fp16)E"
    r"(?:Li(?P<dim>\d+)E)?(?:Li(?P<blocks>\d)E)?(?P<cache>\w*?fp8E)?(?:\w*?Lb(?P<exact>[01])E)?"
)
# Head sizes, and whether they are those of rows that are filled up; csrc/cuda/head_dim.cuh.
SIZES = [(size, False) for size in (64, 80, 96, 128, 256, 512)] + [(128, True), (256, True)]
WARPS = 4  # of an amend CTA; kWarps in csrc/cuda/schedule.cuh
WARP_TOKENS = 16  # kWarpTokens in csrc/cuda/kernels.h


@dataclass
class Kernel:
    """One kernel for one architecture; byte sizes, and counts of instructions."""

    arch: str
    stage: str
    dtype: str
    head_dim: int  # 0: any
    head_blocks: int | None
    fp8: bool = False  # the KV cache
    padded: bool = False  # rows are filled up to head_dim
    registers: int = 0
    static_shared: int = 0  # with what the system reserves, on sm_90
    spilled: int = 0  # bytes of stack and local memory
    opcodes: list[str] = field(default_factory=list)
    branches: list[tuple[int, int]] = field(default_factory=list)  # from and to, by instruction

    @property
    def name(self) -> str:
        blocks = f", {8 * self.head_blocks} heads" if self.head_blocks else ""
        cache = " fp8" if self.fp8 else ""
        size = f" up to {self.head_dim}" if self.padded else f" {self.head_dim or ''}"
        return f"{self.stage} {self.dtype}{cache}{size}{blocks}".rstrip()

    @property
    def threads(self) -> int:
        return 256 if self.stage == "match" else 128

    @property
    def dynamic_shared(self) -> int:
        """Of amend: its stages and two queries; of match, for 8 query heads (*_shared_bytes)."""
        if self.stage == "amend":
            short, long = self.head_dim < 128, self.head_dim > 256
            stages, itemsize = 3 if short else 1 if long else 2, 2
            if self.fp8:
                stages, itemsize = 6 if short else 2 if long else 3, 1
            rows = WARPS * stages * 2 * WARP_TOKENS * -(-self.head_dim // 64) * 64
            return rows * itemsize + 16 * (self.head_blocks or 1) * (self.head_dim + 8) * 2
        return 1552 + 8 * self.head_dim * 4 if self.stage == "match" else 0

    @property
    def ctas(self) -> int:
        """CTAs that fit a multiprocessor; registers come in units of 256 for a warp."""
        limits = LIMITS.get(self.arch.removesuffix("a"), LIMITS["sm_90"])
        per_warp = -(-self.registers * 32 // 256) * 256
        shared = self.static_shared + self.dynamic_shared
        return min(
            limits["registers"] // (per_warp * self.threads // 32),
            limits["threads"] // self.threads,
            limits["shared"] // max(shared, 1),
            limits["ctas"],
        )

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, opcode)) for opcode in self.opcodes)

    def main_loop(self) -> list[str]:
        """The shortest loop that has tensor-core instructions and asynchronous copies."""
        loops = [self.opcodes[to : at + 1] for at, to in self.branches if to <= at]
        wanted = ("HMMA", "LDGSTS")
        loops = [b for b in loops if all(any(o.startswith(w) for o in b) for w in wanted)]
        return min(loops, key=len, default=[])

    def complaints(self) -> Iterator[str]:
        """What must not be: register spills, atomics that are none, and hot loops without the
        instructions they need."""
        if self.count("QSPC"):
            # Asks whether an address is in the block's shared memory, where shared memory has no
            # such atomic; if not, and not in global memory, what follows is a load and a store.
            yield f"{self.name} ({self.arch}): an atomic on any kind of memory"
        if self.spilled or self.count("LDL|STL"):
            yield f"{self.name} ({self.arch}): {self.spilled} bytes in local memory"
        if self.stage == "match" and not self.count(r"LDG\..*128"):
            yield f"{self.name} ({self.arch}): no 16-byte loads"
        if self.stage == "amend":
            loop = self.main_loop()
            if not any("LDGSTS" in o and ".128" in o for o in loop):
                yield f"{self.name} ({self.arch}): no 16-byte asynchronous copies in the main loop"
            if not any(o.startswith("HMMA") for o in loop):
                yield f"{self.name} ({self.arch}): no tensor-core instructions in the main loop"


def missing(kernels: list[Kernel]) -> list[str]:
    """Which of the kernels that there must be for every architecture are not there."""
    kinds = [("match", None, False), ("complete", None, False)]
    kinds += [("amend", blocks, fp8) for blocks in (1, 2, 4) for fp8 in (False, True)]
    wanted = [
        (stage, dtype, head_dim, blocks, fp8, padded)
        for stage, blocks, fp8 in kinds
        for dtype in ("bf16", "fp16")
        for head_dim, padded in SIZES
        if blocks in (None, 1) or head_dim <= (128 if blocks == 4 else 256)
    ] + [("unrotate", dtype, 0, None, False, False) for dtype in ("bf16", "fp16")]
    there = {
        (k.arch, k.stage, k.dtype, k.head_dim, k.head_blocks, k.fp8, k.padded) for k in kernels
    }
    return [
        f"{Kernel(arch, *names).name} ({arch}) is missing"
        for arch in sorted({kernel.arch for kernel in kernels})
        for names in wanted
        if (arch, *names) not in there
    ]


def _kernel(arch: str, symbol: str) -> Kernel | None:
    found = KERNEL.search(symbol)
    if found is None:
        return None
    blocks = found["blocks"]
    return Kernel(
        arch,
        found["stage"],
        found["dtype"],
        int(found["dim"] or 0),
        int(blocks) if blocks else None,
        found["cache"] is not None,
        found["exact"] == "0",
    )


def parse(resource_usage: str, sass: str) -> list[Kernel]:
    """The kernels that `cuobjdump` printed, sorted by architecture and name.

    Raises ValueError for a kernel of ours whose name this does not understand.
    """
    kernels: dict[tuple[str, str], Kernel] = {}
    arch = symbol = ""
    for line in resource_usage.splitlines():
        if found := re.search(r"(?:arch =|code for) (\w+)", line):
            arch = found[1]
        elif found := re.search(r"Function (\S+):", line):
            symbol = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            kernel = _kernel(arch, symbol)
            if kernel is None:
                if "mac_attn" in symbol:
                    raise ValueError(f"{symbol} is no kernel that build_support/sass.py knows")
                continue
            registers, stack, shared, local = map(int, found.groups())
            kernel.registers, kernel.static_shared, kernel.spilled = (
                registers,
                shared,
                stack + local,
            )
            kernels[arch, symbol] = kernel

    places: dict[int, int] = {}
    jumps: list[tuple[int, int]] = []
    current: Kernel | None = None

    def finish() -> None:
        if current is not None:
            current.branches = [(at, places[to]) for at, to in jumps if to in places]

    for line in sass.splitlines():
        if found := re.search(r"(?:arch =|code for) (\w+)", line):
            arch = found[1]
        elif found := re.search(r"Function : (\S+)", line):
            finish()
            current, places, jumps = kernels.get((arch, found[1])), {}, []
        elif current is not None and (
            found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z]\S*)(.*)", line)
        ):
            places[int(found[1], 16)] = len(current.opcodes)
            if found[2] == "BRA" and (target := re.search(r"(0x[0-9a-f]+)", found[3])):
                jumps.append((len(current.opcodes), int(target[1], 16)))
            current.opcodes.append(found[2].rstrip(";"))
    finish()
    return sorted(kernels.values(), key=lambda k: (k.arch, k.stage, k.dtype, k.head_dim, k.name))
