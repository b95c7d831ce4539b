"""The row kernel for several cumulative offsets: all frames of a token at once, so that z is never written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .call import Call
from .chunks import RowChunk
from .frames import FLOOR, inverse_norm
from .launch import INTERPRETED, Cost, ceil_div, launch, narrowed, power_of_2
from .rows import GivenGradient, RowInputs
from .teacher import precision


@triton.jit
def _student_block(
    projected, shift, offset, local, column, counted, mean, inverse_std, features, row_stride,
    GIVEN: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """A block of columns of p, which is 0 beyond them, and of c."""
    there = (column < features)[None, :]
    c = 0.0
    if not GIVEN:
        c = tl.load(offset + column[None, :], mask=there, other=0)
    place = projected + local[:, None] * row_stride + column[None, :]
    p = tl.load(place, mask=counted[:, None] & there, other=0).to(tl.float32)
    if FOLDED:
        p = (p - mean[:, None] * tl.load(shift + column[None, :], mask=there, other=0)) * inverse_std[:, None]
    return p + c, c


@triton.jit
def _weighed(weights, rows, total, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    """``total + weights @ rows``, the fp32 weights in ``TERMS`` parts of the rows' type; 0: both in fp32."""
    if TERMS == 0:
        return tl.dot(weights, rows.to(tl.float32), total, input_precision=PRECISION)
    for _ in tl.static_range(TERMS):
        part = weights.to(rows.dtype)
        total = tl.dot(part, rows, total)
        weights -= part.to(tl.float32)
    return total


