"""What is computed of captured states and a teacher, with the options of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from ..config.schema import CrepaConfig
from ..projector import ConvolutionProjector, CrepaProjector, Projector
from ..teachers import TeacherFeatures, spatially_normalized
from .capture import CapturedStates

Result = TypeVar("Result")


def projector_class(config: CrepaConfig) -> type[Projector]:
    """The kind of projector that a configuration trains."""
    return ConvolutionProjector if config.irepa_enabled else CrepaProjector


def make_projector(config: CrepaConfig, hidden_size: int, feature_size: int) -> Projector:
    """A new one, from width D to width E."""
    if config.irepa_enabled:
        return ConvolutionProjector(hidden_size, feature_size, config.irepa_projector_kernel_size)
    return CrepaProjector(hidden_size, feature_size)


def projected(projector: Projector, student: CapturedStates) -> tuple[CapturedStates, CrepaProjector | None]:
    """What a loss is given: the states and the projector, or with a convolution p (B, T, P, E), made here, and None."""
    if isinstance(projector, ConvolutionProjector):
        return student._replace(hidden_states=projector.of_tokens(student.hidden_states, student.layout.grid)), None
    assert isinstance(projector, CrepaProjector)  # for the type checker
    return student, projector


def as_aligned(config: CrepaConfig, teacher: TeacherFeatures) -> TeacherFeatures:
    """The teacher's features as they are aligned with: raw, or with iREPA normalized over the patches of each frame."""
    if not config.irepa_enabled:
        return teacher
    return teacher._replace(features=spatially_normalized(teacher.features, config.irepa_spatial_norm_alpha))


def aligned(
    call: Callable[..., Result],
    config: CrepaConfig,
    projector: CrepaProjector | None,
    student: CapturedStates,
    teacher: TeacherFeatures,
    frame_mask: torch.Tensor | None,
    teacher_mask: torch.Tensor | None,
) -> Result:
    """What ``call`` gives, ``crepa_loss`` or ``similarity_matrix``, for what ``projected`` gives.

    Raises:
        ValueError: its own, and where the teacher's features have another width than the projector makes.
    """
    width = teacher.features.shape[-1]
    made_for = student.hidden_states.shape[-1] if projector is None else projector.feature_size
    if width != made_for:
        raise ValueError(
            f"teacher features have width {width}, the projector was made for {made_for}: "
            f"pass CrepaRegularizer(feature_size={width})"
        )
    return call(
        student.hidden_states,
        teacher.features,
        projector,
        student_grid=student.layout.grid,
        teacher_grid=teacher.grid,
        frame_mask=frame_mask,
        teacher_mask=teacher_mask,
        **config.loss_options(),
    )
