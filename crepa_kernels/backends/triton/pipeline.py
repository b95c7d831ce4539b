"""The launches of one call, forward and backward, in order. docs/kernels.md lists what each reads and writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...inputs import ProjectorWeights
from .chunks import RowChunk, row_chunks
from .dx import scaled_weight, token_gradient
from .frame_rows import compare_frames, frame_grid, frames_fit
from .frames import Clip, FrameTables, finish, frame_tables, mask_bytes
from .launch import product
from .one_pass import project_and_compare
from .projector import FoldedProjector, fold_projector, unfold_gradients
from .rows import COMBINED, RowInputs, compare_rows, neighbour_mode, row_programs
from .student import Spatial, StudentTokens, within
from .teacher import combine_neighbours, inverse_norms
from .tiles import Choice, choose


@dataclass(frozen=True)
class Call:
    """One call of the loss, checked, the teacher already on the common grid.

    Attributes:
        tokens: (B, L, D) hidden states, L = T x P or the rows of ``token_range``; last axis contiguous.
        teacher: (B, S, M, E), last axis contiguous.
        projector: its weights.
        frame_index: (B, T) int64 or None.
        frame_mask: (B, T) bool or None, with ``teacher_mask`` (B, T) bool or None.
        spatial: what happens to the student's grid.
        clip: sizes and frame options.
        compute: the type that products are asked for in: that of the tokens, or a narrower one for fp32 tokens.
    """

    tokens: torch.Tensor
    teacher: torch.Tensor
    projector: ProjectorWeights
    frame_index: torch.Tensor | None
    frame_mask: torch.Tensor | None
    teacher_mask: torch.Tensor | None
    spatial: Spatial
    clip: Clip
    compute: torch.dtype


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


def folds(call: Call, keep: bool) -> tuple[bool, torch.dtype]:
    """Whether LayerNorm folds into the product of raw tokens, and the products' type.

    It does for 16-bit tokens, whose products are exact in fp32. fp16 cannot hold the gradient of a row below the
    norm's floor: where one is kept, tokens are normalised into fp32, and multiplied in TF32, which has fp16's digits.
    """
    exact = call.compute == torch.bfloat16 or (call.compute == torch.float16 and not keep)
    raw = exact and call.tokens.dtype == call.compute and call.spatial.change == "keep"
    return raw, call.compute if exact else torch.float32


def call_choice(call: Call, keep: bool) -> Choice:
    """By the products' type, which need not be that of the tokens."""
    _, compute_dtype = folds(call, keep)
    return choose(call.tokens.device, call.tokens.shape[2], call.teacher.shape[3], compute_dtype)


def statistics_count(raw: bool, stored: bool) -> int:
    """How many numbers a token are kept: mean, 1/std and, where it is needed and at hand, LayerNorm's slope."""
    return 3 if raw and stored else 2


def stores_rows(choice: Choice, keep: bool, recompute: bool) -> bool:
    """Whether the forward pass keeps r dp for the backward pass."""
    return keep and not recompute and choice.training == "split"


def _student(call: Call, keep: bool, choice: Choice) -> StudentTokens:
    raw, compute_dtype = folds(call, keep)
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    tf32 = compute_dtype == torch.float32 and (allowed or call.compute == torch.float16)
    return StudentTokens(
        call.tokens, call.spatial, call.clip, call.projector.eps, raw, compute_dtype, tf32, choice.tokens
    )


def _chunks(student: StudentTokens, limited: bool) -> list[RowChunk]:
    # Where the extension normalises and resamples at once, nothing is made of the student's own tokens.
    per_frame = student.clip.tokens
    if not student.fused:
        per_frame = max(per_frame, student.spatial.student_tokens)
    return row_chunks(student.clip, limited, student.joined, per_frame)


def _inputs(
    call: Call, tables: FrameTables, norms: torch.Tensor | None, chunk: RowChunk, folded: FoldedProjector,
    student: StudentTokens, mean: torch.Tensor, inverse_std: torch.Tensor, one_pass: bool = False,
) -> RowInputs:  # fmt: skip
    combined = None
    if neighbour_mode(call.clip) == COMBINED and (one_pass or not frames_fit(call.clip)):
        assert norms is not None  # for the type checker
        combined = combine_neighbours(call.teacher, norms, call.clip, tables, chunk, student.compute_dtype)
    return RowInputs(call.teacher, combined, call.clip, tables, folded, (mean, inverse_std) if student.raw else None)


