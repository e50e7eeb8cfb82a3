"""ReuseConfig: what it accepts, how it refuses, and the thresholds it gives the kernels."""

from __future__ import annotations

import math

import pytest
import torch

from mac_attn import ReuseConfig


def test_paper_settings():
    cfg = ReuseConfig.paper()
    assert (cfg.entries, cfg.window, cfg.band, cfg.anchors) == (512, 512, 256, 0)
    assert (cfg.min_context, cfg.max_reuse_depth) == (2048, None)
    assert (cfg.threshold_mode, cfg.granularity) == ("absolute", "head")
    # theta = 2 * 128 * (1 - 0.45)^2 = 77.44, rounded to float32.
    assert torch.equal(cfg.threshold_per_head(4, 128), torch.tensor([77.44] * 4))


def test_relative_threshold_is_passed_on():
    got = ReuseConfig(threshold=0.2).threshold_per_head(3, 64)
    assert got.dtype == torch.float32 and got.is_contiguous()
    assert torch.equal(got, torch.tensor([0.2, 0.2, 0.2]))


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_threshold_per_head(kind, mode):
    numbers = torch.rand(6).double().tolist()
    cfg = ReuseConfig(threshold=kind(numbers), threshold_mode=mode)
    got = cfg.threshold_per_head(6, 32)
    if mode == "absolute":
        numbers = [2 * 32 * (1 - tau) ** 2 for tau in numbers]
    # float32 of the same number; a float32 tensor of thresholds has lost some digits before.
    torch.testing.assert_close(got.double(), torch.tensor(numbers).double(), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"threshold has 6 numbers, must have 1 or .* = 8"):
        cfg.threshold_per_head(8, 32)


def test_compares_and_hashes_by_value_and_does_not_change():
    tensor = torch.rand(4)
    cfg = ReuseConfig(threshold=tensor)
    assert cfg == ReuseConfig(threshold=tensor.tolist())
    assert hash(cfg) == hash(ReuseConfig(threshold=tensor.tolist()))
    before = cfg.threshold_per_head(4, 16)
    tensor.zero_()
    assert torch.equal(cfg.threshold_per_head(4, 16), before)
    with pytest.raises(AttributeError):
        cfg.window = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "changes",
    [
        dict(entries=0),
        dict(entries=2**24 + 1),
        dict(window=0),
        dict(window=2**31),
        dict(band=0),
        dict(anchors=-1),
        dict(anchors=2**24 + 1),
        dict(min_context=-1),
        dict(max_reuse_depth=0),
        dict(threshold=-0.1),
        dict(threshold=math.nan),
        dict(threshold=math.inf),
        dict(threshold=1e300),
        dict(threshold=[]),
        dict(threshold=[0.1, math.nan]),
        dict(threshold=torch.full((2, 2), 0.3)),
        dict(threshold=1.1, threshold_mode="absolute"),
        dict(threshold_mode="cosine"),
        dict(granularity="layer"),
    ],
    ids=str,
)
def test_refuses_values(changes):
    # The message names the argument, and what it must be.
    with pytest.raises(ValueError, match=rf"{next(iter(changes))}.* must "):
        ReuseConfig(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        dict(entries=512.0),
        dict(window=512.0),
        dict(window=True),
        dict(band="256"),
        dict(anchors=None),
        dict(min_context=None),
        dict(max_reuse_depth=1.5),
        dict(threshold="0.1"),
        dict(threshold=None),
        dict(threshold=["0.1"]),
        dict(threshold_mode=0),
        dict(granularity=None),
    ],
    ids=str,
)
def test_refuses_types(changes):
    with pytest.raises(TypeError, match=rf"{next(iter(changes))}.* must be "):
        ReuseConfig(**changes)


def test_anchors_need_decisions_per_group_and_exact_entries():
    with pytest.raises(ValueError, match="anchors is 64, must be 0 with granularity='head'"):
        ReuseConfig(anchors=64, granularity="head")
    for depth in (2, None):
        with pytest.raises(ValueError, match=f"anchors is 64, must be 0 with max_.*={depth}"):
            ReuseConfig(anchors=64, max_reuse_depth=depth)
    ReuseConfig(granularity="head", anchors=0, max_reuse_depth=None)
    ReuseConfig(anchors=64, max_reuse_depth=1)


def test_limits_are_allowed():
    ReuseConfig(
        entries=1, window=1, band=1, anchors=0, threshold=0, min_context=0, max_reuse_depth=1
    )
    ReuseConfig(entries=2**24, window=2**31 - 1, anchors=2**24)
    ReuseConfig(threshold=1, threshold_mode="absolute")
