"""Names of torchvision, for packages that import them and never use them.

The package index's torchvision does not load beside a torch for the CPU. SGLang imports it for its
models of images, which no test here has. Whatever is taken from this module or one below it is
there; what is called raises.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

__path__: list[str] = []  # so that there are modules below it


class Missing:
    """Anything of torchvision's."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Missing:
        return _missing(self._name, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ImportError(f"{self._name} is not here: torchvision is not installed")


def _missing(module: str, name: str) -> Missing:
    if name.startswith("__"):
        raise AttributeError(name)
    return Missing(f"{module}.{name}")


def __getattr__(name: str) -> Missing:
    return _missing("torchvision", name)


class _Below:
    """Finds the modules below, each as empty as this one."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        if name.startswith("torchvision."):
            return importlib.machinery.ModuleSpec(name, _Below, is_package=True)  # type: ignore[arg-type]
        return None

    @staticmethod
    def create_module(spec: Any) -> Any:
        module: Any = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: _missing(spec.name, name)
        return module

    @staticmethod
    def exec_module(module: Any) -> None:
        pass


sys.meta_path.append(_Below)  # type: ignore[arg-type]
