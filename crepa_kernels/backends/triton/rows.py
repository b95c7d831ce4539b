"""The row kernel: from projected tokens to their cosines, and to r dp in p's place."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .call import Call
from .chunks import RowChunk
from .frames import FLOOR, FrameTables, inverse_norm
from .launch import INTERPRETED, Cost, ceil_div, launch, narrowed, power_of_2
from .projector import FoldedProjector
from .tiles import RowTile, multiprocessors

# The interpreter takes a minute for what tl.reduce does with a function of its own.
_APART = tl.constexpr(INTERPRETED)


@triton.jit
def locate_rows(
    row, inside, clip_rows, start, frames, tokens, teacher_frame, distance, weights,
    clip_stride, frame_stride, token_stride, MODE: tl.constexpr,
):  # fmt: skip
    """(clip, frame) of each row, its teacher row and those of the two neighbours, and the three weights.

    A neighbour that counts for nothing has the own row's place and the weight 0: its place can be loaded.
    """
    # Divisions of 64 bits are calls of a hundred instructions.
    row = row.to(tl.int32)
    clip = row // clip_rows
    token = row - clip * clip_rows + start
    frame = token // tokens
    pair = clip * frames + frame
    base = clip.to(tl.int64) * clip_stride + (token - frame * tokens).to(tl.int64) * token_stride
    own_frame = tl.load(teacher_frame + pair, mask=inside, other=0)
    own = base + own_frame.to(tl.int64) * frame_stride
    row_weights = weights + pair.to(tl.int64) * frames
    own_weight = tl.load(row_weights + frame, mask=inside, other=0)
    before = own
    after = own
    before_weight = own_weight
    after_weight = own_weight
    if MODE == 1:
        # A choice between frames, not between places: those would no longer be known to be multiples of 16 bytes.
        first = teacher_frame + clip * frames
        step = tl.load(distance + clip, mask=inside, other=0)
        k = frame - step
        there = inside & (step > 0) & (k >= 0)
        before_weight = tl.load(row_weights + k, mask=there, other=0)
        near = tl.where(before_weight != 0, tl.load(first + k, mask=there, other=0), own_frame)
        before = base + near.to(tl.int64) * frame_stride
        k = frame + step
        there = inside & (step > 0) & (k < frames)
        after_weight = tl.load(row_weights + k, mask=there, other=0)
        near = tl.where(after_weight != 0, tl.load(first + k, mask=there, other=0), own_frame)
        after = base + near.to(tl.int64) * frame_stride
    return pair, own, before, after, own_weight, before_weight, after_weight


@triton.jit
def _load(place, column, features, INSIDE: tl.constexpr):
    """A piece (1, N) of the row that begins at each of ``place`` (ROWS, 1)."""
    if INSIDE:
        return tl.load(place + column)
    return tl.load(place + column, mask=column < features, other=0)


@triton.jit
def add_seven(a, b, c, d, e, f, g, h, i, j, k, m, n, o):
    return a + h, b + i, c + j, d + k, e + m, f + n, g + o


@triton.jit
def _row_sums(a, b, c, d, e, f, g):
    """Seven sums along the rows at once: one exchange between the warps instead of seven."""
    if _APART:
        sums = tl.sum(a, 1), tl.sum(b, 1), tl.sum(c, 1), tl.sum(d, 1), tl.sum(e, 1), tl.sum(f, 1), tl.sum(g, 1)
    else:
        sums = tl.reduce((a, b, c, d, e, f, g), 1, add_seven)
    return sums


@triton.jit
def _row_kernel(
    projected, shift, offset, mean_in, inverse_std_in, teacher, combined, teacher_frame, distance, weights, shares,
    parts, slope_out, offset_parts, gradient, scale_in,
    rows, first_row, clip_rows, start, frames, tokens, features, row_stride, clip_stride, frame_stride, token_stride,
    share_scale, inverse_width,
    GIVEN: tl.constexpr, FOLDED: tl.constexpr, MODE: tl.constexpr, PARTS: tl.constexpr, GRADIENT: tl.constexpr,
    MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A row is in ``PIECES`` pieces of ``COLUMNS``, ``WHOLE`` of them whole: all are loaded before any is summed."""
    columns: tl.tuple = ()
    offset_grads: tl.tuple = ()
    for piece in tl.static_range(PIECES):
        column = piece * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        columns += (column,)
        offset_grads += (tl.zeros([1, COLUMNS], tl.float32),)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        local = block * ROWS + tl.arange(0, ROWS)
        inside = local < rows
        local = tl.minimum(local, rows - 1)
        row = first_row + local
        pair, own, before, after, own_weight, before_weight, after_weight = locate_rows(
            row, inside, clip_rows, start, frames, tokens, teacher_frame, distance, weights,
            clip_stride, frame_stride, token_stride, MODE,
        )  # fmt: skip
        source = projected + local.to(tl.int64)[:, None] * row_stride
        out = gradient + local.to(tl.int64)[:, None] * features
        z_row = combined + local.to(tl.int64)[:, None] * features
        raws: tl.tuple = ()
        ys: tl.tuple = ()
        befores: tl.tuple = ()
        afters: tl.tuple = ()
        for piece in tl.static_range(PIECES):
            raws += (_load(source, columns[piece], features, piece < WHOLE),)
            ys += (_load(teacher + own[:, None], columns[piece], features, piece < WHOLE),)
            if MODE == 1:
                befores += (_load(teacher + before[:, None], columns[piece], features, piece < WHOLE),)
                afters += (_load(teacher + after[:, None], columns[piece], features, piece < WHOLE),)
            if MODE == 2:
                befores += (_load(z_row, columns[piece], features, piece < WHOLE),)
        inverse_std = tl.full([ROWS], 1, tl.float32)
        if FOLDED:
            mean = tl.load(mean_in + row)[:, None]
            inverse_std = tl.load(inverse_std_in + row)
        ps: tl.tuple = ()
        pp = tl.zeros([ROWS, COLUMNS], tl.float32)
        py = pp
        yy = pp
        pa = pp
        aa = pp
        pb = pp
        bb = pp
        for piece in tl.static_range(PIECES):
            p = raws[piece].to(tl.float32)
            if FOLDED:
                p = (p - mean * _load(shift, columns[piece], features, piece < WHOLE)) * inverse_std[:, None]
            if not GIVEN:
                p += _load(offset, columns[piece], features, piece < WHOLE)
            ps += (p,)
            y = ys[piece].to(tl.float32)
            pp += p * p
            py += p * y
            yy += y * y
            if MODE == 2:
                pa += p * befores[piece].to(tl.float32)
            if MODE == 1:
                y = befores[piece].to(tl.float32)
                pa += p * y
                aa += y * y
                y = afters[piece].to(tl.float32)
                pb += p * y
                bb += y * y
        pp, py, yy, pa, aa, pb, bb = _row_sums(pp, py, yy, pa, aa, pb, bb)
        own_inverse = inverse_norm(yy)
        own_factor = own_weight * own_inverse
        pz = own_factor * py
        if MODE == 1:
            before_factor = before_weight * inverse_norm(aa)
            after_factor = after_weight * inverse_norm(bb)
            pz += before_factor * pa + after_factor * pb
        if MODE == 2:
            pz = pa
        if PARTS:
            tl.store(parts + row * 3, pp, mask=inside)
            tl.store(parts + row * 3 + 1, pz, mask=inside)
            tl.store(parts + row * 3 + 2, own_inverse * py, mask=inside)
        if GRADIENT:
            # Below the floor the row is divided by a constant: nothing to project out.
            floored = pp <= FLOOR * FLOOR
            inverse = inverse_norm(pp)
            share = tl.load(shares + pair * 4, mask=inside, other=0) * share_scale
            if GIVEN:
                share *= tl.load(scale_in)
            factor = share * inverse * inverse_std
            along = factor * tl.where(floored, 0, pz * inverse * inverse)
            own_factor *= factor
            if MODE == 1:
                before_factor *= factor
                after_factor *= factor
            # From r dp back to dp.
            std = tl.where(share != 0, 1 / inverse_std, 0)
            along_offset = tl.zeros([ROWS, COLUMNS], tl.float32)
            new_grads: tl.tuple = ()
            for piece in tl.static_range(PIECES):
                if MODE == 2:
                    q = factor[:, None] * befores[piece].to(tl.float32) - along[:, None] * ps[piece]
                else:
                    q = own_factor[:, None] * ys[piece].to(tl.float32) - along[:, None] * ps[piece]
                if MODE == 1:
                    q += before_factor[:, None] * befores[piece].to(tl.float32)
                    q += after_factor[:, None] * afters[piece].to(tl.float32)
                if MASKED:
                    q = tl.where((share != 0)[:, None], q, 0)
                if not GIVEN:
                    new_grads += (offset_grads[piece] + tl.sum(q * std[:, None], axis=0)[None, :],)
                    along_offset += q * _load(offset, columns[piece], features, piece < WHOLE)
                keep = inside[:, None]
                if piece == WHOLE:
                    keep = keep & (columns[piece] < features)
                tl.store(out + columns[piece], narrowed(q, gradient.dtype.element_ty), mask=keep)
            if not GIVEN:
                offset_grads = new_grads
            if FOLDED:
                # <dp, p> is 0 but below the floor; along_offset carries r once already.
                along_p = tl.where(floored, factor * pz, 0)
                slope = inverse_std * (tl.sum(along_offset, axis=1) - along_p) * inverse_width
                if MASKED:
                    slope = tl.where(share != 0, slope, 0)
                tl.store(slope_out + row, slope, mask=inside)
    if GRADIENT and not GIVEN:
        part = offset_parts + tl.program_id(0).to(tl.int64) * features
        for piece in tl.static_range(PIECES):
            tl.store(part + columns[piece], offset_grads[piece], mask=columns[piece] < features)