def _norms(call: Call, one_pass: bool) -> torch.Tensor | None:
    combining = neighbour_mode(call.clip) == COMBINED and not frames_fit(call.clip)
    return inverse_norms(call.teacher) if one_pass or combining else None


def _offset_parts(chunks: list[RowChunk], call: Call, choice: Choice) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """Room for parts of the sum of dp over the rows, (programs, E) fp32: of all chunks, and of each, views of it."""
    device, clip = call.teacher.device, call.clip
    if frames_fit(clip):
        counts = [math.prod(frame_grid(clip, chunk)) for chunk in chunks]
    else:
        counts = [row_programs(chunk.rows, choice.rows, device) for chunk in chunks]
    parts = torch.empty((sum(counts), call.teacher.shape[3]), dtype=torch.float32, device=device)
    return parts, parts.split(counts)


def _compare(
    projected: torch.Tensor, chunk: RowChunk, inputs: RowInputs, choice: Choice, parts: torch.Tensor | None,
    slope: torch.Tensor | None, offset_parts: torch.Tensor | None,
) -> None:  # fmt: skip
    if frames_fit(inputs.clip):
        compare_frames(projected, chunk, inputs, parts, slope, offset_parts)
    else:
        compare_rows(projected, chunk, inputs, choice.rows, parts, slope, offset_parts)


