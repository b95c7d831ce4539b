"""What the trainer must know of each model family: its pipeline's parts, encodings, and the transformer's call."""

from .base import ClipSize, Text, TrainingFamily
from .hunyuan_video import HunyuanVideoFamily
from .ltxvideo import LtxVideoFamily
from .sanavideo import SanaVideoFamily
from .wan import WanFamily

__all__ = [
    "ClipSize",
    "HunyuanVideoFamily",
    "LtxVideoFamily",
    "SanaVideoFamily",
    "Text",
    "TrainingFamily",
    "WanFamily",
]
