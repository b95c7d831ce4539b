"""Both ends of an alignment, which iREPA changes: the projector, and what losses take of student and teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from ..config.schema import CrepaConfig
from ..config.shared import TaughtSettings
from ..grid import Grid
from ..projector import ConvolutionProjector, CrepaProjector, Projector
from ..teachers import TeacherFeatures, spatially_normalized
from .attach import CREPA, Owner
from .capture import CapturedStates

Result = TypeVar("Result")


def projector_class(config: TaughtSettings) -> type[Projector]:
    """The kind of projector that settings train."""
    return ConvolutionProjector if config.irepa_enabled else CrepaProjector


def make_projector(config: TaughtSettings, hidden_size: int, feature_size: int) -> Projector:
    """A new one, from width D to width E."""
    if config.irepa_enabled:
        return ConvolutionProjector(hidden_size, feature_size, config.irepa_projector_kernel_size)
    return CrepaProjector(hidden_size, feature_size)


def compares_own_tokens(config: CrepaConfig) -> bool:
    """Whether a rank's tokens are compared where they lie: no neighbouring token of the grid has a part in it."""
    return config.spatial_align == "student" and not config.irepa_enabled


class Sides(NamedTuple):
    """Both sides, (B, T, P, D) and (B, T, N, E), as the losses and ``similarity_matrix`` take them.

    With iREPA the hidden states are projected already, there is no projector, and the teacher is normalized.
    """

    hidden_states: torch.Tensor
    teacher_features: torch.Tensor
    student_grid: Grid
    teacher_grid: Grid
    projector: CrepaProjector | None

    @classmethod
    def of(
        cls,
        config: TaughtSettings,
        projector: Projector,
        student: CapturedStates,
        teacher: TeacherFeatures,
        owner: Owner = CREPA,
    ) -> Sides:
        """ValueError where the teacher's features have another width than the projector makes."""
        (features, teacher_grid), grid, states = teacher, student.layout.grid, student.hidden_states
        width, made_for = features.shape[-1], projector.feature_size
        if width != made_for:
            raise ValueError(
                f"teacher features have width {width}, the projector was made for {made_for}: "
                f"pass {owner.regularizer}(feature_size={width})"
            )
        if config.irepa_enabled:
            features = spatially_normalized(features, config.irepa_spatial_norm_alpha)
        if isinstance(projector, ConvolutionProjector):
            return cls(projector.of_tokens(states, grid), features, grid, teacher_grid, None)
        assert isinstance(projector, CrepaProjector)  # for the type checker
        return cls(states, features, grid, teacher_grid, projector)

    def given_to(self, call: Callable[..., Result], **options: Any) -> Result:
        """What one of these calls gives for them."""
        return call(**self._asdict(), **options)
