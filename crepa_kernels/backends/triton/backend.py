"""The loss through the Triton kernels: the call of their operator."""

from __future__ import annotations

import torch

from ...inputs import LossInputs, frames_at
from ...output import CrepaOutput
from .operator import CHANGES, TYPES, Options, frame_alignment_op


def crepa_triton(inputs: LossInputs) -> CrepaOutput:
    """The loss of ``inputs``; differentiable once."""
    h, (gamma, beta, weight, bias, eps), plan = inputs.hidden_states, inputs.projector, inputs.plan
    teacher, frame_index = _teacher(inputs)
    tokens = h if inputs.token_range is not None else h.flatten(1, 2)
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    trained = [tensor for tensor in (h, gamma, beta, weight, bias) if tensor is not None]
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained)
    keep_aligned = keep and (weight.requires_grad or (gamma is not None and gamma.requires_grad))
    neighbours = inputs.neighbours
    options = Options(
        keep, keep_aligned, inputs.recompute, plan.antialias, neighbours.cumulative, neighbours.normalize_sum,
        inputs.normalize_by_frames, CHANGES.index(plan.student), TYPES.index(inputs.compute_dtype), inputs.frames,
        0 if inputs.token_range is None else inputs.token_range[0], neighbours.distance, *plan.student_grid,
        *plan.grid, eps, neighbours.tau,
    )  # fmt: skip
    loss, metrics, frame_similarity, *_ = frame_alignment_op(
        tokens, teacher, gamma, beta, weight, bias, frame_index, inputs.frame_mask, inputs.teacher_mask,
        *options.packed(),
    )  # fmt: skip
    similarity, self_similarity, alignment_score = metrics.unbind()
    return CrepaOutput(loss, similarity, self_similarity, alignment_score, frame_similarity)


def _teacher(inputs: LossInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Teacher features on the common grid (B, S, M, E), last axis contiguous, and the frame index still to apply."""
    teacher, index, plan = inputs.teacher_features, inputs.frame_index, inputs.plan
    if plan.teacher != "keep":
        with torch.no_grad():
            if index is not None:
                teacher, index = frames_at(teacher, index), None
            # A 16-bit teacher beside 16-bit products stays so; otherwise it is resampled into fp32.
            half = inputs.compute_dtype == torch.bfloat16
            kind = torch.promote_types(teacher.dtype, torch.bfloat16 if half else torch.float32)
            teacher = plan.align(teacher.to(kind), "teacher")
    if teacher.dtype not in TYPES:
        teacher = teacher.float()
    return (teacher if teacher.stride(-1) == 1 else teacher.contiguous()), index
