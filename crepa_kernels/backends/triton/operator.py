"""The loss by Triton kernels: ``crepa_kernels::frame_alignment`` and its backward, and their call.

Triton is imported when one of them runs; the operators are there without it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...inputs import LossInputs, ProjectorWeights, frames_at
from ...neighbours import Neighbours
from ...ops.register import define, keeps_type
from ...output import CrepaOutput

if TYPE_CHECKING:
    from .pipeline import Call

CHANGES = ("keep", "resample", "pool")
TYPES = (torch.float32, torch.float16, torch.bfloat16)


class Options(NamedTuple):
    """What the operators take beside tensors, in this order: the flags, the sizes, and two numbers.

    Flags and sizes are a list each: torch.library goes through a schema once for every argument it has, in each call.

    Attributes:
        keep: some gradient is wanted.
        keep_aligned: gamma's or the weight's is, so that aligned rows may be kept.
        recompute: nothing of size tokens x E is kept.
        antialias: of the resampling.
        cumulative, normalize_sum, distance, tau: ``Neighbours``.
        by_frames: divide by the clip's frames in the loss.
        change: index in ``CHANGES``, what happens to the student's grid.
        compute: index in ``TYPES``, the type that products are asked for in.
        frames, start: T, and the clip's token that its first row is.
        student_height, student_width, height, width: the student's grid and the common one.
        eps: LayerNorm's.
    """

    keep: bool
    keep_aligned: bool
    recompute: bool
    antialias: bool
    cumulative: bool
    normalize_sum: bool
    by_frames: bool
    change: int
    compute: int
    frames: int
    start: int
    distance: int
    student_height: int
    student_width: int
    height: int
    width: int
    eps: float
    tau: float

    def packed(self) -> tuple[list[bool], list[int], float, float]:
        return [*self[:7]], [*self[7:16]], self.eps, self.tau


class Inputs(NamedTuple):
    """The operators' tensors: (B, L, D), (B, S, M, E), the projector's weights, and (B, T) index and masks."""

    tokens: Tensor
    teacher: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    weight: Tensor
    bias: Tensor | None
    frame_index: Tensor | None
    frame_mask: Tensor | None
    teacher_mask: Tensor | None


_INPUTS = ", ".join(f"Tensor{'' if name in ('tokens', 'teacher', 'weight') else '?'} {name}" for name in Inputs._fields)
_SCHEMA = f"{_INPUTS}, bool[] flags, SymInt[] sizes, float eps, float tau"
define("frame_alignment", f"({_SCHEMA}) -> ({', '.join(['Tensor'] * 10)})")
define(
    "frame_alignment_backward",
    f"(Tensor grad_loss, Tensor[] kept, bool[] needs, {_SCHEMA}) -> ({', '.join(['Tensor'] * 5)})",
)
for _name in ("frame_alignment", "frame_alignment_backward"):
    keeps_type(_name)
frame_alignment_op = torch.ops.crepa_kernels.frame_alignment.default
frame_alignment_backward_op = torch.ops.crepa_kernels.frame_alignment_backward.default


def crepa_triton(inputs: LossInputs) -> CrepaOutput:
    """The loss of ``inputs``; differentiable once."""
    loss, metrics, frame_similarity, *_ = frame_alignment_op(*operator_arguments(inputs))
    similarity, self_similarity, alignment_score = metrics.unbind()
    return CrepaOutput(loss, similarity, self_similarity, alignment_score, frame_similarity)


def operator_arguments(inputs: LossInputs) -> tuple[Any, ...]:
    """What ``frame_alignment`` takes, of a call."""
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
    return (
        tokens, teacher, gamma, beta, weight, bias, frame_index, inputs.frame_mask, inputs.teacher_mask,
        *options.packed(),
    )  # fmt: skip


def _teacher(inputs: LossInputs) -> tuple[Tensor, Tensor | None]:
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


def _call(arguments: tuple[Any, ...]) -> tuple[Call, Options]:
    """The call that the operators' arguments from ``tokens`` on describe."""
    from .frames import Clip
    from .pipeline import Call
    from .student import Spatial

    *tensors, flags, sizes, eps, tau = arguments
    tokens, teacher, gamma, beta, weight, bias, frame_index, frame_mask, teacher_mask = tensors
    # Kernels read them one element after the other.
    gamma, beta, bias = (None if tensor is None else tensor.contiguous() for tensor in (gamma, beta, bias))
    options = Options._make([*flags, *sizes, eps, tau])
    change, grid = CHANGES[options.change], (options.height, options.width)
    per_frame = grid[0] * grid[1]
    rows = tokens.shape[1] if change == "keep" else options.frames * per_frame
    # Under torch.compile with dynamic shapes an option may be a symbol, which int() makes a number.
    neighbours = Neighbours(int(options.distance), float(tau), options.cumulative, options.normalize_sum)
    clip = Clip(
        tokens.shape[0], options.frames, per_frame, rows, options.start, teacher.shape[1], neighbours,
        options.by_frames,
    )  # fmt: skip
    spatial = Spatial(change, (options.student_height, options.student_width), grid, options.antialias)
    call = Call(
        tokens, teacher, ProjectorWeights(gamma, beta, weight, bias, eps), frame_index, frame_mask,
        teacher_mask, spatial, clip, TYPES[options.compute],
    )  # fmt: skip
    return call, options


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Entering PyTorch's own takes as long as a launch; it is left out where autocast is off already."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


