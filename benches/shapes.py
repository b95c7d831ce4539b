"""The shapes that people train: what the benches and their tables go through."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from crepa_kernels import CrepaProjector, crepa_loss
from crepa_kernels.grid import Grid, SpatialAlign, num_tokens


@dataclass(frozen=True)
class Shape:
    """One loss call: T latent frames of a student grid, width D, against a teacher grid, width E."""

    name: str
    hidden_size: int
    frames: int
    student_grid: Grid
    teacher_grid: Grid
    feature_size: int
    spatial_align: SpatialAlign = "student"
    antialias: bool = True
    dtype: str = "float32"
    cpu_frames: int = 2

    @property
    def id(self) -> str:
        filter_name = "" if self.antialias else "-plain"
        grids = "x".join(map(str, self.student_grid)) + "-to-" + "x".join(map(str, self.teacher_grid))
        return f"{self.name}-{grids}-E{self.feature_size}{filter_name}-{self.dtype}"

    def inputs(
        self, frames: int, device: str | torch.device = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor, CrepaProjector]:
        """Hidden states that want a gradient, teacher features and a projector, from seed 0."""
        torch.manual_seed(0)
        students, teachers = (1, frames, num_tokens(self.student_grid)), (1, frames, num_tokens(self.teacher_grid))
        given: dict[str, Any] = {"device": device, "dtype": getattr(torch, self.dtype)}
        h = torch.randn(*students, self.hidden_size, **given).requires_grad_()
        y = torch.randn(*teachers, self.feature_size, **given)
        return h, y, CrepaProjector(self.hidden_size, self.feature_size).to(device)

    def loss(
        self, h: torch.Tensor, y: torch.Tensor, projector: nn.Module, backend: str, **options: Any
    ) -> torch.Tensor:
        """``crepa_loss`` of the shape."""
        return crepa_loss(
            h, y, projector, student_grid=self.student_grid, teacher_grid=self.teacher_grid,
            spatial_align=self.spatial_align, antialias=self.antialias, backend=backend, **options,
        ).loss  # fmt: skip


# The two calls for which a CPU target is stated, in both types that CPUs multiply.
TARGETS = [
    Shape("target", 1536, 5, grid, (16, 16) if grid == (30, 52) else grid, 384, "smaller", False, dtype, cpu_frames=5)
    for grid in ((30, 52), (16, 26))
    for dtype in ("float32", "bfloat16")
]

SAME_GRID = [
    Shape("wan-1.3b-480p", 1536, 21, (30, 52), (30, 52), 1536),
    Shape("wan-14b-480p", 5120, 21, (30, 52), (30, 52), 1536),
    Shape("wan-14b-720p", 5120, 21, (45, 80), (45, 80), 1536),
    Shape("wan2.2-5b-720p", 3072, 31, (22, 40), (22, 40), 1536),
    Shape("ltx-2b", 2048, 16, (16, 24), (16, 24), 1536, cpu_frames=4),
    Shape("ltx-13b", 4096, 16, (22, 38), (22, 38), 1536),
    Shape("sanavideo-2b-480p", 2240, 21, (30, 52), (30, 52), 1536),
    Shape("kandinsky5-lite", 1792, 16, (32, 48), (32, 48), 1536),
    Shape("kandinsky5-pro", 4096, 16, (32, 48), (32, 48), 1536),
    Shape("cogvideox-5b", 3072, 13, (30, 45), (30, 45), 1536),
    Shape("hunyuanvideo", 3072, 16, (30, 53), (30, 53), 1536),
]

RESAMPLED = [
    Shape("wan-14b-480p", 5120, 21, (30, 52), (37, 37), 1536, "teacher"),
    Shape("wan-14b-720p", 5120, 21, (45, 80), (16, 16), 384, "teacher"),
]

# The student's grid grows: SDXL's middle block at 512 x 512 beside DINOv2's giant and base at 518 x 518.
GROWING = [
    Shape("unet-sdxl", 1280, 1, (16, 16), (37, 37), 1536, "teacher", dtype=dtype) for dtype in ("float32", "bfloat16")
] + [Shape("unet-sdxl", 1280, 1, (16, 16), (37, 37), 768, "teacher")]

# What a GPU measures, the shapes with a target or a prediction first: time may not last for the rest.
_FIRST = ("wan-14b-480p", "wan-1.3b-480p", "ltx-2b")
ON_A_GPU = [
    replace(shape, dtype="bfloat16")
    for shape in (
        *(shape for name in _FIRST for shape in SAME_GRID if shape.name == name),
        *RESAMPLED,
        *(shape for shape in SAME_GRID if shape.name not in _FIRST),
    )
]
