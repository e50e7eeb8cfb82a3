"""The plugin's methods have the arguments of those that they override, and what it reads is there.

In the newest vLLM, whose sources vllm_signatures.json was made from, and in the one installed.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from vllm_signatures import (
    OURS,
    OVERRIDING,
    READ,
    STORED,
    arguments,
    class_of,
    methods,
    overridden,
    present,
)

VERSIONS: dict[str, Any] = json.loads(STORED.read_text())


def own_methods() -> dict[str, list[str]]:
    """The arguments of all methods of our classes, those apart that only we call."""
    found = {}
    for name in OVERRIDING:
        own = class_of(OURS, name)
        assert own is not None, name
        for method, node in methods(own).items():
            if method.startswith("__") or not method.startswith("_"):
                found[f"{name}.{method}"] = arguments(node)
    return found


def differences(theirs: dict[str, list[str]]) -> list[str]:
    """What vLLM may call in a way that ours do not take."""
    found = []
    for name, have in own_methods().items():
        want = theirs.get(name)
        if want is None:
            found.append(f"{name} overrides nothing")
        elif have[1:] != ["*args", "**kwargs"] and have != want:
            found.append(f"{name} takes {have}, vLLM's {want}")
    return found


def lacking(there: dict[str, list[str]]) -> list[str]:
    """What the plugin reads and is not there."""
    return [f"{name}.{part}" for name in READ for part in READ[name] if part not in there[name]]


@pytest.mark.parametrize("version", sorted(VERSIONS))
def test_stored(version: str) -> None:
    assert differences(VERSIONS[version]["overridden"]) == []
    assert lacking(VERSIONS[version]["present"]) == []


def test_installed() -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed; `make vllm` has it")
    root = Path(spec.origin).parent.parent
    assert differences(overridden(root)) == []
    assert lacking(present(root)) == []


def test_a_new_keyword_is_noticed() -> None:
    newest = VERSIONS[max(VERSIONS)]
    name = "cuda.py:MacFlashImpl.forward"
    theirs = {**newest["overridden"], name: [*newest["overridden"][name], "sinks="]}
    (found,) = differences(theirs)
    assert found.startswith(f"{name} takes")
    there = {**newest["present"], "vllm/v1/worker/gpu/states.py:RequestState": []}
    assert len(lacking(there)) == 2
