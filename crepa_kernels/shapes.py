"""Widths and sizes of the models that people train: what is tuned and reported when nobody names a shape."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ShapeClass:
    """One call on equal grids: T latent frames of M tokens, width D, against teacher features of width E."""

    name: str
    hidden_size: int
    frames: int
    tokens: int
    feature_size: int = 1536


SHAPE_CLASSES = (
    ShapeClass("wan-1.3b-480p", 1536, 21, 1560),
    ShapeClass("wan-14b-480p", 5120, 21, 1560),
    ShapeClass("wan2.2-5b-720p", 3072, 31, 880),
    ShapeClass("ltx-2b", 2048, 16, 384),
    ShapeClass("ltx-13b", 4096, 16, 836),
    ShapeClass("wan-14b-480p-dinov2-b", 5120, 21, 1560, 768),
    ShapeClass("wan-14b-480p-dinov2-s", 5120, 21, 1560, 384),
)
