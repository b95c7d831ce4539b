"""The loss and the similarity matrix of captured states, with the options of a configuration."""

from __future__ import annotations

import torch

from ..config.schema import CrepaConfig
from ..loss import CrepaOutput, crepa_loss, similarity_matrix
from ..projector import CrepaProjector
from ..teachers import TeacherFeatures
from .capture import CapturedStates


def aligned(
    config: CrepaConfig,
    projector: CrepaProjector,
    student: CapturedStates,
    teacher: TeacherFeatures,
    frame_mask: torch.Tensor | None,
    teacher_mask: torch.Tensor | None,
) -> CrepaOutput:
    """``crepa_loss``; ValueError also where the teacher's features have another width than the projector makes."""
    width = teacher.features.shape[-1]
    if width != projector.feature_size:
        raise ValueError(
            f"teacher features have width {width}, the projector was made for {projector.feature_size}: "
            f"pass CrepaRegularizer(feature_size={width})"
        )
    return crepa_loss(
        student.hidden_states,
        teacher.features,
        projector,
        student_grid=student.layout.grid,
        teacher_grid=teacher.grid,
        frame_mask=frame_mask,
        teacher_mask=teacher_mask,
        **config.loss_options(),
    )


def matrix(
    config: CrepaConfig,
    projector: CrepaProjector,
    student: CapturedStates,
    teacher: TeacherFeatures,
    frame_mask: torch.Tensor | None,
    teacher_mask: torch.Tensor | None,
) -> torch.Tensor:
    """``similarity_matrix``, (B, T, T)."""
    return similarity_matrix(
        student.hidden_states,
        teacher.features,
        projector,
        student_grid=student.layout.grid,
        teacher_grid=teacher.grid,
        spatial_align=config.spatial_align,
        frame_mask=frame_mask,
        teacher_mask=teacher_mask,
    )
