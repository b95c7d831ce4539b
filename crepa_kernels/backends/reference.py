"""The loss in plain PyTorch, step by step: the definition that every other backend is tested against."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from ..inputs import LossInputs, frames_at
from ..neighbours import Relation
from ..ops.rows import NORM_FLOOR
from ..output import CrepaOutput
from ..reduction import plan_reduction, reduce_frames, reduce_pairs
from ..transfer import sum_over


def project(inputs: LossInputs, hidden_states: torch.Tensor) -> torch.Tensor:
    """p = Linear(LayerNorm(h)): (..., D) -> (..., E), in the statistics type; the product in ``compute_dtype``.

    Without a projector h is p.
    """
    gamma, beta, weight, bias, eps = inputs.projector
    accum_dtype, compute_dtype = inputs.statistics_type, inputs.compute_dtype
    shape = hidden_states.shape
    tokens = hidden_states.to(accum_dtype)
    if weight is None:
        return tokens
    normalized = F.layer_norm(tokens, shape[-1:], _cast(gamma, accum_dtype), _cast(beta, accum_dtype), eps)
    # NaN where the variance overflows, of which LayerNorm makes zeros.
    variance = tokens.detach().var(dim=-1, correction=0, keepdim=True)
    normalized = normalized + (variance - variance)
    if compute_dtype == torch.float16:
        # The operands are rounded, but not their gradients: fp16 cannot hold that of a row below the norm's floor.
        rows, columns = _rounded(normalized, compute_dtype), _rounded(weight.to(accum_dtype), compute_dtype)
    else:
        rows, columns = normalized.to(compute_dtype), weight.to(compute_dtype)
    p = product(rows.flatten(0, -2), columns).to(accum_dtype).unflatten(0, shape[:-1])
    return p if bias is None else p + bias.to(accum_dtype)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b.mT`` of (..., m, k) and (..., n, k), with one set of leading axes; as are its derivatives, of any order.

    Those of PyTorch's own product are cast where autocast is on while they are taken.
    """
    # torch.compile refuses a function with a forward derivative.
    made: torch.Tensor = (_Product if torch.compiler.is_compiling() else _ForwardProduct).apply(a, b)
    return made


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        with torch.autocast(a.device.type, enabled=False):
            return a @ b.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        a, b = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad
        return product(grad, b.mT) if need_a else None, product(grad.mT, a.mT) if need_b else None


class _ForwardProduct(_Product):
    @staticmethod
    def jvp(ctx: Any, along_a: torch.Tensor, along_b: torch.Tensor) -> torch.Tensor:
        a, b = ctx.saved_tensors
        return product(along_a, b) + product(a, along_b)


def _rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor + (tensor.to(dtype).to(tensor.dtype) - tensor).detach()


