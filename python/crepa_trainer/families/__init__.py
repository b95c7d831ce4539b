"""What the trainer must know of each model family: its pipeline's parts, encodings, and the transformer's call."""

from .base import Text, TrainingFamily
from .cogvideox import CogVideoXFamily
from .hunyuan_video import HunyuanVideoFamily
from .kandinsky5 import Kandinsky5Family
from .ltxvideo import LtxVideoFamily
from .sanavideo import SanaVideoFamily
from .sizes import ClipSize
from .text_limits import CutText
from .wan import WanFamily

__all__ = [
    "ClipSize",
    "CogVideoXFamily",
    "CutText",
    "HunyuanVideoFamily",
    "Kandinsky5Family",
    "LtxVideoFamily",
    "SanaVideoFamily",
    "Text",
    "TrainingFamily",
    "WanFamily",
]
