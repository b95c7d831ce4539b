"""CREPA and U-REPA in a training step of a stock diffusers model."""

from .crepa import CrepaRegularizer
from .schedule import CrepaSchedule
from .urepa import UrepaRegularizer

__all__ = ["CrepaRegularizer", "CrepaSchedule", "UrepaRegularizer"]
