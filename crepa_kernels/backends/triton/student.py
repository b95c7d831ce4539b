"""The student's side of a chunk: raw tokens, or normalised ones on the common grid, and the way back."""

from __future__ import annotations

import torch

from ...ops.layer_norm_resample import layer_norm_resample_backward_out_op, layer_norm_resample_op
from ...ops.resample import resample_tokens_adjoint_op, resample_tokens_op
from .call import KEEP, POOL, RESAMPLE, Call
from .chunks import RowChunk
from .launch import Cost, operator
from .statistics import layer_norm_backward, token_statistics


def student_span(call: Call, chunk: RowChunk) -> slice:
    """The chunk's rows among all B x L rows of the hidden states."""
    if call.change == KEEP:
        return chunk.span
    tokens = call.student_per_frame
    first = (chunk.first_clip * call.frames + chunk.first_frame) * tokens
    return slice(first, first + chunk.clips * (chunk.last_frame - chunk.first_frame) * tokens)


def student_rows(call: Call, chunk: RowChunk, span: slice) -> torch.Tensor:
    """The chunk's hidden states (rows, D), a view."""
    tokens = call.tokens
    if call.joined:
        return within(tokens.reshape(-1, tokens.shape[2]), span)
    first = chunk.first_clip * tokens.shape[1]
    return tokens[chunk.first_clip][span.start - first : span.stop - first]


def student_operand(
    call: Call, chunk: RowChunk, mean: torch.Tensor, inverse_std: torch.Tensor, *, measured: bool = False
) -> torch.Tensor:
    """What the projection multiplies, (rows, D): the raw tokens, or normalised ones on the grid that is projected.

    Writes ``mean`` and ``inverse_std`` (rows of the call,) of the chunk's tokens, unless ``measured``.
    """
    span = student_span(call, chunk)
    tokens = student_rows(call, chunk, span)
    if call.fused:
        framed = _framed(call, tokens)
        cost = Cost((tokens,), (_bytes(framed, call.per_frame), 2 * 4 * tokens.shape[0]))
        rows, *of_tokens = operator(
            "layer_norm_resample", cost,
            lambda: layer_norm_resample_op(framed, *call.geometry, call.eps, _in_loss(call, chunk)),
        )  # fmt: skip
        if not measured:
            mean[span], inverse_std[span] = (each.view(-1) for each in of_tokens)
        return rows.view(-1, tokens.shape[1]).to(call.compute_dtype)
    if call.raw and measured:
        return tokens
    normalized = None if call.raw else tokens.new_empty(tokens.shape, dtype=call.compute_dtype)
    token_statistics(call, tokens, span.start, within(mean, span), within(inverse_std, span), normalized)
    return tokens if normalized is None else _aligned(call, normalized)


def aligned_p(call: Call, p: torch.Tensor) -> torch.Tensor:
    """p (rows, E) of the student's own tokens on the common grid."""
    if not call.resamples_p:
        return p
    framed = _framed(call, p.to(call.compute_dtype))
    if call.change == POOL:
        return framed.mean(dim=1)
    return _resampled(call, framed)


def aligned_p_gradient(call: Call, grad: torch.Tensor) -> torch.Tensor:
    """That of ``aligned_p``, (rows, E) of the common grid to those of the student's own tokens."""
    if not call.resamples_p:
        return grad
    if call.change == POOL:
        return (grad / call.student_per_frame).repeat_interleave(call.student_per_frame, dim=0)
    return _resampled_gradient(call, grad)


def _resampled(call: Call, framed: torch.Tensor) -> torch.Tensor:
    cost = Cost((framed,), (_bytes(framed, call.per_frame),))
    return operator("resample", cost, lambda: resample_tokens_op(framed, *call.geometry)).view(-1, framed.shape[2])


def _resampled_gradient(call: Call, grad: torch.Tensor) -> torch.Tensor:
    framed = grad.view(-1, call.per_frame, grad.shape[1])
    cost = Cost((framed,), (_bytes(framed, call.student_per_frame),))
    adjoint = operator("resample", cost, lambda: resample_tokens_adjoint_op(framed, *call.geometry))
    return adjoint.view(-1, grad.shape[1])


def _framed(call: Call, rows: torch.Tensor) -> torch.Tensor:
    """Rows of the hidden states, or a number for each, by frames."""
    return rows.unflatten(0, (-1, call.student_per_frame))


def _bytes(rows: torch.Tensor, per_frame: int) -> int:
    """Of rows as wide as ``rows``, (frames, tokens, D), but ``per_frame`` of them in each frame."""
    return rows.shape[0] * per_frame * rows.shape[2] * rows.element_size()


def _aligned(call: Call, normalized: torch.Tensor) -> torch.Tensor:
    if call.change == KEEP or call.resamples_p:
        return normalized
    framed = _framed(call, normalized)
    return framed.mean(dim=1) if call.change == POOL else _resampled(call, framed)


def normalized_gradient(
    call: Call,
    chunk: RowChunk,
    grad: torch.Tensor,
    mean: torch.Tensor,
    inverse_std: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """dh of the chunk into ``out`` (B x L, D), from ``grad`` (rows, D), that of what ``student_operand`` makes."""
    span, repeat = student_span(call, chunk), 1
    tokens = student_rows(call, chunk, span)
    mean, inverse_std, out = within(mean, span), within(inverse_std, span), within(out, span)
    if call.change == RESAMPLE and not call.resamples_p:
        if call.fused:
            framed = grad.view(-1, call.per_frame, grad.shape[1])
            arguments = [framed.to(tokens.dtype), *(_framed(call, each) for each in (tokens, mean, inverse_std))]
            into, in_loss = _framed(call, out), _in_loss(call, chunk)
            operator(
                "layer_norm_resample_backward",
                Cost((*arguments,), (into,)),
                lambda: layer_norm_resample_backward_out_op(*arguments, *call.geometry, into, in_loss, scale),
            )
            return
        grad = _resampled_gradient(call, grad)
    elif call.change == POOL:
        repeat = call.student_per_frame
    layer_norm_backward(call, tokens, span.start, grad, mean, inverse_std, scale, out, repeat)


def finite_rows(call: Call, chunk: RowChunk, operand: torch.Tensor) -> torch.Tensor:
    """``operand`` with the rows of frames outside the loss at 0: its product with their zero gradients is 0."""
    if not call.raw or call.mask is None:
        return operand
    keep = call.mask.bool().repeat_interleave(call.per_frame, dim=1)[:, call.start : call.start + call.rows]
    return operand.where(keep.reshape(-1)[chunk.span, None], 0)


def within(rows: torch.Tensor, span: slice) -> torch.Tensor:
    """``rows[span]``, without a view where that is all of them."""
    return rows if span.stop - span.start == rows.shape[0] else rows[span]


def _in_loss(call: Call, chunk: RowChunk) -> torch.Tensor | None:
    """Which of the chunk's frames are in the loss, (frames,) bool; None if all are."""
    if call.mask is None:
        return None
    clips = slice(chunk.first_clip, chunk.first_clip + chunk.clips)
    return call.mask[clips, chunk.first_frame : chunk.last_frame].flatten().bool()
