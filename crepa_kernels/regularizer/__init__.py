"""CREPA, U-REPA and LayerSync in a training step of a stock diffusers model."""

from .crepa import CrepaRegularizer
from .joining import join_loss
from .layersync import LayerSync
from .schedule import CrepaSchedule
from .urepa import UrepaRegularizer

__all__ = ["CrepaRegularizer", "CrepaSchedule", "LayerSync", "UrepaRegularizer", "join_loss"]
