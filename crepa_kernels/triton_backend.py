"""The loss through the Triton kernels: where they can run, and the call of their operator."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

from .compiling import constant_when_compiled
from .ops.alignment import CHANGES, TYPES, Options, frame_alignment_op
from .problem import CrepaOutput, Problem

_INTERPRETER = "TRITON_INTERPRET"


@cache
def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install crepa-kernels[triton]"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return f"no CUDA or ROCm GPU was found, and {_INTERPRETER}=1 is not set"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return f"compute capability {torch.cuda.get_device_capability()} is below (8, 0)"
    return None


@constant_when_compiled
def why_no_triton() -> str | None:
    """Why the ``triton`` backend cannot run on this machine; None if it can."""
    return _why_no_triton()


@constant_when_compiled
def why_not_triton_for(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the ``triton`` backend cannot take hidden states of ``dtype`` on ``device_type``; None if it can."""
    if (reason := _why_no_triton()) is not None:
        return reason
    if dtype not in TYPES:
        return f"its kernels take {', '.join(map(str, TYPES))}, not {dtype}"
    if device_type == "cuda" or (device_type == "cpu" and interpreting()):
        return None
    return f"the hidden states are on {device_type}"


def interpreting() -> bool:
    """Whether Triton is asked to run its kernels in Python on a CPU."""
    return os.environ.get(_INTERPRETER, "0").lower() in ("1", "true", "on", "y", "yes")


def crepa_triton(problem: Problem) -> CrepaOutput:
    """The loss of ``problem``; differentiable once."""
    h, (gamma, beta, weight, bias, eps), plan = problem.hidden_states, problem.projector, problem.plan
    teacher, frame_index = _teacher(problem)
    tokens = h if problem.token_range is not None else h.flatten(1, 2)
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    trained = [tensor for tensor in (h, gamma, beta, weight, bias) if tensor is not None]
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained)
    keep_aligned = keep and (weight.requires_grad or (gamma is not None and gamma.requires_grad))
    neighbours = problem.neighbours
    options = Options(
        keep, keep_aligned, problem.recompute, plan.antialias, neighbours.cumulative, neighbours.normalize_sum,
        problem.normalize_by_frames, CHANGES.index(plan.student), TYPES.index(problem.compute_dtype), problem.frames,
        0 if problem.token_range is None else problem.token_range[0], neighbours.distance, *plan.student_grid,
        *plan.grid, eps, neighbours.tau,
    )  # fmt: skip
    loss, metrics, frame_similarity, *_ = frame_alignment_op(
        tokens, teacher, gamma, beta, weight, bias, frame_index, problem.frame_mask, problem.teacher_mask,
        *options.packed(),
    )  # fmt: skip
    similarity, self_similarity, alignment_score = metrics.unbind()
    return CrepaOutput(loss, similarity, self_similarity, alignment_score, frame_similarity)


def _teacher(problem: Problem) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Teacher features on the common grid (B, S, M, E), last axis contiguous, and the frame index still to apply."""
    teacher, index, plan = problem.teacher_features, problem.frame_index, problem.plan
    if plan.teacher != "keep":
        with torch.no_grad():
            if index is not None:
                clip = torch.arange(problem.batch, device=index.device)[:, None]
                teacher, index = teacher[clip, index], None
            # A 16-bit teacher beside 16-bit products stays so; otherwise it is resampled into fp32.
            half = problem.compute_dtype == torch.bfloat16
            kind = torch.promote_types(teacher.dtype, torch.bfloat16 if half else torch.float32)
            teacher = plan.align(teacher.to(kind), "teacher")
    if teacher.dtype not in TYPES:
        teacher = teacher.float()
    return (teacher if teacher.stride(-1) == 1 else teacher.contiguous()), index
