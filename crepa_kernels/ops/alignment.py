"""``crepa_kernels::frame_alignment`` and its backward: the loss by Triton kernels, as operators.

Triton is imported when one of them runs; the operators are there without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..neighbours import Neighbours
from ..problem import ProjectorWeights

if TYPE_CHECKING:
    from ..triton.pipeline import Call


def _call(
    tokens: Tensor,
    teacher: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    frame_index: Tensor | None,
    frame_mask: Tensor | None,
    teacher_mask: Tensor | None,
    change: str,
    student_grid: Sequence[int],
    grid: Sequence[int],
    antialias: bool,
    frames: int,
    start: int,
    eps: float,
    distance: int,
    tau: float,
    cumulative: bool,
    normalize_sum: bool,
    by_frames: bool,
) -> Call:
    from ..triton.frames import Clip
    from ..triton.pipeline import Call
    from ..triton.student import Spatial

    per_frame = grid[0] * grid[1]
    rows = tokens.shape[1] if change == "keep" else frames * per_frame
    # Under torch.compile with dynamic shapes an option may be a symbol, which these make a number.
    neighbours = Neighbours(int(distance), float(tau), cumulative, normalize_sum)
    clip = Clip(tokens.shape[0], frames, per_frame, rows, start, teacher.shape[1], neighbours, by_frames)
    return Call(
        tokens, teacher, ProjectorWeights(gamma, beta, weight, bias, eps), frame_index, frame_mask, teacher_mask,
        Spatial(change, tuple(student_grid), tuple(grid), antialias), clip,
    )  # fmt: skip


@torch.library.custom_op("crepa_kernels::frame_alignment", mutates_args=())
def frame_alignment(
    tokens: Tensor,
    teacher: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    frame_index: Tensor | None,
    frame_mask: Tensor | None,
    teacher_mask: Tensor | None,
    keep: bool,
    keep_aligned: bool,
    recompute: bool,
    change: str,
    student_grid: Sequence[int],
    grid: Sequence[int],
    antialias: bool,
    frames: int,
    start: int,
    eps: float,
    distance: int,
    tau: float,
    cumulative: bool,
    normalize_sum: bool,
    by_frames: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (), metrics (3,), frame_similarity (B, T), and seven tensors for the backward pass (``pipeline.Kept``).

    ``keep``: some gradient is wanted; ``keep_aligned``: gamma's or the weight's is, so that aligned rows may be kept.
    """
    from ..triton.pipeline import forward

    call = _call(
        tokens, teacher, gamma, beta, weight, bias, frame_index, frame_mask, teacher_mask, change, student_grid, grid,
        antialias, frames, start, eps, distance, tau, cumulative, normalize_sum, by_frames,
    )  # fmt: skip
    with torch.cuda.device_of(tokens), torch.autocast(tokens.device.type, enabled=False):
        loss, metrics, frame_similarity, kept = forward(call, keep, keep_aligned, recompute)
    return (loss, metrics, frame_similarity, *kept)


@frame_alignment.register_fake
def _(tokens: Tensor, teacher: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    from ..triton.pipeline import call_choice, stores_rows
    from ..triton.student import folds

    keep, keep_aligned, recompute = arguments[7:10]
    call = _call(tokens, teacher, *arguments[:7], *arguments[10:])
    _, narrow = folds(tokens, call.spatial, keep)
    batch, length, width = tokens.shape
    features = teacher.shape[3]
    rows = call.clip.all_rows if stores_rows(call_choice(call, keep), keep, recompute) else 0

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return tokens.new_empty(shape, dtype=dtype)

    return (
        new(), new(3), new(batch, call.clip.frames), new(rows, features, dtype=narrow), new(3, batch * length),
        new(features), new(features, width, dtype=narrow), new(features), new(features),
        new(rows if keep_aligned and call.spatial.keeps_aligned else 0, width, dtype=narrow),
    )  # fmt: skip


@torch.library.custom_op("crepa_kernels::frame_alignment_backward", mutates_args=())
def frame_alignment_backward(
    grad_loss: Tensor,
    kept: Sequence[Tensor],
    needs: Sequence[bool],
    tokens: Tensor,
    teacher: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    frame_index: Tensor | None,
    frame_mask: Tensor | None,
    teacher_mask: Tensor | None,
    change: str,
    student_grid: Sequence[int],
    grid: Sequence[int],
    antialias: bool,
    frames: int,
    start: int,
    eps: float,
    distance: int,
    tau: float,
    cumulative: bool,
    normalize_sum: bool,
    by_frames: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of tokens, gamma, beta, weight and bias; an empty tensor in place of one that is not needed."""
    from ..triton.pipeline import Kept, Needs, backward

    call = _call(
        tokens, teacher, gamma, beta, weight, bias, frame_index, frame_mask, teacher_mask, change, student_grid, grid,
        antialias, frames, start, eps, distance, tau, cumulative, normalize_sum, by_frames,
    )  # fmt: skip
    with torch.cuda.device_of(tokens), torch.autocast(tokens.device.type, enabled=False):
        grads = backward(call, Kept(*kept), grad_loss, Needs(*needs))
    dh, d_gamma, d_beta, d_weight, d_bias = (tokens.new_empty(0) if grad is None else grad for grad in grads)
    return dh, d_gamma, d_beta, d_weight, d_bias


@frame_alignment_backward.register_fake
def _(
    grad_loss: Tensor, kept: Sequence[Tensor], needs: Sequence[bool], tokens: Tensor, teacher: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    likes = (tokens, *arguments[:4])
    return tuple(
        like.new_empty(like.shape) if need and like is not None else tokens.new_empty(0)
        for need, like in zip(needs, likes, strict=True)
    )


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, options = inputs[:9], inputs[12:]
    ctx.save_for_backward(*tensors, *output[3:])
    ctx.options = options
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    tensors, kept = saved[:9], saved[9:]
    wanted = ctx.needs_input_grad
    needs = [wanted[0], *wanted[2:6]]
    grads: list[Tensor | None] = [None] * 5
    if grad_loss is not None:
        made = frame_alignment_backward(grad_loss, list(kept), needs, *tensors, *ctx.options)
        grads = [grad if need else None for grad, need in zip(made, needs, strict=True)]
    return (grads[0], None, *grads[1:], *[None] * (len(ctx.needs_input_grad) - 6))


frame_alignment.register_autograd(_backward, setup_context=_keep_inputs)
