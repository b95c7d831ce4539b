"""CREPA's options: one validated schema, and the sources they come from."""

from .rules import ConfigError
from .schema import CrepaConfig

__all__ = ["ConfigError", "CrepaConfig"]
