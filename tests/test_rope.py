"""Rotation and its inverse, against complex numbers and against transformers' own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import plain_dtype
from torch import Tensor, nn

from mac_attn import RotaryEmbedding, rotate, unrotate


def inv_freq(dim: int, base: float = 10000.0) -> Tensor:
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def rotated_by_complex_numbers(q: Tensor, positions: Tensor, rotary: RotaryEmbedding) -> Tensor:
    """`scale * R(p) q` in float64: a pair is a complex number, turned by exp(i p f)."""
    q, dim = q.double(), rotary.dim
    first = torch.arange(dim // 2) * 2 if rotary.interleaved else torch.arange(dim // 2)
    second = first + 1 if rotary.interleaved else first + dim // 2
    angle = positions.double()[..., None, None] * rotary.inv_freq.double()
    z = torch.complex(q[..., first], q[..., second]) * torch.polar(torch.ones_like(angle), angle)
    result = q.clone()
    result[..., first], result[..., second] = z.real * rotary.scale, z.imag * rotary.scale
    return result


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [64, 32, 2])
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_rotates_pairs(interleaved, dim, scale, device):
    rotary = RotaryEmbedding(inv_freq(dim), interleaved, scale)
    q, positions = torch.randn(3, 5, 4, 64), torch.randint(0, 2000, (3, 5))
    got = rotate(q.to(device), positions.to(device), rotary.to(device)).cpu()
    # The angle p * f is rounded to float32: off by up to 2000 * 2^-24 = 1.2e-4 rad.
    want = rotated_by_complex_numbers(q, positions, rotary)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-3)
    assert torch.equal(got[..., dim:], q[..., dim:])  # the rest passes through


# Forth and back are two roundings of numbers up to 4 sigma: 4 * eps, and a bit for the arithmetic.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_unrotate_is_the_inverse(dtype, interleaved, scale, device):
    rotary = RotaryEmbedding(inv_freq(48), interleaved, scale).to(device)
    q = torch.randn(7, 4, 64, device=device, dtype=dtype)
    positions = torch.randint(0, 131072, (7,), device=device, dtype=torch.int32)
    back = unrotate(rotate(q, positions, rotary), positions, rotary)
    assert back.dtype == dtype and back.device == q.device
    torch.testing.assert_close(back, q, rtol=0, atol=8 * torch.finfo(dtype).eps)
    again = rotate(unrotate(q, positions, rotary), positions, rotary)
    torch.testing.assert_close(again, q, rtol=0, atol=8 * torch.finfo(dtype).eps)


# One token per request goes through one op of ours, anything else through torch's. Both compute in
# float32; sines of two libraries and another order of operations differ by some units before
# rounding.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [64, 512])
def test_one_pass_and_torch_agree(head_dim, dtype, interleaved, device):
    rotary = RotaryEmbedding(inv_freq(48), interleaved, 1.3).to(device)
    q, positions = torch.randn(7, 4, head_dim).to(dtype), torch.randint(0, 131072, (7,)).int()
    q, positions = q.to(device), positions.to(device)
    expected = unrotate(q[:, None], positions[:, None], rotary)[:, 0]
    atol = 4 * torch.finfo(torch.float32).eps + 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(unrotate(q, positions, rotary), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("interleaved", [False, True])
def test_one_pass_opcheck(interleaved, device):
    q, positions = torch.randn(3, 4, 32).bfloat16(), torch.tensor([5, 0, 9], dtype=torch.int32)
    arguments = [t.to(device) for t in (q, positions, inv_freq(16))]
    torch.library.opcheck(torch.ops.mac_attn.unrotate.default, (*arguments, interleaved, 1.5))


def test_strided_queries_and_padding_rows(device):
    rotary = RotaryEmbedding(inv_freq(32)).to(device)
    fused = torch.randn(3, 6, 32, device=device).to(plain_dtype(device))
    positions = torch.tensor([4, -1, 9], dtype=torch.int32, device=device)  # seq_lens - 1
    got = unrotate(fused[:, :4], positions, rotary)
    assert torch.equal(got, unrotate(fused[:, :4].contiguous(), positions, rotary))
    assert got.isfinite().all()
    assert unrotate(fused[:0], positions[:0], rotary).shape == (0, 6, 32)


def test_compiles():
    rotary = RotaryEmbedding(inv_freq(32))
    q, positions = torch.randn(3, 4, 32), torch.tensor([7, 0, 500])
    compiled = torch.compile(lambda q, p: unrotate(q, p, rotary), fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, positions), unrotate(q, positions, rotary))


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (TypeError, "inv_freq is torch.float64", lambda: RotaryEmbedding(inv_freq(8).double())),
        (ValueError, r"inv_freq has shape \[2, 2\]", lambda: RotaryEmbedding(torch.rand(2, 2))),
        (ValueError, r"inv_freq has shape \[0\]", lambda: RotaryEmbedding(torch.rand(0))),
        (TypeError, "interleaved is of type int", lambda: RotaryEmbedding(inv_freq(8), 1)),
        (ValueError, "scale is 0", lambda: RotaryEmbedding(inv_freq(8), scale=0)),
        (ValueError, "scale is nan", lambda: RotaryEmbedding(inv_freq(8), scale=float("nan"))),
    ],
)
def test_refuses_bad_rotations(error, message, make):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "q is torch.float64", dict(q=torch.rand(2, 4, 32).double())),
        (TypeError, "q is None", dict(q=None)),
        (ValueError, r"q has shape \[2, 4, 16\].* at least 32", dict(q=torch.rand(2, 4, 16))),
        (ValueError, r"positions has shape \[3\], must be \[2\]", dict(positions=torch.arange(3))),
        (TypeError, "positions is torch.float32", dict(positions=torch.rand(2))),
        (TypeError, "rotary is of type Tensor", dict(rotary=inv_freq(32))),
    ],
)
@pytest.mark.parametrize("function", [rotate, unrotate])
def test_refuses_bad_arguments(function, error, message, arguments):
    good: dict[str, Any] = dict(
        q=torch.rand(2, 4, 32), positions=torch.arange(2), rotary=RotaryEmbedding(inv_freq(32))
    )
    with pytest.raises(error, match=message):
        function(**good | arguments)


# transformers: the same cos and sin, and the inverse of the model's own function.

transformers = pytest.importorskip("transformers")

ROPE_TYPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
}


def llama(**rope: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=16,
        max_position_embeddings=4096,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("name", ROPE_TYPES)
def test_agrees_with_llama_bit_for_bit(name):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = llama(**ROPE_TYPES[name])
    rotary = RotaryEmbedding.from_transformers(model)
    assert rotary.dim == 32 and (rotary.scale != 1.0) == (name == "yarn")
    q, positions = torch.randn(2, 9, 4, 32), torch.randint(0, 4096, (2, 9))
    cos, sin = model.model.rotary_emb(q, positions)
    ours = rotary.cos_sin(positions)
    assert torch.equal(ours[0] * rotary.scale, cos[..., :16])
    assert torch.equal(ours[1] * rotary.scale, sin[..., :16])
    theirs, _ = apply_rotary_pos_emb(q, q, cos, sin, unsqueeze_dim=2)
    # The same products and one sum; a compiler may fuse them: one rounding of numbers up to 6.
    torch.testing.assert_close(rotate(q, positions, rotary), theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(unrotate(theirs, positions, rotary), q, rtol=0, atol=2e-6)


def test_agrees_with_glm():
    """Interleaved pairs, half of the dimensions."""
    from transformers.models.glm.modeling_glm import apply_rotary_pos_emb

    config = transformers.GlmConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=16,
        pad_token_id=0,
    )
    model = transformers.GlmModel(config)
    rotary = RotaryEmbedding.from_transformers(model, interleaved=True)
    assert rotary.dim == 16
    q, positions = torch.randn(2, 9, 4, 32), torch.randint(0, 4096, (2, 9))
    cos, sin = model.rotary_emb(q, positions)
    theirs, _ = apply_rotary_pos_emb(q, q, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(rotate(q, positions, rotary), theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(unrotate(theirs, positions, rotary), q, rtol=0, atol=2e-6)


def test_rotation_per_kind_of_layer():
    config = transformers.Gemma3TextConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=16,
    )
    model = transformers.Gemma3TextModel(config)
    with pytest.raises(ValueError, match=r"layer_type is None, must be one of \['full_attention'"):
        RotaryEmbedding.from_transformers(model)
    q, positions = torch.randn(1, 9, 2, 32), torch.randint(0, 4096, (1, 9))
    for layer_type in ("full_attention", "sliding_attention"):
        rotary = RotaryEmbedding.from_transformers(model, layer_type=layer_type)
        cos, _ = model.rotary_emb(q, positions, layer_type)
        assert torch.equal(rotary.cos_sin(positions)[0], cos[..., :16])


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "short_factor": [1.0] * 16,
            "long_factor": [2.0] * 16,
        },
        {"rope_type": "default", "mrope_section": [4, 6, 6]},
    ],
    ids=["dynamic", "longrope", "mrope"],
)
def test_refuses_rotations_that_are_not_of_the_position_alone(rope):
    name = "mrope_section" if "mrope_section" in rope else rope["rope_type"]
    with pytest.raises(ValueError, match=name):
        RotaryEmbedding.from_transformers(llama(**rope))


def test_refuses_models_without_one_rotation():
    with pytest.raises(ValueError, match="no rotary module"):
        RotaryEmbedding.from_transformers(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model is of type LlamaConfig, must be a Module"):
        RotaryEmbedding.from_transformers(transformers.LlamaConfig())
    two = nn.ModuleList([llama(), llama(rope_theta=5000.0)])
    with pytest.raises(ValueError, match="2 rotary modules that differ"):
        RotaryEmbedding.from_transformers(two)
    RotaryEmbedding.from_transformers(nn.ModuleList([llama(), llama()]))  # alike: no question