def _cast(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def unit_rows(features: torch.Tensor) -> torch.Tensor:
    """Each row divided by max(its L2 norm, 1e-12); NaN where the norm overflows, which would give zeros."""
    norm = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    return features / norm.clamp_min(NORM_FLOOR).where(norm < math.inf, math.nan)


def teacher_rows(inputs: LossInputs, aligned: bool = True) -> torch.Tensor:
    """y on the common grid, unit rows: (B, T, M, E), or all S teacher frames if not ``aligned`` to the student's.

    Frames that do not exist are zero, and so are those that no token of ``token_range`` is compared with.
    """
    features = inputs.teacher_features.to(inputs.statistics_type)
    if aligned and inputs.frame_index is not None:
        features = frames_at(features, inputs.frame_index)
    if aligned and inputs.token_range is not None:
        taught = inputs.taught_frames
        features = F.pad(
            features[:, taught.start : taught.stop], (0, 0, 0, 0, taught.start, inputs.frames - taught.stop)
        )
    if inputs.teacher_mask is not None and (aligned or inputs.frame_index is None):
        features = features.where(inputs.teacher_mask[..., None, None], 0)
    return unit_rows(inputs.plan.align(features, "teacher"))


def student_rows(inputs: LossInputs) -> torch.Tensor:
    """p on the common grid, unit rows: (B, T, M, E). Frames outside the loss are projected from zeros.

    Tokens outside ``token_range`` have rows of zeros, which are similar to nothing.
    """
    hidden_states, mask, token_range = inputs.hidden_states, inputs.frame_mask, inputs.token_range
    if token_range is None:
        if mask is not None:
            hidden_states = hidden_states.where(mask[..., None, None], 0)
        return unit_rows(inputs.plan.align(project(inputs, hidden_states), "student"))
    start, stop = token_range
    if mask is not None:
        hidden_states = hidden_states.where(mask.repeat_interleave(inputs.plan.tokens, 1)[:, start:stop, None], 0)
    rows = unit_rows(project(inputs, hidden_states))
    rows = F.pad(rows, (0, 0, start, inputs.frames * inputs.plan.tokens - stop))
    return rows.unflatten(1, (inputs.frames, inputs.plan.tokens))


def pair_similarity(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """s[b,f,k] = mean over tokens of <p[b,f], y[b,k]>: (B, T, M, E) and (B, S, M, E) -> (B, T, S)."""
    return product(student.transpose(1, 2), teacher.transpose(1, 2)).mean(dim=1)


def crepa_reference(inputs: LossInputs) -> CrepaOutput:
    """Rows, similarities, neighbours, reduction, one after the other; differentiable twice."""
    with torch.autocast(inputs.hidden_states.device.type, enabled=False):
        similarity = pair_similarity(student_rows(inputs), teacher_rows(inputs))
        weights = inputs.neighbours.weights(similarity.shape[1], inputs.teacher_mask, like=similarity)
        own = similarity.diagonal(dim1=1, dim2=2)
        total = own + (weights * similarity).sum(dim=-1)
        return reduce_frames(own, total, plan_reduction(inputs, weights))


def reference_matrix(inputs: LossInputs) -> torch.Tensor:
    """s for every student frame and every teacher frame, (B, T, S); rows of frames outside the loss are 0."""
    with torch.autocast(inputs.hidden_states.device.type, enabled=False):
        similarity = pair_similarity(student_rows(inputs), teacher_rows(inputs, aligned=False))
        mask = inputs.frame_mask
        return similarity if mask is None else similarity.where(mask[..., None], 0)


def relational_reference(inputs: LossInputs, relation: Relation) -> torch.Tensor:
    """The relational loss by every pair of tokens of a clip, (B, T M, T M) numbers; differentiable twice."""
    with torch.autocast(inputs.hidden_states.device.type, enabled=False):
        student, teacher, mask = student_rows(inputs), teacher_rows(inputs), inputs.frame_mask
        if mask is not None:
            student, teacher = (rows.where(mask[..., None, None], 0) for rows in (student, teacher))
        p, y = student.flatten(1, 2), teacher.flatten(1, 2)
        if inputs.token_range is None or inputs.context_group is None:
            # torch.compile wants two tensors.
            others = p.clone(), y.clone()
        else:
            token = torch.arange(y.shape[1], device=y.device)
            own = (token >= inputs.token_range[0]) & (token < inputs.token_range[1])
            y = y.where(own[:, None], 0)
            # This rank's tokens against all: its share of the pairs.
            others = sum_over(inputs.context_group, p), sum_over(inputs.context_group, y)
        difference = product(p, others[0]) - product(y, others[1])
        cost = difference.square() if relation.margin is None else F.relu(difference.abs() - relation.margin)
        frames = (inputs.frames, inputs.plan.tokens)
        mean = cost.unflatten(2, frames).unflatten(1, frames).mean(dim=(2, 4))  # (B, T, T)
        weights = relation.weights(inputs.frames, like=mean)
        sums = (weights * mean.where(weights > 0, 0)).sum(dim=(1, 2))
        return reduce_pairs(sums, mask, weights)