@torch.library.impl("crepa_kernels::frame_alignment", "CompositeExplicitAutograd")
def _align(*arguments: Any) -> tuple[Tensor, ...]:
    """loss (), metrics (3,), frame_similarity (B, T), and seven tensors for the backward pass (``pipeline.Kept``)."""
    from .pipeline import forward

    call, options = _call(arguments)
    with torch.cuda.device_of(call.tokens), _without_autocast(call.tokens.device.type):
        loss, metrics, frame_similarity, kept = forward(call, options.keep, options.keep_aligned, options.recompute)
    return (loss, metrics, frame_similarity, *kept)


@torch.library.register_fake("crepa_kernels::frame_alignment")
def _align_fake(*arguments: Any) -> tuple[Tensor, ...]:
    from .pipeline import call_choice, folds, statistics_count, stores_rows

    call, options = _call(arguments)
    keep = options.keep
    raw, compute_dtype = folds(call, keep)
    batch, length, width = call.tokens.shape
    features = call.teacher.shape[3]
    stored = stores_rows(call_choice(call, keep), keep, options.recompute)
    rows = call.clip.all_rows if stored else 0

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return call.tokens.new_empty(shape, dtype=dtype)

    return (
        new(), new(3), new(batch, call.clip.frames), new(rows, features, dtype=compute_dtype),
        new(statistics_count(raw, stored), batch * length),
        new(features), new(features, width, dtype=compute_dtype), new(features), new(features),
        new(rows if options.keep_aligned and call.spatial.keeps_aligned else 0, width, dtype=compute_dtype),
    )  # fmt: skip


@torch.library.impl("crepa_kernels::frame_alignment_backward", "CompositeExplicitAutograd")
def _align_backward(grad_loss: Tensor, kept: list[Tensor], needs: list[bool], *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of tokens, gamma, beta, weight and bias; an empty tensor in place of one that is not needed."""
    from .pipeline import Kept, Needs, backward

    call, _ = _call(arguments)
    with torch.cuda.device_of(call.tokens), _without_autocast(call.tokens.device.type):
        grads = backward(call, Kept(*kept), grad_loss, Needs(*needs))
    return tuple(call.tokens.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("crepa_kernels::frame_alignment_backward")
def _align_backward_fake(
    grad_loss: Tensor, kept: list[Tensor], needs: list[bool], *arguments: Any
) -> tuple[Tensor, ...]:
    tokens, _, *weights = arguments[:6]
    return tuple(
        like.new_empty(like.shape) if need and like is not None else tokens.new_empty(0)
        for need, like in zip(needs, (tokens, *weights), strict=True)
    )


class _Alignment(torch.autograd.Function):
    """``frame_alignment`` and its gradients.

    Not by ``torch.library.register_autograd``, which reads the schema's arguments one by one in every call: 0.05 ms.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            output: tuple[Tensor, ...] = frame_alignment_op(*inputs)
        ctx.save_for_backward(*inputs[:9], *output[3:])
        ctx.options = inputs[9:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        needs = [wanted[0], *wanted[2:6]]
        grads: list[Tensor | None] = [None] * 5
        if grad_loss is not None:
            made = frame_alignment_backward_op(grad_loss, list(saved[9:]), needs, *saved[:9], *ctx.options)
            grads = [grad if need else None for grad, need in zip(made, needs, strict=True)]
        return (grads[0], None, *grads[1:], *[None] * (len(wanted) - 6))


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("crepa_kernels::frame_alignment can be differentiated once; backend 'reference' can be twice")


torch.library.impl("crepa_kernels::frame_alignment", "Autograd")(_Alignment.apply)
torch.library.register_autograd("crepa_kernels::frame_alignment_backward", _no_second_derivative)
