"""What the trainer must know of each model family: its pipeline's parts, encodings, and the transformer's call."""

from .base import ClipSize, Text, TrainingFamily
from .cogvideox import CogVideoXFamily
from .kandinsky5 import Kandinsky5Family
from .wan import WanFamily

__all__ = ["ClipSize", "CogVideoXFamily", "Kandinsky5Family", "Text", "TrainingFamily", "WanFamily"]
