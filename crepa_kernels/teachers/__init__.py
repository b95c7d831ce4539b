"""Teachers: whatever gives frozen features of the clip for the student to align with."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..grid import Grid
from .encoders import FrozenEncoder, register_encoder

__all__ = ["FrozenEncoder", "TeacherFeatures", "register_encoder"]


class TeacherFeatures(NamedTuple):
    """Patch features (..., N, E) in raster order and their grid (height, width), N = height x width."""

    features: torch.Tensor
    grid: Grid
