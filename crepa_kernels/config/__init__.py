"""Settings: one validated schema for each loss, and the sources they come from."""

from .rules import ConfigError
from .schema import CrepaConfig
from .urepa import UrepaConfig

__all__ = ["ConfigError", "CrepaConfig", "UrepaConfig"]
