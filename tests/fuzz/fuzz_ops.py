"""Coverage-guided fuzzing of the op entry points: `make fuzz` builds and preloads what it needs.

atheris (libFuzzer) draws calls, see arguments.py. A call may answer or raise ValueError, TypeError
or MemoryError; anything else is a finding, and AddressSanitizer and UndefinedBehaviorSanitizer end
the process at the first mistake in the extension. libFuzzer leaves the input that did it in a file
`crash-*`, which this script replays when it is given as an argument. What guides it are the blocks
of the extension that are reached (coverage.cpp), not those of Python.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import atheris
import torch

sys.path.insert(0, str(Path(__file__).parent))

from arguments import Call  # noqa: E402

import mac_attn  # noqa: E402

OPS = torch.ops.mac_attn
counts: dict[str, int] = {}
REPORT_EVERY = 2500


def overload(name: str) -> Any:
    """The op of a name, "packet" or "packet.overload"."""
    packet, _, kind = name.partition(".")
    return getattr(getattr(OPS, packet), kind or "default")


def arguments_of(name: str) -> list[str]:
    """Names of an op's arguments, from its schema; `anchors` are a number or positions."""
    arguments = overload(name)._schema.arguments
    positions = {a.name for a in arguments if a.name == "anchors" and str(a.type) == "Tensor"}
    return ["anchor_positions" if a.name in positions else a.name for a in arguments]


OP_NAMES = ("match", "amend", "complete", "complete_exact", "decode_exact", "decode_reuse")
OP_NAMES += ("decode_exact.into", "decode_reuse.into")
ARGUMENTS = {name: arguments_of(name) for name in OP_NAMES}


def one_op(call: Call, name: str) -> None:
    """One op with what the call has for it."""
    overload(name)(*[call.args[a] for a in ARGUMENTS[name]])


def whole_step(call: Call) -> None:
    """match, amend and complete, each fed with the answer of the one before."""
    args = call.args
    matched = OPS.match(*[args[a] for a in ARGUMENTS["match"]])
    args |= zip(("source", "place", "stored"), matched, strict=True)
    if call.draw.ConsumeBool():
        call.spoil()
    amended = OPS.amend(*[args[a] for a in ARGUMENTS["amend"]])
    names = ("states", "state_lse", "log_ratio", "anchor_positions", "anchor_weights", "sampled")
    args |= zip(names, amended, strict=True)
    if call.draw.ConsumeBool():
        call.spoil()
    OPS.complete(*[args[a] for a in ARGUMENTS["complete"]])


def exact_decode(call: Call) -> None:
    """`mac_attn.decode` without a cache: checks in Python explain what the op refuses."""
    a = call.args
    mac_attn.decode(
        a["q"],
        (a["k_cache"], a["v_cache"]),
        a["block_table"],
        a["seq_lens"],
        sm_scale=a["sm_scale"],
        logits_soft_cap=a["logits_soft_cap"],
        k_scale=a["k_scale"],
        v_scale=a["v_scale"],
        sinks=a["sinks"],
        out=a["out"],
    )


def other_layout(call: Call) -> None:
    """A step on a cache in HND order, or K and V in one tensor, or both."""
    k, v = call.args["k_cache"], call.args["v_cache"]
    if k.ndim == v.ndim == 4 and call.draw.ConsumeBool():
        k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
        call.args["hnd"] = True
    if k.shape == v.shape and k.dtype == v.dtype and k.ndim > 0:
        k, v = torch.stack((k, v), dim=1), None
    call.args |= {"k_cache": k, "v_cache": v}
    one_op(call, "decode_reuse")


def rotary_decode(call: Call) -> None:
    """A step that turns its queries back itself."""
    call.args |= {"q_match": None, "inv_freq": call.frequencies()}
    one_op(call, "decode_reuse")


def cache_methods(call: Call) -> None:
    """The methods of a ReuseCache with arbitrary slots and lengths."""
    pick = call.draw.ConsumeIntInRange
    cfg = mac_attn.ReuseConfig(entries=call.entries, band=call.band, anchors=call.num_anchors)
    cache = mac_attn.ReuseCache(
        cfg,
        num_slots=call.slots,
        num_qo_heads=call.kv_heads * call.group,
        num_kv_heads=call.kv_heads,
        head_dim=call.head_dim,
        dtype=call.dtype,
    )

    def ints() -> Any:
        values = [pick(-2, 6) for _ in range(pick(0, 3))]
        if pick(0, 15) == 0:
            values.append(pick(-(2**63), 2**63 - 1))
        return torch.tensor(values, dtype=torch.int64) if call.draw.ConsumeBool() else values

    state = cache.export_slots([])
    for _ in range(pick(1, 5)):
        what = pick(0, 4)
        try:
            if what == 0:
                cache.reset(ints())
            elif what == 1:
                cache.fork(ints(), ints(), ints() if call.draw.ConsumeBool() else None)
            elif what == 2:
                cache.truncate(ints(), ints())
            elif what == 3:
                state = cache.export_slots(ints())
            else:
                cache.import_slots(ints(), state)
        except (ValueError, TypeError):
            pass


ALL = sorted({name for names in ARGUMENTS.values() for name in names})
# What is called, and the arguments that it takes.
TARGETS: list[tuple[Callable[[Call], None], list[str]]] = [
    (whole_step, ALL),
    *((partial(one_op, name=name), names) for name, names in ARGUMENTS.items()),
    (exact_decode, ALL),
    (rotary_decode, ARGUMENTS["decode_reuse"]),
    (other_layout, ARGUMENTS["decode_reuse"]),
    (cache_methods, []),
]


def test_one_input(data: bytes) -> None:
    """What libFuzzer calls."""
    draw = atheris.FuzzedDataProvider(data)
    target, wanted = TARGETS[draw.ConsumeIntInRange(0, len(TARGETS) - 1)]
    call = Call(draw, wanted)
    for _ in range(draw.ConsumeIntInRange(0, 3) if wanted else 0):
        call.spoil()
    try:
        target(call)
        answer = "answered"
    except (ValueError, TypeError, MemoryError) as error:
        answer = f"raised {type(error).__name__}"
    counts[answer] = counts.get(answer, 0) + 1
    total = sum(counts.values())
    if total % REPORT_EVERY == 0:  # libFuzzer ends the process without a word to Python
        parts = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
        print(f"fuzz: {total} calls: {parts}", flush=True)


def main() -> None:
    torch.set_num_threads(2)
    atheris.Setup(sys.argv, test_one_input)
    coverage = ctypes.CDLL(os.environ["MAC_ATTN_FUZZ_COVERAGE"])
    core = ctypes.CDLL(importlib.import_module("atheris.core_with_libfuzzer").__file__)
    coverage.mac_attn_counters.restype = coverage.mac_attn_entries.restype = ctypes.c_void_p
    number = coverage.mac_attn_num_counters()
    for begin, size, init in (
        (coverage.mac_attn_counters(), 1, core.__getattr__("__sanitizer_cov_8bit_counters_init")),
        (coverage.mac_attn_entries(), 16, core.__getattr__("__sanitizer_cov_pcs_init")),
    ):
        init(ctypes.c_void_p(begin), ctypes.c_void_p(begin + size * number))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
