"""The version, here alone: pyproject.toml and the compiled extension take it from this file."""

__version__ = "0.1.0"
