"""The launches of one call, forward and backward, in order. docs/kernels.md lists what each reads and writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .call import COMBINED, Call
from .chunks import RowChunk, row_chunks
from .dx import scaled_weight, token_gradient
from .frame_rows import compare_frames, frame_grid
from .frames import FrameTables, finish, frame_tables
from .launch import product
from .one_pass import project_and_compare
from .projector import FoldedProjector, fold_projector, unfold_gradients
from .rows import GivenGradient, RowInputs, compare_rows, row_programs
from .student import (
    aligned_p,
    aligned_p_gradient,
    finite_rows,
    normalized_gradient,
    student_operand,
    student_rows,
    student_span,
    within,
)  # fmt: skip
from .teacher import combine_neighbours, inverse_norms


class Kept(NamedTuple):
    """What the forward pass leaves for the backward pass.

    Attributes:
        grad_rows: (rows, E), r dp for unit loss weight; (0, E) where the backward makes it.
        statistics: (2 or 3, B x L) fp32: mean, 1/std and, of raw tokens, LayerNorm's slope.
        offset_grad: (E,) fp32, the sum of dp; 0 where the backward makes it.
        weight: the folded projector's, (E, D), with ``shift`` (E,) and ``offset`` (E,).
        aligned: (rows, D), the student's normalised rows on the common grid; (0, D) where the backward makes them
            or needs none.
    """

    grad_rows: torch.Tensor
    statistics: torch.Tensor
    offset_grad: torch.Tensor
    weight: torch.Tensor
    shift: torch.Tensor
    offset: torch.Tensor
    aligned: torch.Tensor


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden_states: bool
    gamma: bool
    beta: bool
    weight: bool
    bias: bool


def _inputs(
    call: Call, tables: FrameTables, norms: torch.Tensor | None, chunk: RowChunk, folded: FoldedProjector | None,
    statistics: Sequence[torch.Tensor], one_pass: bool = False,
) -> RowInputs:  # fmt: skip
    combined = None
    if call.neighbour_mode == COMBINED and (one_pass or not call.frames_fit):
        assert norms is not None  # for the type checker
        combined = combine_neighbours(call, norms, tables, chunk)
    return RowInputs(call, combined, tables, folded, (statistics[0], statistics[1]) if call.raw else None)


def _norms(call: Call, one_pass: bool) -> torch.Tensor | None:
    combining = call.neighbour_mode == COMBINED and not call.frames_fit
    return inverse_norms(call.teacher) if one_pass or combining else None


def _offset_parts(call: Call, chunks: list[RowChunk]) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """Room for parts of the sum of dp over the rows, (programs, E) fp32: of all chunks, and of each, views of it."""
    device = call.teacher.device
    if call.frames_fit:
        counts = [math.prod(frame_grid(call, chunk)) for chunk in chunks]
    else:
        counts = [row_programs(chunk.rows, call.choice.rows, device) for chunk in chunks]
    parts = torch.empty((sum(counts), call.feature_size), dtype=torch.float32, device=device)
    return parts, (parts,) if len(counts) == 1 else parts.split(counts)


def _compare(
    projected: torch.Tensor, chunk: RowChunk, inputs: RowInputs, parts: torch.Tensor | None,
    slope: torch.Tensor | None = None, offset_parts: torch.Tensor | None = None, given: GivenGradient | None = None,
) -> None:  # fmt: skip
    compare = compare_frames if inputs.call.frames_fit else compare_rows
    compare(projected, chunk, inputs, parts, slope, offset_parts, given)


def _given_rows(call: Call, chunk: RowChunk) -> torch.Tensor:
    """Rows (rows, E) of p that is given, on the common grid."""
    return aligned_p(call, student_rows(call, chunk, student_span(call, chunk)))


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Kept]:
    """Loss (), metrics (3,), frame_similarity (B, T), and what the backward pass needs if ``call.keep``."""
    stored, raw, tf32, features = call.stored, call.raw, call.tf32, call.feature_size
    one_pass = not (stored or call.resamples_p or call.given) and call.choice.inference == "one_pass"
    makes_rows = not one_pass or call.neighbour_mode == COMBINED
    folded = None if call.given else fold_projector(call)
    tables, norms = frame_tables(call), _norms(call, one_pass)
    statistics = call.tokens.new_empty((call.statistics_count, call.student_rows), dtype=torch.float32)
    of_tokens = statistics.unbind()
    slope = of_tokens[2] if len(of_tokens) > 2 else None
    columns = -(-features // call.choice.one_pass.n) if one_pass else 1
    parts = statistics.new_empty((call.all_rows, columns, 3))
    grad_rows = call.tokens.new_empty((call.projected_rows if stored else 0, features), dtype=call.compute_dtype)
    aligned = []
    whole = call.given and not call.resamples_p and call.neighbour_mode != COMBINED
    chunks = row_chunks(call, limited=not whole and (not raw or (makes_rows and not stored)))
    offset_parts, chunk_parts = _offset_parts(call, chunks if stored else [])
    for index, chunk in enumerate(chunks):
        inputs = _inputs(call, tables, norms, chunk, folded, of_tokens, one_pass)
        if folded is None:
            _compare(_given_rows(call, chunk), chunk, inputs, parts)
            continue
        operand = student_operand(call, chunk, of_tokens[0], of_tokens[1])
        if call.keeps_aligned:
            aligned.append(operand)
        if one_pass:
            assert norms is not None  # for the type checker
            project_and_compare(operand, norms, chunk, inputs, parts)
            continue
        out = None
        if stored:
            out = within(grad_rows, student_span(call, chunk) if call.resamples_p else chunk.span)
        projected = product("p", operand, folded.weight.t(), out=out, tf32=tf32)
        rows = aligned_p(call, projected)
        _compare(rows, chunk, inputs, parts, slope, chunk_parts[index] if stored else None)
        if out is not None and call.resamples_p:
            out.copy_(aligned_p_gradient(call, rows))
    loss, metrics, frame_similarity = finish(parts, call, tables)
    offset_grad = offset_parts.sum(dim=0)
    if not aligned:
        aligned = [grad_rows.new_empty(0, call.hidden_size)]
    operands = aligned[0] if len(aligned) == 1 else torch.cat(aligned)
    if folded is None:
        none = statistics.new_empty(0)
        folded = FoldedProjector(grad_rows.new_empty(0, call.hidden_size), none, torch.empty_like(none))
        offset_grad = torch.empty_like(none)
    return loss, metrics, frame_similarity, Kept(grad_rows, statistics, offset_grad, *folded, operands)


def backward(
    call: Call, kept: Kept, grad_loss: torch.Tensor, needs: Needs
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the hidden states (B, L, D), gamma, beta, weight and bias; None where not wanted."""
    stored, raw, tf32, tokens = kept.grad_rows.shape[0] > 0, call.raw, call.tf32, call.tokens
    scale = grad_loss.float() * (-1.0 / (call.batch * call.frames * call.per_frame))
    if call.given:
        return (_given_gradient(call, scale) if needs.hidden_states else None, None, None, None, None)
    tables = None if stored else frame_tables(call)
    norms = None if stored else _norms(call, one_pass=False)
    folded = FoldedProjector(kept.weight, kept.shift, kept.offset)
    mean, inverse_std, *slopes = kept.statistics.unbind()
    slope = slopes[0] if slopes else torch.empty_like(mean)
    # Inputs of an operator stay as they are: what is measured again goes elsewhere.
    scratch = (mean, inverse_std) if raw else (torch.empty_like(mean), torch.empty_like(mean))
    hidden_grad = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    hidden_rows = hidden_grad.view(-1, tokens.shape[2])
    need_folded = needs.gamma or needs.weight
    folded_grad: torch.Tensor | None = None
    dx_weight = scaled_weight(call, folded.weight, scale) if needs.hidden_states and raw else folded.weight
    chunks = row_chunks(call, limited=not raw or not stored or call.mask is not None)
    offset_parts, chunk_parts = (kept.offset_grad, ()) if stored else _offset_parts(call, chunks)
    for index, chunk in enumerate(chunks):
        rows = chunk.span
        operand = None
        if kept.aligned.shape[0] > 0:
            operand = within(kept.aligned, rows)
        elif not stored or need_folded:
            operand = student_operand(call, chunk, *scratch, measured=True)
        if tables is None or operand is None:
            grad_rows = within(kept.grad_rows, student_span(call, chunk) if call.resamples_p else rows)
        else:
            inputs = _inputs(call, tables, norms, chunk, folded, (mean, inverse_std))
            grad_rows = aligned_p(call, product("p", operand, folded.weight.t(), tf32=tf32))
            _compare(grad_rows, chunk, inputs, None, slope, chunk_parts[index])
            grad_rows = aligned_p_gradient(call, grad_rows)
        if need_folded and operand is not None:
            finite = finite_rows(call, chunk, operand)
            part = product("dW", grad_rows.t(), finite, to_fp32=True, tf32=tf32)
            folded_grad = part if folded_grad is None else folded_grad.add_(part)
        if needs.hidden_states and raw:
            span = student_span(call, chunk)
            token_gradient(
                call, grad_rows, dx_weight, student_rows(call, chunk, span), within(mean, span), within(slope, rows),
                scale, within(hidden_rows, span),
            )  # fmt: skip
        elif needs.hidden_states:
            dx = product("dx", grad_rows, folded.weight, tf32=tf32)
            normalized_gradient(call, chunk, dx, mean, inverse_std, scale, hidden_rows)
    offset_grad = kept.offset_grad if stored else offset_parts.sum(dim=0)
    weight_grads = _weights(call, needs, folded_grad, offset_grad, scale)
    return (hidden_grad if needs.hidden_states else None, *weight_grads)


