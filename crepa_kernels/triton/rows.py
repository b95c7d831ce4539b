"""The row kernel: from projected tokens to their cosines, and to r dp in p's place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .chunks import RowChunk
from .frames import FLOOR, Clip, FrameTables
from .launch import Cost, launch, narrowed, split_width
from .projector import FoldedProjector
from .tiles import RowTile

OWN, PAIR, COMBINED = 0, 1, 2


def neighbour_mode(clip: Clip) -> int:
    """How the neighbours' rows reach the kernels: not at all, as one row on either side, or combined beforehand."""
    reach = min(clip.neighbours.distance, clip.frames - 1)
    if reach == 0:
        return OWN
    return COMBINED if clip.neighbours.cumulative and reach > 1 else PAIR


@triton.jit
def locate_rows(
    row, inside, clip_rows, start, frames, tokens, teacher_frame, distance, weights,
    clip_stride, frame_stride, token_stride, MODE: tl.constexpr,
):  # fmt: skip
    """(clip, frame) of each row, its teacher row and those of the two neighbours, and the three weights."""
    clip = row // clip_rows
    token = row % clip_rows + start
    frame = token // tokens
    pair = clip * frames + frame
    base = clip * clip_stride + (token % tokens) * token_stride
    own = base + tl.load(teacher_frame + pair, mask=inside, other=0).to(tl.int64) * frame_stride
    own_weight = tl.load(weights + pair * frames + frame, mask=inside, other=0)
    before = own
    after = own
    before_weight = own_weight
    after_weight = own_weight
    if MODE == 1:
        step = tl.load(distance + clip, mask=inside, other=0)
        k = frame - step
        there = inside & (step > 0) & (k >= 0)
        before = base + tl.load(teacher_frame + clip * frames + k, mask=there, other=0).to(tl.int64) * frame_stride
        before_weight = tl.load(weights + pair * frames + k, mask=there, other=0)
        k = frame + step
        there = inside & (step > 0) & (k < frames)
        after = base + tl.load(teacher_frame + clip * frames + k, mask=there, other=0).to(tl.int64) * frame_stride
        after_weight = tl.load(weights + pair * frames + k, mask=there, other=0)
    return pair, own, before, after, own_weight, before_weight, after_weight


