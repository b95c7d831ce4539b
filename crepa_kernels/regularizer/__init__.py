"""CREPA and LayerSync in a training step of a stock diffusers transformer."""

from .crepa import CrepaRegularizer
from .layersync import LayerSync
from .schedule import CrepaSchedule

__all__ = ["CrepaRegularizer", "CrepaSchedule", "LayerSync"]
