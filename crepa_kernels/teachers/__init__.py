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


def spatially_normalized(features: torch.Tensor, alpha: float) -> torch.Tensor:
    """iREPA's teacher (arXiv 2512.10794): each channel of a frame's patches with less of its mean, and unit deviation.

    ``(y - alpha * mean) / (std + 1e-6)`` over the N patches of (..., N, E), std with N - 1, both in fp32 (fp64). What
    all patches share is taken off, and what tells them apart stays. A frame of one patch has no deviation and is
    left as it is. In the features' type, but for fp16: fp32, whose range holds a channel that hardly varies.
    """
    wide = features.double() if features.dtype == torch.float64 else features.float()
    if features.shape[-2] > 1:
        std, mean = torch.std_mean(wide, dim=-2, keepdim=True)
        wide = torch.sub(wide, mean, alpha=alpha).div_(std.add_(1e-6))
    return wide if features.dtype == torch.float16 else wide.to(features.dtype)
