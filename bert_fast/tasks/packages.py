"""Packages that are installed only where someone asks for what they do."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["package"]

SOURCES = {"faiss": "faiss-cpu", "pyarrow": "pyarrow", "ray": "ray[data]", "usearch": "usearch"}


def package(name: str, purpose: str) -> Any:
    """The imported module.

    Args:
        name: such as "ray.data".
        purpose: what it is for, for the message.

    Raises:
        ImportError: its package is not installed; the message names what pip is to install.
    """
    try:
        return import_module(name)
    except ImportError as error:
        source = SOURCES[name.partition(".")[0]]
        raise ImportError(f"{purpose} needs {source} (pip install '{source}'): {error}", name=name) from error
