"""What the trainer must know of each model family: its pipeline's parts, encodings, and the transformer's call."""

from .base import ClipSize, Text, TrainingFamily
from .wan import WanFamily

__all__ = ["ClipSize", "Text", "TrainingFamily", "WanFamily"]
