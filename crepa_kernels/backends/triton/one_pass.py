"""The projection with the similarity as its epilogue: p is reduced where it is made, and never written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .chunks import RowChunk
from .dx import tile_of
from .launch import Cost, ceil_div, dot_type, launch
from .rows import RowInputs, locate_rows


@triton.jit
def _reduce_columns(
    total, column, features, offset, shift, teacher, combined, local, own, before, after, inside, has_before,
    has_after, mean, inverse_std, own_factor, before_factor, after_factor, own_inverse,
    FOLDED: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """p.p, p.z and p.y over a block of columns of the product."""
    there = column < features
    keep = inside[:, None] & there[None, :]
    if FOLDED:
        total = (total - mean[:, None] * tl.load(shift + column, mask=there, other=0)[None, :]) * inverse_std[:, None]
    p = tl.where(there[None, :], total + tl.load(offset + column, mask=there, other=0)[None, :], 0)
    y = tl.load(teacher + own[:, None] + column[None, :], mask=keep, other=0).to(tl.float32)
    along_own = tl.sum(p * y, axis=1)
    if MODE == 2:
        z = tl.load(combined + local[:, None] * features + column[None, :], mask=keep, other=0).to(tl.float32)
        along = tl.sum(p * z, axis=1)
    else:
        along = own_factor * along_own
    if MODE == 1:
        keep_before = has_before[:, None] & there[None, :]
        y = tl.load(teacher + before[:, None] + column[None, :], mask=keep_before, other=0).to(tl.float32)
        along += before_factor * tl.sum(p * y, axis=1)
        keep_after = has_after[:, None] & there[None, :]
        y = tl.load(teacher + after[:, None] + column[None, :], mask=keep_after, other=0).to(tl.float32)
        along += after_factor * tl.sum(p * y, axis=1)
    return tl.sum(p * p, axis=1), along, own_inverse * along_own


@triton.jit
def _one_pass_kernel(
    tokens, weight, shift, offset, mean_in, inverse_std_in, teacher, norms, combined, teacher_frame, distance, weights,
    parts, rows, first_row, clip_rows, start, frames, teacher_frames, per_frame, features, width, row_stride,
    clip_stride, frame_stride, token_stride, part_count,
    DOT: tl.constexpr, FOLDED: tl.constexpr, MODE: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(features, BLOCK_N), GROUP)
    local = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = local < rows
    safe = tl.minimum(local, rows - 1)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    left = tokens + safe[:, None] * row_stride + k[None, :]
    right = weight + column.to(tl.int64)[None, :] * width + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(0, width, BLOCK_K):
        near = k < width - first
        if EVEN_K:
            a = tl.load(left)
        else:
            a = tl.load(left, mask=near[None, :], other=0)
        if EVEN_K and EVEN_N:
            b = tl.load(right)
        else:
            b = tl.load(right, mask=near[:, None] & (column < features)[None, :], other=0)
        total = tl.dot(a.to(DOT), b.to(DOT), total, input_precision=PRECISION)
        left += BLOCK_K
        right += BLOCK_K

    row = first_row + local
    _, own, before, after, own_weight, before_weight, after_weight = locate_rows(
        row, inside, clip_rows, start, frames, per_frame, teacher_frame, distance, weights,
        clip_stride, frame_stride, token_stride, MODE,
    )  # fmt: skip
    _, own_norm, before_norm, after_norm, _, _, _ = locate_rows(
        row, inside, clip_rows, start, frames, per_frame, teacher_frame, distance, weights,
        teacher_frames * per_frame, per_frame, 1, MODE,
    )  # fmt: skip
    has_before = inside & (before_weight != 0)
    has_after = inside & (after_weight != 0)
    own_inverse = tl.load(norms + own_norm, mask=inside, other=0)
    own_factor = own_weight * own_inverse
    before_factor = before_weight * tl.load(norms + before_norm, mask=has_before, other=0)
    after_factor = after_weight * tl.load(norms + after_norm, mask=has_after, other=0)
    mean = tl.zeros([BLOCK_M], tl.float32)
    inverse_std = mean + 1
    if FOLDED:
        mean = tl.load(mean_in + row, mask=inside, other=0)
        inverse_std = tl.load(inverse_std_in + row, mask=inside, other=0)
    if SPLIT:
        # Half of the columns at a time: the teacher rows of all of them do not fit in registers beside the product.
        HALF: tl.constexpr = BLOCK_N // 2
        halves = tl.permute(tl.reshape(total, [BLOCK_M, 2, HALF]), [0, 2, 1])
        left_half, right_half = tl.split(halves)
        first_column = column_tile * BLOCK_N + tl.arange(0, HALF)
        squares, along, along_own = _reduce_columns(
            left_half, first_column, features, offset, shift, teacher, combined, local, own, before, after, inside,
            has_before, has_after, mean, inverse_std, own_factor, before_factor, after_factor, own_inverse,
            FOLDED, MODE,
        )  # fmt: skip
        more, more_along, more_own = _reduce_columns(
            right_half, first_column + HALF, features, offset, shift, teacher, combined, local, own, before, after,
            inside, has_before, has_after, mean, inverse_std, own_factor, before_factor, after_factor, own_inverse,
            FOLDED, MODE,
        )  # fmt: skip
        squares += more
        along += more_along
        along_own += more_own
    else:
        squares, along, along_own = _reduce_columns(
            total, column, features, offset, shift, teacher, combined, local, own, before, after, inside, has_before,
            has_after, mean, inverse_std, own_factor, before_factor, after_factor, own_inverse, FOLDED, MODE,
        )  # fmt: skip
    out = parts + (row * part_count + column_tile) * 3
    tl.store(out, squares, mask=inside)
    tl.store(out + 1, along, mask=inside)
    tl.store(out + 2, along_own, mask=inside)


def project_and_compare(
    tokens: torch.Tensor,
    norms: torch.Tensor,
    chunk: RowChunk,
    inputs: RowInputs,
    parts: torch.Tensor,
) -> None:
    """p.p, p.z and p.y of each row of ``tokens`` (rows, D), by column tiles, into ``parts``.

    Args:
        tokens: raw where ``inputs.statistics`` is given, otherwise normalised.
        norms: (B, S, M) fp32, inverse norms of the teacher's rows.
        parts: (rows of the call, ceil(E / the tile's n), 3) fp32, the sums of this chunk's rows are written.
    """
    call, combined, tables, folded, statistics = inputs
    assert folded is not None  # for the type checker
    teacher, tile = call.teacher, call.choice.one_pass
    rows, width = tokens.shape
    features = folded.weight.shape[0]
    dummy = tables.weights
    teacher_bytes = rows * features * teacher.element_size()
    read = (tokens, folded.weight, teacher_bytes) + (() if combined is None else (combined,))
    launch(
        "one_pass", _one_pass_kernel, (ceil_div(rows, tile.m) * ceil_div(features, tile.n),),
        Cost(read, (12 * rows * parts.shape[1],), 2 * rows * features * width),
        warps=tile.warps, stages=tile.stages, tokens=tokens, weight=folded.weight, shift=folded.shift,
        offset=folded.offset, mean_in=dummy if statistics is None else statistics[0],
        inverse_std_in=dummy if statistics is None else statistics[1], teacher=teacher, norms=norms,
        combined=dummy if combined is None else combined, teacher_frame=tables.teacher_frame,
        distance=tables.distance, weights=tables.weights, parts=parts, rows=rows, first_row=chunk.first_row,
        clip_rows=call.rows, start=call.start, frames=call.frames, teacher_frames=call.teacher_frames,
        per_frame=call.per_frame, features=features, width=width, row_stride=tokens.stride(0),
        clip_stride=teacher.stride(0), frame_stride=teacher.stride(1), token_stride=teacher.stride(2),
        part_count=parts.shape[1], DOT=dot_type(tokens.dtype), FOLDED=statistics is not None,
        MODE=call.neighbour_mode, EVEN_K=width % tile.k == 0, EVEN_N=features % tile.n == 0, SPLIT=tile.split,
        GROUP=8, PRECISION="tf32" if call.tf32 and torch.version.hip is None else "ieee",
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
    )  # fmt: skip
