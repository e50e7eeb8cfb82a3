"""The model-based test of tests/test_serving_model.py with the CUDA kernels instead of the CPU's.

A process of its own: the extension is exchanged before mac_attn is imported. With the name of one
of the planted bugs the test must fail, and this script succeeds if it does. With `estimate` and a
regime of tests/test_sampling.py it is that file's test of the estimator.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from host_kernels import load_as_c
from hypothesis import Phase, settings

TESTS = Path(__file__).resolve().parents[2]
EXAMPLES = 20  # a step takes some ten times as long as on the CPU


def estimate(regime: str) -> int:
    """Over 1,000 hashes the sample's sums are unbiased."""
    from estimator import Problem, backend_draws, check
    from test_sampling import REGIMES, ROUNDING

    problem = Problem(*REGIMES[regime], torch.device("cpu"), torch.bfloat16)
    check(problem, backend_draws(problem), ROUNDING[torch.bfloat16])
    print(f"{regime}: unbiased")
    return 0


def main() -> int:
    module = load_as_c()
    sys.path.insert(0, str(TESTS))
    import test_serving_model as model

    import mac_attn

    assert mac_attn.ops._C is module and "host execution" in module.build_info()["simd"]
    if sys.argv[1:2] == ["estimate"]:
        return estimate(sys.argv[2])

    class OnCudaKernels(model.ServingMachine):
        options = dict(head_dim=64, dtype=torch.bfloat16, kernels="cuda")

    using = settings(model.SETTINGS, max_examples=EXAMPLES)
    if len(sys.argv) < 2:
        print(model.summary(model.run(OnCudaKernels, using)))
        return 0
    with pytest.MonkeyPatch.context() as patch:
        getattr(model, sys.argv[1])(patch)
        try:
            model.run(OnCudaKernels, settings(model.SETTINGS, phases=[Phase.generate]))
        except (AssertionError, ValueError) as error:
            print(f"found: {type(error).__name__} {' '.join(str(error).split())[:100]}")
            return 0
    print("not found")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
