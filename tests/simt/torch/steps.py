"""float8 caches, sinks, the largest heads and shorter values as tests/test_float8.py,
tests/test_sinks.py, tests/test_head_sizes.py and tests/test_value_sizes.py have them, on the CUDA
kernels' host execution: the ops, the CUDA backend's checks and launches, and the kernels.

A process of its own: the extension is exchanged before mac_attn is imported.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from host_kernels import load_as_c

TESTS = Path(__file__).resolve().parents[2]
DTYPE = torch.bfloat16  # the one that the extension has


def main() -> int:
    module = load_as_c()
    sys.path.insert(0, str(TESTS))
    import compare
    import test_decode_reference as tests
    from cases import small_config
    from test_head_sizes import check_most_heads
    from test_sinks import make_sinks
    from test_value_sizes import check_refused_on_cuda

    import mac_attn

    assert mac_attn.ops._C is module and "host execution" in module.build_info()["simd"]
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    states, outs, samples = compare.state_tolerance, compare.out_tolerance, compare.sample_tolerance
    steps = 0
    with pytest.MonkeyPatch.context() as patch:
        # Tensors on the CPU, but the kernels of a GPU: their tolerances.
        for module_ in (compare, tests):
            patch.setattr(module_, "state_tolerance", lambda dtype, _: states(dtype, gpu))
            patch.setattr(module_, "out_tolerance", lambda dtype, _: outs(dtype, gpu))
        patch.setattr(compare, "sample_tolerance", lambda _: samples(gpu))
        forms = ("0-d", "1-d", "per head", "")
        same = ((size, None) for size in (64, 80, 128, 256, 512, 48, 112, 160))
        sizes = (*same, (192, 128), (64, 16), (128, 112), (256, 128))
        shapes = [(group, *size) for group in (1, 5, 12) for size in sizes]
        for i, (group, head_dim, head_dim_v) in enumerate(shapes):
            tests.check_exact(
                seed=700 + i,
                lengths=[1, 17, 0, 90],
                heads=(2 * group, 2),
                head_dim=head_dim,
                head_dim_v=head_dim_v,
                page_size=(1, 7, 16)[i % 3],
                layout=("NHD", "HND")[i % 2],
                combined=i % 3 == 0 and head_dim_v is None,
                strided=i % 2 == 0,
                dtype=DTYPE,
                device=cpu,
                float8=forms[i % 4],
                softmax={"sinks": make_sinks(2 * group, cpu, i)} if i % 2 else None,
            )
            steps += 1
        for float8, config, short in (
            ("per head", dict(anchors=6), {}),
            ("0-d", dict(granularity="head"), {}),
            ("", dict(anchors=6), {}),
            ("", dict(anchors=6), {"head_dim": 192, "head_dim_v": 128}),
            ("1-d", dict(anchors=0), {"head_dim": 96, "head_dim_v": 64}),
        ):
            tests.chain(
                small_config(**config),
                device=cpu,
                steps=20,
                heads=(6, 2),
                dtype=DTYPE,
                float8=float8,
                softmax={"sinks": make_sinks(6, cpu)},
                seed=23,
                **short,
            )
            steps += 20
        for float8, config in (
            ("", dict(anchors=6)),
            ("1-d", dict(anchors=6)),
            ("", dict(granularity="head")),
        ):
            tests.chain(
                small_config(**config),
                device=cpu,
                steps=20,
                heads=(8, 1),
                head_dim=512,
                dtype=DTYPE,
                float8=float8,
                seed=29,
            )
            steps += 20
        check_most_heads(cpu)
        check_refused_on_cuda(cpu)
    print(f"{steps} steps equal the reference's")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
