"""The sample that a miss draws: what it is by definition, and that it estimates without bias."""

from __future__ import annotations

import math

import pytest
import torch
from cases import close, hashed
from estimator import Problem, backend_draws, check, reference_draws

from mac_attn.reference import Draw, draw_sample, first_tau, next_tau, uniforms

# S, and the candidates that tau lets through on average: fewer, as many, more than there is room.
REGIMES = {"threshold": (48, 24.0), "either": (24, 24.0), "priority": (24, 48.0)}


@pytest.mark.parametrize("regime", REGIMES)
def test_the_reference_estimates_without_bias(regime):
    problem = Problem(*REGIMES[regime], torch.device("cpu"), torch.float32)
    check(problem, reference_draws(problem), rounding=1e-12)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_estimate_without_bias(regime, dtype, device):
    problem = Problem(*REGIMES[regime], device, dtype)
    rounding = 3e-5 if dtype == torch.float32 else 2e-2
    check(problem, backend_draws(problem), rounding)


def test_hash_in_plain_integers():
    for position, head, layer in [
        (0, 0, 0),
        (1, 0, 0),
        (0, 3, 2),
        (131071, 7, 31),
        (2**31 - 1, 1, 79),
    ]:
        got = uniforms(position, head, layer, 1000)
        assert got.tolist() == [hashed(position, head, layer, i) for i in range(1000)]
        assert (got > 0).all() and (got <= 1).all()
        assert got.mean() == pytest.approx(0.5, abs=5 / math.sqrt(12 * 1000))


def test_hashes_of_neighbours_are_uncorrelated():
    base = uniforms(500, 2, 3, 20_000)
    for other in (
        uniforms(501, 2, 3, 20_000), uniforms(500, 3, 3, 20_000), uniforms(500, 2, 4, 20_000),
        base.roll(1),
    ):  # fmt: skip
        correlation = torch.corrcoef(torch.stack([base, other]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(20_000)


def make_draw(weights: list[float], u: list[float], tau: float, anchors: int) -> Draw:
    weight = torch.tensor(weights, dtype=torch.float64)
    return Draw(0, 0, 0, weight, weight / torch.tensor(u, dtype=torch.float64), tau, anchors)


def test_few_candidates_are_all_kept():
    sample = draw_sample(make_draw([0.5, 0.01, 0.03, 0.001], [1, 0.1, 0.5, 0.9], 0.08, 3))
    assert (sample.anchors.tolist(), sample.count) == ([0, 1], 2)  # keys 0.5, 0.1, 0.06, 0.001
    close(sample.weights, torch.tensor([0.0, 7.0]).double())  # 0.08 / 0.01 - 1


def test_of_many_candidates_tau_rises_to_the_largest_key_cut():
    sample = draw_sample(make_draw([0.5, 0.01, 0.03, 0.02], [1, 0.1, 0.5, 0.1], 0.05, 2))
    assert (sample.anchors.tolist(), sample.count) == ([0, 3], 4)  # keys 0.5, 0.1, 0.06, 0.2
    close(sample.weights, torch.tensor([0.0, 4.0]).double())  # 0.1 / 0.02 - 1


def test_strange_weights():
    sample = draw_sample(make_draw([math.inf, math.nan, 0.0, 0.01], [1.0] * 4, 0.02, 2))
    assert (sample.anchors.tolist(), sample.count) == ([0], 1)
    close(sample.weights, torch.zeros(1))
    nothing = draw_sample(make_draw([], [], 0.02, 2))
    assert (len(nothing.anchors), nothing.count) == (0, 0)


def test_tau_is_steered_to_one_and_a_half_times_the_anchors():
    assert first_tau(64) == 1 / 64
    assert next_tau(0.1, 96, 64) == pytest.approx(0.1)
    assert next_tau(0.1, 48, 64) == pytest.approx(0.05)
    assert next_tau(0.1, 0, 64) == next_tau(0.1, 5, 64) == pytest.approx(0.025)  # at most fourfold
    assert next_tau(0.1, 10**6, 64) == pytest.approx(0.4)
    assert next_tau(40.0, 10**6, 64) == 64
    assert next_tau(0.0005, 0, 64) == 1 / 64 / 64
