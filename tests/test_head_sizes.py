"""Head sizes that no kernel is made for: half a vector at the end, or rows that are filled up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import make_kv, make_q, small_config
from test_decode_reference import (
    DTYPES,
    EACH_DTYPE,
    FORMS,
    GROUPS,
    chain,
    check_exact,
    form_options,
)

import mac_attn
from mac_attn.integrations.serving.limits import heads_reason

HEAD_DIMS = [8, 16, 24, 40, 48, 72, 88, 104, 112, 120, 136, 160, 200, 240, 512]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_exact(head_dim, dtype, form, device):
    """Beside every row lies a NaN, which is what a kernel that reads beyond it would answer."""
    group = GROUPS[HEAD_DIMS.index(head_dim) % 4]
    check_exact(
        seed=300 + head_dim,
        lengths=[1, 33, 150],
        heads=(2 * group, 2),
        head_dim=head_dim,
        page_size=7,
        dtype=dtype,
        device=device,
        strided=True,
        **form_options(form, 0, 2 * group, device),
    )


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_reuse(head_dim, form, device):
    at = HEAD_DIMS.index(head_dim) + FORMS.index(form)
    chain(
        small_config(anchors=6 * (at % 2)),
        device=device,
        heads=(2 * GROUPS[at % 4], 2),
        head_dim=head_dim,
        page_size=7,
        dtype=EACH_DTYPE[at % 3],
        strided=True,
        seed=700 + at,
        **form_options(form, at, 2 * GROUPS[at % 4], device),
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", [{}, {"anchors": 30}, {"granularity": "head"}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_reuse_of_the_largest(dtype, config, form, device):
    """Eight query heads for each KV head, as Gemma 4 has: all that a GPU attends to at once."""
    chain(
        small_config(**config),
        device=device,
        steps=45,  # of 32 entries
        heads=(16, 2),
        head_dim=512,
        dtype=dtype,
        seed=800,
        **form_options(form, 1, 16, device),
    )


def check_most_heads(device: torch.device) -> None:
    """What the kernels of a GPU have no room for with heads of 512."""
    options = dict(head_dim=512, dtype=torch.bfloat16, device=device)
    for group, config, reason in (
        (65, None, "must be at most 64 with head_dim 512 on CUDA"),
        (9, small_config(anchors=4), "must be at most 8 with anchors and head_dim 512 on CUDA"),
    ):
        kv = make_kv(1, batch=1, length=4, num_kv_heads=1, **options)
        q = make_q(2, 1, group, 512, dtype=torch.bfloat16, device=device)
        lengths = torch.tensor([4], dtype=torch.int32, device=device)
        reuse: dict[str, Any] = {}
        if config is not None:
            cache = mac_attn.ReuseCache(
                config, num_slots=1, num_qo_heads=group, num_kv_heads=1, **options
            )
            reuse = {"reuse": cache, "slots": torch.zeros_like(lengths), "q_match": q}
        with pytest.raises(ValueError, match=f"num_qo_heads / num_kv_heads is {group}, {reason}"):
            mac_attn.decode(q, kv.cache, kv.table([4]), lengths, **reuse)


def test_most_heads(cuda):
    check_most_heads(cuda)


@pytest.mark.parametrize("head_dim", [4, 12, 250, 264, 504, 520])
def test_refused(head_dim, device):
    options = dict(dtype=torch.bfloat16, device=device)
    kv = make_kv(1, batch=1, length=4, num_kv_heads=1, head_dim=head_dim, **options)
    q = make_q(2, 1, 2, head_dim, **options)
    lengths = torch.tensor([4], dtype=torch.int32, device=device)
    reason = f"q has head_dim {head_dim}, must be a multiple of 8 up to 256, or 512"
    with pytest.raises(ValueError, match=reason):
        mac_attn.decode(q, kv.cache, kv.table([4]), lengths)


def test_what_engines_are_told():
    half, single = torch.bfloat16, torch.float32
    assert heads_reason(72, half, "cuda") is None and heads_reason(72, single, "cpu") is None
    assert heads_reason(72, single, "cuda") == "dtype torch.float32"
    assert heads_reason(72, half, "cuda", float8=True) == "heads of 72"
    assert heads_reason(72, half, "cpu", float8=True) is None
    for device in ("cpu", "cuda"):
        assert heads_reason(512, half, device) is None
        assert heads_reason(512, half, device, float8=True) is None
    for head_dim in (12, 264, 504, 520):
        for device in ("cpu", "cuda"):
            assert heads_reason(head_dim, half, device) == f"heads of {head_dim}"
