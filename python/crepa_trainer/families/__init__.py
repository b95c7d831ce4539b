"""What the trainer must know of each model family: its pipeline's parts, encodings, and the transformer's call.

Every module here that holds a `TrainingFamily` is found: a family needs no other place to be told of.
"""

from importlib import import_module
from pkgutil import iter_modules

from .base import Text, TrainingFamily
from .sizes import ClipSize
from .text_limits import CutText

__all__ = ["ClipSize", "CutText", "Text", "TrainingFamily"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
