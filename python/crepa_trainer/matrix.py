"""The similarity matrix of a training batch's first clip, for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from crepa_kernels import CrepaRegularizer, similarity_matrix
from crepa_kernels.teachers.source import ClipInputs


def batch_matrix(crepa: CrepaRegularizer, teacher: Mapping[str, Any]) -> Tensor:
    """s[f, k] (T, T) of the first clip of the transformer's last forward, between `crepa.loss` and `release`.

    teacher: the arguments that `crepa.loss` was given of the teacher's side.
    """
    student = crepa._student()
    features, _ = crepa._source.teach(
        ClipInputs(**teacher), student, lambda: crepa._capture.states(crepa._teacher_block_index)
    )
    assert crepa.projector is not None  # of the regularizer that has just given a loss
    return similarity_matrix(
        student.hidden_states[:1],
        features.features[:1],
        crepa.projector,
        student_grid=student.layout.grid,
        teacher_grid=features.grid,
        spatial_align=crepa.config.spatial_align,
    )[0]