def forward(
    call: Call, keep: bool, keep_aligned: bool, recompute: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Kept]:
    """Loss (), metrics (3,), frame_similarity (B, T), and what the backward pass needs if ``keep``.

    The rows of a student that is resampled to few are needed for the projector's gradients alone: ``keep_aligned``.
    """
    choice = call_choice(call, keep)
    student, clip = _student(call, keep, choice), call.clip
    stored = stores_rows(choice, keep, recompute)
    one_pass = not stored and choice.inference == "one_pass"
    makes_rows = not one_pass or neighbour_mode(clip) == COMBINED
    features = call.teacher.shape[3]
    gamma, beta, weight, bias, _ = call.projector
    folded = fold_projector(gamma, beta, weight, bias, student.compute_dtype, centered=student.raw)
    mask = mask_bytes(call.frame_mask)
    tables = frame_tables(clip, call.frame_index, mask, call.teacher_mask, call.tokens.device)
    norms = _norms(call, one_pass)
    statistics = call.tokens.new_empty((statistics_count(student.raw, stored), student.row_count), dtype=torch.float32)
    mean, inverse_std = statistics[0], statistics[1]
    slope = statistics[2] if student.raw and stored else None
    columns = -(-features // choice.one_pass.n) if one_pass else 1
    parts = statistics.new_empty((clip.all_rows, columns, 3))
    grad_rows = call.tokens.new_empty((clip.all_rows if stored else 0, features), dtype=student.compute_dtype)
    aligned = []
    chunks = _chunks(student, limited=not student.raw or (makes_rows and not stored))
    offset_parts, chunk_parts = _offset_parts(chunks if stored else [], call, choice)
    for index, chunk in enumerate(chunks):
        operand = student.operand(chunk, mask, mean, inverse_std)
        if stored and keep_aligned and call.spatial.keeps_aligned:
            aligned.append(operand)
        inputs = _inputs(call, tables, norms, chunk, folded, student, mean, inverse_std, one_pass)
        if one_pass:
            assert norms is not None  # for the type checker
            project_and_compare(operand, norms, chunk, inputs, choice.one_pass, parts, student.tf32)
            continue
        out = grad_rows[chunk.first_row : chunk.stop_row] if stored else None
        projected = product("p", operand, folded.weight.t(), out=out, tf32=student.tf32)
        _compare(projected, chunk, inputs, choice, parts, slope, chunk_parts[index] if stored else None)
    loss, metrics, frame_similarity = finish(parts, clip, tables)
    offset_grad = offset_parts.sum(dim=0)
    if not aligned:
        aligned = [grad_rows.new_empty(0, call.tokens.shape[2])]
    operands = aligned[0] if len(aligned) == 1 else torch.cat(aligned)
    return loss, metrics, frame_similarity, Kept(grad_rows, statistics, offset_grad, *folded, operands)


def backward(
    call: Call, kept: Kept, grad_loss: torch.Tensor, needs: Needs
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the hidden states (B, L, D), gamma, beta, weight and bias; None where not wanted."""
    choice = call_choice(call, True)
    student, clip = _student(call, True, choice), call.clip
    stored = kept.grad_rows.shape[0] > 0
    scale = grad_loss.float() * (-1.0 / (clip.batch * clip.frames * clip.tokens))
    mask = mask_bytes(call.frame_mask)
    tables = None if stored else frame_tables(clip, call.frame_index, mask, call.teacher_mask, call.tokens.device)
    norms = None if stored else _norms(call, one_pass=False)
    folded, mean, inverse_std = FoldedProjector(kept.weight, kept.shift, kept.offset), *kept.statistics[:2]
    slope = kept.statistics[2] if stored and student.raw else torch.empty_like(mean)
    # Inputs of an operator stay as they are: what is measured again goes elsewhere.
    scratch = (mean, inverse_std) if student.raw else (torch.empty_like(mean), torch.empty_like(mean))
    hidden_grad = torch.empty(call.tokens.shape, dtype=call.tokens.dtype, device=call.tokens.device)
    hidden_rows = hidden_grad.view(-1, call.tokens.shape[2])
    need_folded = needs.gamma or needs.weight
    folded_grad: torch.Tensor | None = None
    dx_weight = folded.weight
    if needs.hidden_states and student.raw:
        dx_weight = scaled_weight(call.projector.gamma, call.projector.weight, folded.weight, scale, choice)
    chunks = _chunks(student, limited=not student.raw or not stored or mask is not None)
    offset_parts, chunk_parts = _offset_parts([] if stored else chunks, call, choice)
    for index, chunk in enumerate(chunks):
        rows = slice(chunk.first_row, chunk.stop_row)
        operand = None
        if kept.aligned.shape[0] > 0:
            operand = within(kept.aligned, rows)
        elif not stored or need_folded:
            operand = student.operand(chunk, mask, *scratch, measured=True)
        if tables is None or operand is None:
            grad_rows = within(kept.grad_rows, rows)
        else:
            inputs = _inputs(call, tables, norms, chunk, folded, student, mean, inverse_std)
            grad_rows = product("p", operand, folded.weight.t(), tf32=student.tf32)
            _compare(grad_rows, chunk, inputs, choice, None, slope, chunk_parts[index])
        if need_folded and operand is not None:
            finite = student.finite_rows(chunk, operand, mask)
            part = product("dW", grad_rows.t(), finite, to_fp32=True, tf32=student.tf32)
            folded_grad = part if folded_grad is None else folded_grad.add_(part)
        if needs.hidden_states and student.raw:
            span = student.span(chunk)
            token_gradient(
                grad_rows, dx_weight, student.rows(chunk), within(mean, span), within(slope, rows), scale,
                within(hidden_rows, span), choice, masked=mask is not None,
            )  # fmt: skip
        elif needs.hidden_states:
            dx = product("dx", grad_rows, folded.weight, tf32=student.tf32)
            student.normalized_gradient(dx, chunk, mask, mean, inverse_std, scale, hidden_rows)
    offset_grad = kept.offset_grad if stored else offset_parts.sum(dim=0)
    weight_grads = _weights(call, needs, folded_grad, offset_grad, scale, student)
    return (hidden_grad if needs.hidden_states else None, *weight_grads)


def _weights(
    call: Call,
    needs: Needs,
    folded_grad: torch.Tensor | None,
    offset_grad: torch.Tensor,
    scale: torch.Tensor,
    student: StudentTokens,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    gamma, beta, weight, bias, _ = call.projector
    weight_grad = gamma_grad = beta_grad = None
    affine = needs.gamma or needs.beta
    if folded_grad is not None:
        weight_grad, gamma_grad, beta_grad = unfold_gradients(
            folded_grad, offset_grad, scale, gamma, beta, weight, student.raw, needs.weight, affine
        )
    elif needs.beta:
        beta_grad = product("dbeta", (offset_grad * scale)[None, :], weight.float())[0]
    return (
        gamma_grad.to(gamma.dtype) if needs.gamma and gamma is not None and gamma_grad is not None else None,
        beta_grad.to(beta.dtype) if needs.beta and beta is not None and beta_grad is not None else None,
        weight_grad if needs.weight else None,
        (offset_grad * scale).to(bias.dtype) if needs.bias and bias is not None else None,
    )
