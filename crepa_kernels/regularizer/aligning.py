"""What is computed of captured states and a teacher, with the options of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from ..config.schema import CrepaConfig
from ..loss import relational_loss
from ..projector import CrepaProjector
from ..teachers import TeacherFeatures
from .attach import CREPA, Owner
from .capture import CapturedStates

Result = TypeVar("Result")


def check_width(teacher: TeacherFeatures, made_for: int, owner: Owner) -> None:
    """ValueError where the teacher's features have another width than the projector makes."""
    width = teacher.features.shape[-1]
    if width != made_for:
        raise ValueError(
            f"teacher features have width {width}, the projector was made for {made_for}: "
            f"pass {owner.regularizer}(feature_size={width})"
        )


def aligned(
    call: Callable[..., Result],
    config: CrepaConfig,
    projector: CrepaProjector | None,
    student: CapturedStates,
    teacher: TeacherFeatures,
    frame_mask: torch.Tensor | None,
    teacher_mask: torch.Tensor | None,
) -> Result:
    """What ``call`` gives, ``crepa_loss``, ``relational_loss`` or ``similarity_matrix``, for what ``projected`` gives.

    Raises:
        ValueError: its own, and where the teacher's features have another width than the projector makes.
    """
    check_width(teacher, student.hidden_states.shape[-1] if projector is None else projector.feature_size, CREPA)
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
