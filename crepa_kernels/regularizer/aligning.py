"""What is computed of captured states and a teacher, with the options of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from ..config.schema import CrepaConfig
from ..loss import relational_loss
from ..projector import CrepaProjector
from ..teachers import TeacherFeatures
from .capture import CapturedStates

Result = TypeVar("Result")


def aligned(
    call: Callable[..., Result],
    config: CrepaConfig,
    projector: CrepaProjector,
    student: CapturedStates,
    teacher: TeacherFeatures,
    frame_mask: torch.Tensor | None,
    teacher_mask: torch.Tensor | None,
) -> Result:
    """What ``call`` gives, ``crepa_loss``, ``relational_loss`` or ``similarity_matrix``.

    Raises:
        ValueError: its own, and where the teacher's features have another width than the projector makes.
    """
    width = teacher.features.shape[-1]
    if width != projector.feature_size:
        raise ValueError(
            f"teacher features have width {width}, the projector was made for {projector.feature_size}: "
            f"pass CrepaRegularizer(feature_size={width})"
        )
    options = config.relational_options() if call is relational_loss else config.loss_options()
    return call(
        student.hidden_states,
        teacher.features,
        projector,
        student_grid=student.layout.grid,
        teacher_grid=teacher.grid,
        frame_mask=frame_mask,
        teacher_mask=teacher_mask,
        **options,
    )