@triton.jit
def _frame_rows_kernel(
    projected, shift, offset, mean_in, inverse_std_in, teacher, teacher_frame, weights, shares,
    parts, slope_out, offset_parts, gradient, scale_in,
    first_clip, first_frame, last_frame, first_row, chunk_rows, clip_rows, start, frames, tokens,
    features, row_stride, clip_stride, frame_stride, token_stride, share_scale, inverse_width,
    GIVEN: tl.constexpr, FOLDED: tl.constexpr, PARTS: tl.constexpr, GRADIENT: tl.constexpr, TERMS: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Frames f of a token: one sweep over the columns for all <p[f], y[k]>, whose sum over k is <p, z>, one for q."""
    token = tl.program_id(0).to(tl.int64)
    clip = first_clip + tl.program_id(2)
    f = first_frame + tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    place = f * tokens + token - start
    row = clip.to(tl.int64) * clip_rows + place
    local = row - first_row
    inside = (f < last_frame) & (place >= 0) & (place < clip_rows) & (local >= 0) & (local < chunk_rows)
    share = tl.load(shares + (clip * frames + f) * 4, mask=inside, other=0) * share_scale
    # A frame outside the loss may hold anything, and so may one that no other frame weighs.
    counted = inside & (share != 0)
    k = tl.arange(0, BLOCK_K)
    table = weights + (clip * frames + f).to(tl.int64)[:, None] * frames + k[None, :]
    weight = tl.load(table, mask=counted[:, None] & (k < frames)[None, :], other=0)
    near = tl.max((weight != 0).to(tl.int32), axis=0) != 0
    frame = tl.load(teacher_frame + clip * frames + k, mask=near, other=0).to(tl.int64)
    rows = teacher + clip.to(tl.int64) * clip_stride + token * token_stride + (frame * frame_stride)[:, None]
    mean = tl.zeros([BLOCK_F], tl.float32)
    inverse_std = mean + 1
    if FOLDED:
        mean = tl.load(mean_in + row, mask=counted, other=0)
        inverse_std = tl.load(inverse_std_in + row, mask=counted, other=1)
    pp = tl.zeros([BLOCK_F], tl.float32)
    yy = tl.zeros([BLOCK_K], tl.float32)
    gram = tl.zeros([BLOCK_F, BLOCK_K], tl.float32)
    for column_start in tl.range(0, features, BLOCK_E):
        column = column_start + tl.arange(0, BLOCK_E)
        y = tl.load(rows + column[None, :], mask=near[:, None] & (column < features)[None, :], other=0)
        p, _ = _student_block(
            projected, shift, offset, local, column, counted, mean, inverse_std, features, row_stride, GIVEN, FOLDED
        )
        pp += tl.sum(p * p, axis=1)
        yy += tl.sum(y.to(tl.float32) * y.to(tl.float32), axis=1)
        gram = _weighed(p, tl.trans(y), gram, TERMS, PRECISION)
    inverse_y = inverse_norm(yy)
    gram *= inverse_y[None, :]
    pz = tl.sum(weight * gram, axis=1)
    if PARTS:
        tl.store(parts + row * 3, pp, mask=inside)
        tl.store(parts + row * 3 + 1, pz, mask=inside)
        tl.store(parts + row * 3 + 2, tl.sum(tl.where(f[:, None] == k[None, :], gram, 0), axis=1), mask=inside)
    if GRADIENT:
        if GIVEN:
            share *= tl.load(scale_in)
        # Below the floor the row is divided by a constant: nothing to project out.
        floored = pp <= FLOOR * FLOOR
        inverse = inverse_norm(pp)
        factor = share * inverse * inverse_std
        along = factor * tl.where(floored, 0, pz * inverse * inverse)
        along_p = tl.where(floored, factor * pz, 0)
        std = tl.where(counted, 1 / inverse_std, 0)
        along_offset = tl.zeros([BLOCK_F], tl.float32)
        weight = weight * inverse_y[None, :] * factor[:, None]
        program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + token
        for column_start in tl.range(0, features, BLOCK_E):
            column = column_start + tl.arange(0, BLOCK_E)
            y = tl.load(rows + column[None, :], mask=near[:, None] & (column < features)[None, :], other=0)
            p, c = _student_block(
                projected, shift, offset, local, column, counted, mean, inverse_std, features, row_stride, GIVEN, FOLDED
            )
            q = _weighed(weight, y, -along[:, None] * p, 3 if TERMS > 0 else 0, PRECISION)
            if not GIVEN:
                along_offset += tl.sum(q * c, axis=1)
                part = offset_parts + program * features + column
                tl.store(part, tl.sum(q * std[:, None], axis=0), mask=column < features)
            keep = inside[:, None] & (column < features)[None, :]
            out = gradient + local[:, None] * features + column[None, :]
            tl.store(out, narrowed(q, gradient.dtype.element_ty), mask=keep)
        if FOLDED:
            slope = inverse_std * (along_offset - along_p) * inverse_width
            tl.store(slope_out + row, tl.where(counted, slope, 0), mask=inside)


def frame_grid(call: Call, chunk: RowChunk) -> tuple[int, int, int]:
    """Programs of ``compare_frames``: by tokens, tiles of frames and clips."""
    return call.per_frame, ceil_div(chunk.last_frame - chunk.first_frame, _block(chunk)), chunk.clips


def _block(chunk: RowChunk) -> int:
    return 16 if chunk.last_frame - chunk.first_frame <= 16 else 32


def compare_frames(
    projected: torch.Tensor,
    chunk: RowChunk,
    inputs: RowInputs,
    parts: torch.Tensor | None,
    slope: torch.Tensor | None = None,
    offset_parts: torch.Tensor | None = None,
    given: GivenGradient | None = None,
) -> None:
    """What ``compare_rows`` does, where ``Call.frames_fit``.

    Args:
        offset_parts: (programs of ``frame_grid``, E) fp32; None: no gradient is wanted.
    """
    call, _, tables, folded, statistics = inputs
    teacher = call.teacher
    rows, features = projected.shape
    dummy = tables.weights
    # Two parts hold 16 bits, twice those of a bf16 product; three all 24. The interpreter has no 16-bit products.
    split = teacher.dtype == torch.bfloat16 and not INTERPRETED
    terms = (3 if projected.dtype == torch.float32 else 2) if split else 0
    columns = max(16, min(64 if split else 32, power_of_2(features)))
    warps = max(1, min(4, _block(chunk) * columns // (4 * call.choice.rows.lanes)))  # 16 bytes of fp32 a lane
    read = (projected, rows * features * teacher.element_size())
    written: list[torch.Tensor | int] = [] if offset_parts is None else [projected, offset_parts]
    written += [] if given is None else [given.out]
    written += [12 * rows] if parts is not None else []
    launch(
        "frame_rows", _frame_rows_kernel, frame_grid(call, chunk), Cost(read, tuple(written)), warps=warps,
        projected=projected, shift=dummy if folded is None else folded.shift,
        offset=dummy if folded is None else folded.offset,
        mean_in=dummy if statistics is None else statistics[0],
        inverse_std_in=dummy if statistics is None else statistics[1], teacher=teacher,
        teacher_frame=tables.teacher_frame, weights=tables.weights,
        shares=tables.shares, parts=dummy if parts is None else parts, slope_out=dummy if slope is None else slope,
        offset_parts=dummy if offset_parts is None else offset_parts,
        gradient=projected if given is None else given.out, scale_in=dummy if given is None else given.scale,
        first_clip=chunk.first_clip,
        first_frame=chunk.first_frame, last_frame=chunk.last_frame, first_row=chunk.first_row, chunk_rows=chunk.rows,
        clip_rows=call.rows, start=call.start, frames=call.frames, tokens=call.per_frame, features=features,
        row_stride=projected.stride(0),
        clip_stride=teacher.stride(0), frame_stride=teacher.stride(1), token_stride=teacher.stride(2),
        share_scale=float(call.batch * call.frames), inverse_width=1.0 / call.hidden_size,
        GIVEN=call.given, FOLDED=statistics is not None, PARTS=parts is not None,
        GRADIENT=offset_parts is not None or given is not None,
        TERMS=terms, BLOCK_F=_block(chunk), BLOCK_K=16 if call.frames <= 16 else 32, BLOCK_E=columns,
        PRECISION=precision(teacher.device),
    )  # fmt: skip
