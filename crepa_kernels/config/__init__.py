"""The options of each loss: one validated schema, and the sources they come from."""

from .layersync import LayerSyncConfig
from .rules import ConfigError
from .schema import CrepaConfig

__all__ = ["ConfigError", "CrepaConfig", "LayerSyncConfig"]
