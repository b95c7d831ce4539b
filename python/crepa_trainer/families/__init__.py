"""What the trainer must know of each model family: its pipeline's parts, encodings, and the transformer's call."""

from .base import ClipSize, TrainingFamily
from .wan import WanFamily

__all__ = ["ClipSize", "TrainingFamily", "WanFamily"]