def _given_gradient(call: Call, scale: torch.Tensor) -> torch.Tensor:
    """The gradient (B, L, E) of p that is given."""
    tables, norms = frame_tables(call), _norms(call, one_pass=False)
    grad = torch.empty(call.tokens.shape, dtype=call.tokens.dtype, device=call.tokens.device)
    rows = grad.view(-1, call.feature_size)
    for chunk in row_chunks(call, limited=call.resamples_p or call.neighbour_mode == COMBINED):
        span, inputs = student_span(call, chunk), _inputs(call, tables, norms, chunk, None, ())
        p, out = _given_rows(call, chunk), within(rows, span)
        into = GivenGradient(torch.empty_like(p) if call.resamples_p else out, scale)
        _compare(p, chunk, inputs, None, given=into)
        if call.resamples_p:
            out.copy_(aligned_p_gradient(call, into.out))
    return grad


def _weights(
    call: Call,
    needs: Needs,
    folded_grad: torch.Tensor | None,
    offset_grad: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    weight_grad = gamma_grad = beta_grad = None
    affine = needs.gamma or needs.beta
    if folded_grad is not None:
        weight_grad, gamma_grad, beta_grad = unfold_gradients(
            call, folded_grad, offset_grad, scale, needs.weight, affine
        )
    elif needs.beta and call.weight is not None:
        beta_grad = product("dbeta", (offset_grad * scale)[None, :], call.weight.float())[0]
    gamma, beta, bias = call.gamma, call.beta, call.bias
    return (
        gamma_grad.to(gamma.dtype) if needs.gamma and gamma is not None and gamma_grad is not None else None,
        beta_grad.to(beta.dtype) if needs.beta and beta is not None and beta_grad is not None else None,
        weight_grad if needs.weight else None,
        (offset_grad * scale).to(bias.dtype) if needs.bias and bias is not None else None,
    )
