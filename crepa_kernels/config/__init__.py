"""Settings: one validated schema for each loss, and the sources they come from."""

from .layersync import LayerSyncConfig
from .rules import ConfigError
from .schema import CrepaConfig
from .urepa import UrepaConfig

__all__ = ["ConfigError", "CrepaConfig", "LayerSyncConfig", "UrepaConfig"]
