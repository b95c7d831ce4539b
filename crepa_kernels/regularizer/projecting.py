"""Both ends of an alignment, which iREPA changes: the projector, and the teacher's features."""

from __future__ import annotations

from ..config.shared import TaughtSettings
from ..projector import ConvolutionProjector, CrepaProjector, Projector
from ..teachers import TeacherFeatures, spatially_normalized
from .capture import CapturedStates


def projector_class(config: TaughtSettings) -> type[Projector]:
    """The kind of projector that settings train."""
    return ConvolutionProjector if config.irepa_enabled else CrepaProjector


def make_projector(config: TaughtSettings, hidden_size: int, feature_size: int) -> Projector:
    """A new one, from width D to width E."""
    if config.irepa_enabled:
        return ConvolutionProjector(hidden_size, feature_size, config.irepa_projector_kernel_size)
    return CrepaProjector(hidden_size, feature_size)


def projected(projector: Projector, student: CapturedStates) -> tuple[CapturedStates, CrepaProjector | None]:
    """What losses are given: states and projector, or with a convolution p (B, T, P, E), made here, and None."""
    if isinstance(projector, ConvolutionProjector):
        return student._replace(hidden_states=projector.of_tokens(student.hidden_states, student.layout.grid)), None
    assert isinstance(projector, CrepaProjector)  # for the type checker
    return student, projector


def as_aligned(config: TaughtSettings, teacher: TeacherFeatures) -> TeacherFeatures:
    """The teacher's features as they are aligned with: raw, or with iREPA normalized over the patches of each frame."""
    if config.irepa_enabled:
        return teacher._replace(features=spatially_normalized(teacher.features, config.irepa_spatial_norm_alpha))
    return teacher
