"""What CREPA compares, for looking at: a clip's frames and patches, and the best score that needs no look at it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crepa_kernels import frame_indices, similarity_matrix
from crepa_kernels.grid import SpatialPlan, plan_alignment

if TYPE_CHECKING:
    from crepa_kernels import CrepaConfig
    from crepa_kernels.regularizer.aligning import Sides


class AlignedClip(NamedTuple):
    """The first clip of a micro-batch as the loss compares it.

    Attributes:
        matrix: s[f, k] of student frame f with teacher frame k, (T, T).
        constant: scalar, `crepa_similarity` of the best constant predictor on the micro-batch.
        student, teacher: (T, h, w, E) on the loss's common grid, the student projected.
    """

    matrix: Tensor
    constant: Tensor
    student: Tensor
    teacher: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, config: CrepaConfig, sides: Sides, masks: Mapping[str, Tensor | None]) -> AlignedClip:
        """sides, masks: as `CrepaRegularizer.sides` gives them."""
        constant = best_constants(sides, config, **masks).mean(0).norm()
        first = sides._replace(hidden_states=sides.hidden_states[:1], teacher_features=sides.teacher_features[:1])
        of_first = {name: None if mask is None else mask[:1] for name, mask in masks.items()}
        (matrix,) = first.given_to(similarity_matrix, **of_first, **config.loss_options())
        (student,), (teacher,) = on_common_grid(first, config)
        return cls(matrix, constant, student, teacher)


def best_constants(
    sides: Sides, config: CrepaConfig, frame_mask: Tensor | None = None, teacher_mask: Tensor | None = None
) -> Tensor:
    """Vectors g (M, E), one a patch position: their directions are the best constant predictors.

    A predictor that says the unit vector c[m] at position m has `crepa_similarity = mean_m <c[m], g[m]>`, with g[m]
    the mean over clips and frames of `z[f, m] / (1 + Σ w)`, `z[f] = ŷ[f] + Σ_k w(|k-f|) ŷ[k]`. So the best is
    `g[m] / ||g[m]||`, which scores the mean norm; the best that is the same everywhere scores the norm of the mean.
    """
    unit = F.normalize(_plan(sides, config).align(sides.teacher_features, "teacher").float(), dim=-1)  # (B, T, M, E)
    clips, frames = unit.shape[:2]
    weights = config.neighbours.weights(frames, teacher_mask, unit) + torch.eye(frames, device=unit.device)
    weights = weights / weights.sum(-1, keepdim=True)  # (B, f, k)
    counted = unit.new_ones(clips, frames) if frame_mask is None else frame_mask.to(unit.dtype)
    share = counted / counted.sum().clamp(min=1)
    return torch.einsum("bk,bkme->me", (weights * share[..., None]).sum(1), unit)


@torch.no_grad()
def on_common_grid(sides: Sides, config: CrepaConfig) -> tuple[Tensor, Tensor]:
    """Projected student and teacher on the grid that the loss compares them on, both (B, T, h, w, E), in fp32."""
    plan = _plan(sides, config)
    projector = sides.projector or nn.Identity()
    # By frames: the width of a large model's states in fp32 is not small.
    projected = [plan.align(projector(frame.float()), "student") for frame in sides.hidden_states.split(1, dim=1)]
    teacher = plan.align(sides.teacher_features, "teacher").float()
    return torch.cat(projected, 1).unflatten(2, plan.grid), teacher.unflatten(2, plan.grid)


def teacher_frames(config: CrepaConfig, pixel_frames: int, frames: int) -> list[int]:
    """The pixel frame of each of T student frames; of a group that is averaged, the last."""
    rule = config.crepa_frame_map
    return frame_indices("last" if rule == "mean" else rule, pixel_frames, frames)


def _plan(sides: Sides, config: CrepaConfig) -> SpatialPlan:
    return plan_alignment(config.spatial_align, sides.student_grid, sides.teacher_grid)
