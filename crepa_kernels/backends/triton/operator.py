"""The loss by Triton kernels: ``crepa_kernels::frame_alignment`` and its backward, and their call.

Triton is imported when one of them runs; the operators are there without it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ...grid import SpatialPlan, num_tokens
from ...inputs import LossInputs
from ...ops.namespace import add_op_namespace_prefix, ops
from ...ops.register import define, keeps_type
from ...output import CrepaOutput
from .call import SCHEMA, TENSORS, TYPES, Call, operator_arguments, resampled_type

define("frame_alignment", f"({SCHEMA}) -> ({', '.join(['Tensor'] * 10)})")
define(
    "frame_alignment_backward",
    f"(Tensor grad_loss, Tensor[] kept, bool[] needs, {SCHEMA}) -> ({', '.join(['Tensor'] * 5)})",
)
for _name in ("frame_alignment", "frame_alignment_backward"):
    keeps_type(_name)
frame_alignment_op = ops.frame_alignment.default
frame_alignment_backward_op = ops.frame_alignment_backward.default


def crepa_triton(inputs: LossInputs) -> CrepaOutput:
    """The loss of ``inputs``; differentiable once."""
    loss, metrics, frame_similarity, *_ = frame_alignment_op(*operator_arguments(inputs))
    similarity, self_similarity, alignment_score = metrics.unbind()
    return CrepaOutput(loss, similarity, self_similarity, alignment_score, frame_similarity)


def kept_bytes(
    plan: SpatialPlan,
    frames: int,
    hidden_size: int,
    feature_size: int,
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    device_type: str,
    recompute: bool = False,
    given: bool = False,
) -> int:
    """Bytes kept between forward and backward, beside the hidden states and what has a number a frame.

    What ``Kept`` has, where the split path is taken, and the teacher's rows on the common grid, whoever made them.
    Arguments as those of the ``torch`` backend's.
    """

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    kind = teacher_dtype if plan.teacher == "keep" else resampled_type(teacher_dtype, dtype)
    teacher = new(1, frames, plan.tokens, feature_size, dtype=kind if kind in TYPES else torch.float32)
    tokens = new(1, frames * num_tokens(plan.student_grid), hidden_size, dtype=dtype)
    shapes = (hidden_size,), (hidden_size,), (feature_size, hidden_size), (feature_size,)
    gamma, beta, weight, bias = (None if given else new(*shape) for shape in shapes)
    call = Call.of_shapes((tokens, teacher, gamma, beta, weight, bias), plan, frames, dtype, recompute)
    return sum(tensor.nbytes for tensor in (*_align_fake(*call.packed())[3:], teacher))


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Entering PyTorch's own takes as long as a launch; it is left out where autocast is off already."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


@torch.library.impl(add_op_namespace_prefix("frame_alignment"), "CompositeExplicitAutograd")
def _align(*arguments: Any) -> tuple[Tensor, ...]:
    """loss (), metrics (3,), frame_similarity (B, T), and seven tensors for the backward pass (``pipeline.Kept``)."""
    from .pipeline import forward

    call = Call.unpacked(arguments)
    with torch.cuda.device_of(call.tokens), _without_autocast(call.tokens.device.type):
        loss, metrics, frame_similarity, kept = forward(call)
    return (loss, metrics, frame_similarity, *kept)


@torch.library.register_fake(add_op_namespace_prefix("frame_alignment"))
def _align_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = Call.unpacked(arguments)
    width, features, dtype = call.hidden_size, call.feature_size, call.compute_dtype
    rows, weights = call.projected_rows if call.stored else 0, 0 if call.given else features

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return call.tokens.new_empty(shape, dtype=dtype)

    return (
        new(), new(3), new(call.batch, call.frames), new(rows, features, dtype=dtype),
        new(call.statistics_count, call.student_rows), new(weights), new(weights, width, dtype=dtype),
        new(weights), new(weights), new(rows if call.keeps_aligned else 0, width, dtype=dtype),
    )  # fmt: skip


@torch.library.impl(add_op_namespace_prefix("frame_alignment_backward"), "CompositeExplicitAutograd")
def _align_backward(grad_loss: Tensor, kept: list[Tensor], needs: list[bool], *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of tokens, gamma, beta, weight and bias; an empty tensor in place of one that is not needed."""
    from .pipeline import Kept, Needs, backward

    call = Call.unpacked(arguments)
    with torch.cuda.device_of(call.tokens), _without_autocast(call.tokens.device.type):
        grads = backward(call, Kept(*kept), grad_loss, Needs(*needs))
    return tuple(call.tokens.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake(add_op_namespace_prefix("frame_alignment_backward"))
def _align_backward_fake(
    grad_loss: Tensor, kept: list[Tensor], needs: list[bool], *arguments: Any
) -> tuple[Tensor, ...]:
    tokens, _, *weights = arguments[:6]
    return tuple(
        like.new_empty(like.shape) if need and like is not None else tokens.new_empty(0)
        for need, like in zip(needs, (tokens, *weights), strict=True)
    )


class _Alignment(torch.autograd.Function):
    """The loss of ``frame_alignment``'s ``output`` for ``inputs``, and its gradients; nothing else has any."""

    @staticmethod
    def forward(ctx: Any, output: tuple[Tensor, ...], *inputs: Any) -> Tensor:
        ctx.save_for_backward(*inputs[:TENSORS], *output[3:])
        ctx.options = inputs[TENSORS:]
        ctx.set_materialize_grads(False)
        return output[0]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        needs = [wanted[0], *wanted[2:6]]
        grads: list[Tensor | None] = [None] * 5
        if grad_loss is not None:
            made = frame_alignment_backward_op(grad_loss, list(saved[TENSORS:]), needs, *saved[:TENSORS], *ctx.options)
            grads = [grad if need else None for grad, need in zip(made, needs, strict=True)]
        return (None, grads[0], None, *grads[1:], *[None] * (len(wanted) - 6))


class _Gradients(torch.autograd.Function):
    """``frame_alignment_backward``, which has no derivative."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            made: tuple[Tensor, ...] = frame_alignment_backward_op(*arguments)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "crepa_kernels::frame_alignment can be differentiated once; backend 'reference' can be twice"
        )


# Not by ``torch.library.register_autograd``, which reads the schema's arguments one by one in every call: 0.05 ms.
def _align_with_gradients(*inputs: Any) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        output: tuple[Tensor, ...] = frame_alignment_op(*inputs)
    # Also where no graph is made: a function has no forward derivative, and says so instead of dropping one.
    return (_Alignment.apply(output, *inputs), *output[1:])


def _gradients_with_none(*arguments: Any) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled():
        made: tuple[Tensor, ...] = _Gradients.apply(*arguments)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            made = frame_alignment_backward_op(*arguments)
    return made


torch.library.impl(add_op_namespace_prefix("frame_alignment"), "Autograd")(_align_with_gradients)
torch.library.impl(add_op_namespace_prefix("frame_alignment_backward"), "Autograd")(_gradients_with_none)
