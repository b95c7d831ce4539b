"""CREPA in a training step of a stock diffusers transformer."""

from .crepa import CrepaRegularizer
from .schedule import CrepaSchedule

__all__ = ["CrepaRegularizer", "CrepaSchedule"]