@triton.jit
def _load_part(
    projected, shift, offset, teacher, combined, local, own, before, after, inside, has_before, has_after,
    mean, inverse_std, column, features, FOLDED: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """A block of columns: p, c, the own teacher row, and the neighbours' two (or the combined one, twice)."""
    there = column < features
    keep = inside[:, None] & there[None, :]
    c = tl.load(offset + column, mask=there, other=0)[None, :]
    p = tl.load(projected + local[:, None] * features + column[None, :], mask=keep, other=0).to(tl.float32)
    if FOLDED:
        p = (p - mean[:, None] * tl.load(shift + column, mask=there, other=0)[None, :]) * inverse_std[:, None]
    p = p + c
    y = tl.load(teacher + own[:, None] + column[None, :], mask=keep, other=0).to(tl.float32)
    a = y
    b = y
    if MODE == 1:
        keep_a = has_before[:, None] & there[None, :]
        keep_b = has_after[:, None] & there[None, :]
        a = tl.load(teacher + before[:, None] + column[None, :], mask=keep_a, other=0).to(tl.float32)
        b = tl.load(teacher + after[:, None] + column[None, :], mask=keep_b, other=0).to(tl.float32)
    if MODE == 2:
        a = tl.load(combined + local[:, None] * features + column[None, :], mask=keep, other=0).to(tl.float32)
    return p, c, y, a, b


@triton.jit
def _row_gradient(p, y, a, b, own_factor, before_factor, after_factor, along, factor, counted, MODE: tl.constexpr):
    """dp of a block of columns for unit loss weight, ``(z - (<p, z> / |p|^2) p) / |p|`` times the frame's share."""
    if MODE == 2:
        z = a
    else:
        z = own_factor[:, None] * y
    if MODE == 1:
        z += before_factor[:, None] * a + after_factor[:, None] * b
    return tl.where(counted[:, None], factor[:, None] * (z - along[:, None] * p), 0)


@triton.jit
def _row_kernel(
    projected, shift, offset, mean_in, inverse_std_in, teacher, combined, teacher_frame, distance, weights, shares,
    parts, slope_out, offset_parts,
    rows, first_row, clip_rows, start, frames, tokens, features, clip_stride, frame_stride, token_stride,
    share_scale, inverse_width,
    FOLDED: tl.constexpr, MODE: tl.constexpr, PARTS: tl.constexpr, GRADIENT: tl.constexpr,
    ROWS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, LO)
    low_offset_grad = tl.zeros([LO], tl.float32)
    if HI > 0:
        tail = LO + tl.arange(0, HI)
        high_offset_grad = tl.zeros([HI], tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        local = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = local < rows
        row = first_row + local
        pair, own, before, after, own_weight, before_weight, after_weight = locate_rows(
            row, inside, clip_rows, start, frames, tokens, teacher_frame, distance, weights,
            clip_stride, frame_stride, token_stride, MODE,
        )  # fmt: skip
        has_before = inside & (before_weight != 0)
        has_after = inside & (after_weight != 0)
        mean = tl.zeros([ROWS], tl.float32)
        inverse_std = mean + 1
        if FOLDED:
            mean = tl.load(mean_in + row, mask=inside, other=0)
            inverse_std = tl.load(inverse_std_in + row, mask=inside, other=0)
        p, c, y, a, b = _load_part(
            projected, shift, offset, teacher, combined, local, own, before, after, inside, has_before, has_after,
            mean, inverse_std, column, features, FOLDED, MODE,
        )  # fmt: skip
        pp = tl.sum(p * p, axis=1)
        py = tl.sum(p * y, axis=1)
        yy = tl.sum(y * y, axis=1)
        pa = tl.sum(p * a, axis=1)
        aa = tl.sum(a * a, axis=1)
        pb = tl.sum(p * b, axis=1)
        bb = tl.sum(b * b, axis=1)
        if HI > 0:
            hp, hc, hy, ha, hb = _load_part(
                projected, shift, offset, teacher, combined, local, own, before, after, inside, has_before, has_after,
                mean, inverse_std, tail, features, FOLDED, MODE,
            )  # fmt: skip
            pp += tl.sum(hp * hp, axis=1)
            py += tl.sum(hp * hy, axis=1)
            yy += tl.sum(hy * hy, axis=1)
            pa += tl.sum(hp * ha, axis=1)
            aa += tl.sum(ha * ha, axis=1)
            pb += tl.sum(hp * hb, axis=1)
            bb += tl.sum(hb * hb, axis=1)
        own_inverse = 1 / tl.maximum(tl.sqrt(yy), FLOOR)
        own_factor = own_weight * own_inverse
        before_factor = before_weight / tl.maximum(tl.sqrt(aa), FLOOR)
        after_factor = after_weight / tl.maximum(tl.sqrt(bb), FLOOR)
        if MODE == 0:
            pz = own_factor * py
        elif MODE == 1:
            pz = own_factor * py + before_factor * pa + after_factor * pb
        else:
            pz = pa
        if PARTS:
            tl.store(parts + row * 3, pp, mask=inside)
            tl.store(parts + row * 3 + 1, pz, mask=inside)
            tl.store(parts + row * 3 + 2, own_inverse * py, mask=inside)
        if GRADIENT:
            norm = tl.sqrt(pp)
            inverse = 1 / tl.maximum(norm, FLOOR)
            # Below the floor the row is divided by a constant: nothing to project out.
            floored = norm <= FLOOR
            along = tl.where(floored, 0, pz * inverse * inverse)
            share = tl.load(shares + pair * 4, mask=inside, other=0) * share_scale
            counted = inside & (share != 0)
            factor = share * inverse
            inverse_std = tl.where(counted, inverse_std, 0)
            kind = projected.dtype.element_ty
            out = projected + local[:, None] * features
            dp = _row_gradient(p, y, a, b, own_factor, before_factor, after_factor, along, factor, counted, MODE)
            low_offset_grad += tl.sum(dp, axis=0)
            along_offset = tl.sum(dp * c, axis=1)
            q = narrowed(dp * inverse_std[:, None], kind)
            tl.store(out + column[None, :], q, mask=inside[:, None])
            if HI > 0:
                dp = _row_gradient(
                    hp, hy, ha, hb, own_factor, before_factor, after_factor, along, factor, counted, MODE
                )
                dp = tl.where((tail < features)[None, :], dp, 0)
                high_offset_grad += tl.sum(dp, axis=0)
                along_offset += tl.sum(dp * hc, axis=1)
                q = narrowed(dp * inverse_std[:, None], kind)
                tl.store(out + tail[None, :], q, mask=inside[:, None] & (tail < features)[None, :])
            if FOLDED:
                along_p = tl.where(floored, factor * pz, 0)
                slope = inverse_std * inverse_std * (along_offset - along_p) * inverse_width
                tl.store(slope_out + row, tl.where(counted, slope, 0), mask=inside)
    if GRADIENT:
        part = offset_parts + tl.program_id(0).to(tl.int64) * features
        tl.store(part + column, low_offset_grad)
        if HI > 0:
            tl.store(part + tail, high_offset_grad, mask=tail < features)


@dataclass(frozen=True)
class RowInputs:
    """What the rows of a chunk are compared with.

    Attributes:
        teacher: (B, S, M, E), last axis contiguous.
        combined: z of the chunk, (rows, E), where ``neighbour_mode`` is COMBINED.
        clip: sizes and frame options.
        tables: numbers per frame.
        folded: the projector's weights.
        statistics: mean and 1/std, (rows of the call,) each, where raw tokens were projected; None: normalised ones.
    """

    teacher: torch.Tensor
    combined: torch.Tensor | None
    clip: Clip
    tables: FrameTables
    folded: FoldedProjector
    statistics: tuple[torch.Tensor, torch.Tensor] | None


def compare_rows(
    projected: torch.Tensor,
    chunk: RowChunk,
    inputs: RowInputs,
    tile: RowTile,
    parts: torch.Tensor | None,
    slope: torch.Tensor | None = None,
    gradient: bool = False,
) -> torch.Tensor:
    """p.p, p.z and p.y of each row of ``projected`` (rows, E), the bare product; with ``gradient`` r dp in its place.

    The gradient is that of ``-loss x B T M`` and carries each frame's share: of the size of one token's.

    Args:
        parts: (rows of the call, 1, 3) fp32, the sums of this chunk's rows are written; None: not wanted.
        slope: (rows of the call,) fp32: ``r^2 <dp, c> / D``, LayerNorm's term, for raw tokens.

    Returns:
        (n, E) fp32, parts of the sum of dp over the rows; n = 0 without ``gradient``.
    """
    clip, tables, folded, teacher = inputs.clip, inputs.tables, inputs.folded, inputs.teacher
    rows, features = projected.shape
    low, high = split_width(features)
    programs = min(triton.cdiv(rows, tile.rows), tile.programs)
    offset_parts = projected.new_empty((programs if gradient else 0, features), dtype=torch.float32)
    mode = neighbour_mode(clip)
    dummy = tables.weights
    fp32 = 4 * rows
    read: list[torch.Tensor | int] = [projected, rows * features * teacher.element_size()]
    read += [] if inputs.combined is None else [inputs.combined]
    written: list[torch.Tensor | int] = [projected, offset_parts] if gradient else []
    written += [3 * fp32] if parts is not None else []
    launch(
        "rows", _row_kernel, (programs,), Cost(tuple(read), tuple(written)), warps=tile.warps,
        projected=projected, shift=folded.shift, offset=folded.offset,
        mean_in=dummy if inputs.statistics is None else inputs.statistics[0],
        inverse_std_in=dummy if inputs.statistics is None else inputs.statistics[1], teacher=teacher,
        combined=dummy if inputs.combined is None else inputs.combined, teacher_frame=tables.teacher_frame,
        distance=tables.distance, weights=tables.weights, shares=tables.shares,
        parts=dummy if parts is None else parts, slope_out=dummy if slope is None else slope,
        offset_parts=offset_parts, rows=rows, first_row=chunk.first_row, clip_rows=clip.rows, start=clip.start,
        frames=clip.frames, tokens=clip.tokens, features=features, clip_stride=teacher.stride(0),
        frame_stride=teacher.stride(1), token_stride=teacher.stride(2), share_scale=float(clip.batch * clip.frames),
        inverse_width=1.0 / folded.weight.shape[1], FOLDED=inputs.statistics is not None, MODE=mode,
        PARTS=parts is not None, GRADIENT=gradient, ROWS=tile.rows, LO=low, HI=high,
    )  # fmt: skip
    return offset_parts
