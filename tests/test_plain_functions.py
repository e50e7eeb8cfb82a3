"""The functions of mac_attn._C that `decode` calls, not torch.ops (csrc/plain_function.h)."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mac_attn import _C

OPS = torch.ops.mac_attn
NAMES = [argument.name for argument in OPS.decode_exact.default._schema.arguments]


def arguments(tokens: int = 20, **changed: object) -> list[Any]:
    """Of decode_exact: one request, 4 query heads over 2 KV heads."""
    generator = torch.Generator().manual_seed(tokens)
    k_cache, v_cache = torch.randn(2, 3, 16, 2, 32, generator=generator)
    given = {
        "q": torch.randn(1, 4, 32, generator=generator),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "hnd": False,
        "block_table": torch.tensor([[2, 0, 1]], dtype=torch.int32),
        "seq_lens": torch.tensor([tokens], dtype=torch.int32),
        "sm_scale": 0.2,
        "logits_soft_cap": 0.0,
        "batch_invariant": False,
        **changed,
    }
    return [given.get(name) for name in NAMES]


def test_they_answer_what_torch_ops_answers() -> None:
    given = arguments()
    expected, expected_lse = OPS.decode_exact(*given)
    assert expected.isfinite().all() and expected.abs().max() > 0.01
    out, lse = _C.decode_exact(*given)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    into = torch.empty_like(out)
    assert torch.equal(_C.decode_exact_into(into, *given), lse) and torch.equal(into, out)


def test_subclasses_of_tensors_are_tensors() -> None:
    class Mine(torch.Tensor):
        pass

    expected, _ = _C.decode_exact(*arguments())
    for kind in (torch.nn.Parameter, lambda tensor: tensor.as_subclass(Mine)):
        with torch.no_grad():
            out, _ = _C.decode_exact(*arguments(q=kind(arguments()[0])))
        assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"k_cache": None}, "k_cache is None, must be a Tensor"),
        ({"q": [1.0]}, "q is of type list, must be a Tensor"),
        ({"v_cache": 3}, "v_cache is of type int, must be a Tensor or None"),
        ({"hnd": 1}, "hnd is of type int, must be True or False"),
        ({"sm_scale": "small"}, "sm_scale is of type str, must be a number"),
    ],
)
def test_an_argument_of_another_type_is_named(changed: dict[str, object], said: str) -> None:
    with pytest.raises(TypeError) as raised:
        _C.decode_exact(*arguments(**changed))
    assert str(raised.value) == said


@pytest.mark.parametrize("entries", [1.5, 2**70, "many"])
def test_a_number_that_is_no_int_of_64_bits(entries: object) -> None:
    schema = OPS.decode_reuse.default._schema.arguments
    values = {"Tensor": torch.zeros(1), "int": 1, "bool": False}  # read before anything is checked
    given = [values.get(str(argument.type)) for argument in schema]
    given[[argument.name for argument in schema].index("entries")] = entries
    with pytest.raises(
        TypeError, match=f"entries is of type {type(entries).__name__}, must be an int of"
    ):
        _C.decode_reuse(*given)


def test_how_many_arguments() -> None:
    with pytest.raises(TypeError, match="mac_attn::decode_exact is given 12 arguments, must be 13"):
        _C.decode_exact(*arguments()[:-1])


def test_wrong_values_raise_what_the_op_raises() -> None:
    for changed in ({"sm_scale": float("nan")}, {"seq_lens": torch.zeros(2, dtype=torch.int32)}):
        given = arguments(**changed)
        with pytest.raises(ValueError) as expected:
            OPS.decode_exact(*given)
        with pytest.raises(ValueError) as raised:
            _C.decode_exact(*given)
        assert str(raised.value) == str(expected.value)


def test_an_error_of_python_code_that_the_dispatcher_calls() -> None:
    class Refuses(TorchDispatchMode):
        def __torch_dispatch__(self, func: object, *_: object) -> None:
            raise KeyError(str(func))

    given = arguments()
    with Refuses(), pytest.raises(KeyError, match="mac_attn.decode_exact"):
        _C.decode_exact(*given)


def test_no_reference_is_kept() -> None:
    given = arguments()
    before = [sys.getrefcount(argument) for argument in given if isinstance(argument, torch.Tensor)]
    for _ in range(3):
        answer = _C.decode_exact(*given)
        assert sys.getrefcount(answer) == 2 and {sys.getrefcount(item) for item in answer} == {3}
        with pytest.raises(TypeError):
            _C.decode_exact(*given[:5], *["no tensor"] * 8)
    after = [sys.getrefcount(argument) for argument in given if isinstance(argument, torch.Tensor)]
    assert before == after
