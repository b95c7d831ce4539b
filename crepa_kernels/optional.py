"""Packages that only some uses need, imported where they are used."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def require(package: str, purpose: str, extra: str = "trainer") -> ModuleType:
    """Imports ``package``; an ImportError names what needs it and the extra that brings it."""
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        distribution = package.split(".", 1)[0]
        if error.name != distribution:
            raise
        raise ImportError(f"{purpose} needs {distribution}: pip install crepa-kernels[{extra}]") from error