class RowInputs(NamedTuple):
    """What the rows of a chunk are compared with.

    Attributes:
        call: sizes, options, and the teacher.
        combined: z of the chunk, (rows, E), where it is made.
        tables: numbers per frame.
        folded: the projector's weights; None: p is given.
        statistics: mean and 1/std, (rows of the call,) each, where raw tokens were projected; None: normalised ones.
    """

    call: Call
    combined: torch.Tensor | None
    tables: FrameTables
    folded: FoldedProjector | None
    statistics: tuple[torch.Tensor, torch.Tensor] | None


class GivenGradient(NamedTuple):
    """Where the gradient of given p goes, (rows, E), and what it is multiplied by, one number on the device."""

    out: torch.Tensor
    scale: torch.Tensor


def row_programs(rows: int, tile: RowTile, device: torch.device) -> int:
    """Programs of ``compare_rows``, each with a share of ``rows``."""
    return min(ceil_div(rows, tile.rows), tile.programs * multiprocessors(device))


def compare_rows(
    projected: torch.Tensor,
    chunk: RowChunk,
    inputs: RowInputs,
    parts: torch.Tensor | None,
    slope: torch.Tensor | None = None,
    offset_parts: torch.Tensor | None = None,
    given: GivenGradient | None = None,
) -> None:
    """p.p, p.z and p.y of each row of ``projected`` (rows, E), the bare product; r dp in its place if it is wanted.

    The gradient is that of ``-loss x B T M`` and carries each frame's share: of the size of one token's. Rows of p that
    is given stay as they are, and may lie apart; their gradient is that of the loss itself.

    Args:
        parts: (rows of the call, 1, 3) fp32, the sums of this chunk's rows are written; None: not wanted.
        slope: (rows of the call,) fp32: ``r^2 <dp, c> / D``, LayerNorm's term, for raw tokens.
        offset_parts: (``row_programs``, E) fp32, parts of the sum of dp over the rows; None: no gradient is wanted.
        given: of p that is given; None: no gradient of it is wanted.
    """
    call, combined, tables, folded, statistics = inputs
    teacher = call.teacher
    rows, features = projected.shape
    tile, mask = call.choice.rows, call.mask
    columns = min(tile.columns, power_of_2(features))
    dummy = tables.weights
    read = (projected, rows * features * teacher.element_size(), *(() if combined is None else (combined,)))
    written: list[torch.Tensor | int] = [] if offset_parts is None else [projected, offset_parts]
    written += [] if given is None else [given.out]
    written += [12 * rows] if parts is not None else []
    launch(
        "rows", _row_kernel, (row_programs(rows, tile, projected.device),), Cost(read, tuple(written)),
        warps=tile.warps, projected=projected, shift=dummy if folded is None else folded.shift,
        offset=dummy if folded is None else folded.offset,
        mean_in=dummy if statistics is None else statistics[0],
        inverse_std_in=dummy if statistics is None else statistics[1], teacher=teacher,
        combined=dummy if combined is None else combined, teacher_frame=tables.teacher_frame,
        distance=tables.distance, weights=tables.weights, shares=tables.shares,
        parts=dummy if parts is None else parts, slope_out=dummy if slope is None else slope,
        offset_parts=dummy if offset_parts is None else offset_parts,
        gradient=projected if given is None else given.out, scale_in=dummy if given is None else given.scale,
        rows=rows, first_row=chunk.first_row,
        clip_rows=call.rows, start=call.start, frames=call.frames, tokens=call.per_frame, features=features,
        row_stride=projected.stride(0),
        clip_stride=teacher.stride(0), frame_stride=teacher.stride(1), token_stride=teacher.stride(2),
        share_scale=float(call.batch * call.frames), inverse_width=1.0 / call.hidden_size,
        GIVEN=call.given, FOLDED=statistics is not None, MODE=call.neighbour_mode, PARTS=parts is not None,
        GRADIENT=offset_parts is not None or given is not None, MASKED=mask is not None, ROWS=tile.rows,
        COLUMNS=columns, PIECES=ceil_div(features, columns), WHOLE=features // columns,
    )  # fmt: skip
