"""The teacher's side: inverse norms of its rows, and all neighbours of a frame combined into one row per token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .call import Call
from .chunks import RowChunk
from .frames import FLOOR, FrameTables
from .launch import INTERPRETED, Cost, ceil_div, launch, narrowed, power_of_2, split_width


@triton.jit
def _inverse_norms_kernel(
    teacher, out, rows, tokens, frames, features, frame_stride, clip_stride, token_stride,
    ROWS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    frame = row // tokens
    source = (frame // frames) * clip_stride + (frame % frames) * frame_stride + (row % tokens) * token_stride
    low = tl.load(teacher + source[:, None] + tl.arange(0, LO)[None, :], mask=inside[:, None], other=0).to(tl.float32)
    squares = tl.sum(low * low, axis=1)
    if HI > 0:
        tail = LO + tl.arange(0, HI)[None, :]
        keep = inside[:, None] & (tail < features)
        high = tl.load(teacher + source[:, None] + tail, mask=keep, other=0).to(tl.float32)
        squares += tl.sum(high * high, axis=1)
    # NaN where the norm overflowed, whose row would be zeros.
    tl.store(out + row, 1 / tl.maximum(tl.sqrt(squares), FLOOR) + (squares - squares), mask=inside)


def inverse_norms(teacher: torch.Tensor) -> torch.Tensor:
    """1 / max(norm, 1e-12) of every row of ``teacher`` (B, S, M, E): (B, S, M) fp32."""
    batch, frames, tokens, features = teacher.shape
    out = teacher.new_empty((batch, frames, tokens), dtype=torch.float32)
    low, high = split_width(features)
    # So that each lane, of up to 64 a warp, has 16 bytes to load at a time.
    warps, rows = (2 if low >= 1024 else 1), (16 if INTERPRETED else max(1, 512 // low))
    launch(
        "teacher_norms", _inverse_norms_kernel, (ceil_div(out.numel(), rows),), Cost((teacher,), (out,)),
        warps=warps, teacher=teacher, out=out, rows=out.numel(), tokens=tokens, frames=frames, features=features,
        clip_stride=teacher.stride(0), frame_stride=teacher.stride(1), token_stride=teacher.stride(2),
        ROWS=rows, LO=low, HI=high,
    )  # fmt: skip
    return out


@triton.jit
def near_frames(table, counted, k, highest, clip_frames):
    """Of student frames f and k below ``highest``: weights (f, k), which k some f weighs, and their teacher frames.

    A frame that nothing weighs may hold anything.
    """
    there = k < highest
    weight = tl.load(table[:, None] + k[None, :], mask=counted[:, None] & there[None, :], other=0)
    near = there & (tl.max((weight != 0).to(tl.int32), axis=0) != 0)
    return weight, near, tl.load(clip_frames + k, mask=near, other=0).to(tl.int64)


@triton.jit
def _combine_kernel(
    teacher, norms, teacher_frame, weights, combined,
    first_clip, first_frame, last_frame, first_row, chunk_rows, clip_rows, start, frames, teacher_frames, tokens,
    features, reach, clip_stride, frame_stride, token_stride,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    clip = first_clip + tl.program_id(2)
    tile = first_frame + tl.program_id(1) * BLOCK_T
    f = tile + tl.arange(0, BLOCK_T)
    lowest = tl.maximum(tile - reach, 0)
    highest = tl.minimum(tl.minimum(tile + BLOCK_T, last_frame) + reach, frames)
    place = f * tokens + token - start
    row = clip.to(tl.int64) * clip_rows + place - first_row
    keep_row = (f < last_frame) & (place >= 0) & (place < clip_rows) & (row >= 0) & (row < chunk_rows)
    base = teacher + clip.to(tl.int64) * clip_stride + token * token_stride
    table = weights + (clip * frames + f).to(tl.int64) * frames
    clip_norms = norms + clip.to(tl.int64) * teacher_frames * tokens + token
    for column_start in tl.range(0, features, BLOCK_E):
        column = column_start + tl.arange(0, BLOCK_E)
        total = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        for frame_start in tl.range(lowest, highest, BLOCK_T):
            k = frame_start + tl.arange(0, BLOCK_T)
            weight, near, frame = near_frames(table, f < last_frame, k, highest, teacher_frame + clip * frames)
            inverse = tl.load(clip_norms + frame * tokens, mask=near, other=0)
            keep = near[:, None] & (column < features)[None, :]
            near_rows = base + (frame * frame_stride)[:, None] + column[None, :]
            rows = tl.load(near_rows, mask=keep, other=0).to(tl.float32)
            total = tl.dot(weight, rows * inverse[:, None], total, input_precision=PRECISION)
        out = combined + row[:, None] * features + column[None, :]
        keep_out = keep_row[:, None] & (column < features)[None, :]
        tl.store(out, narrowed(total, combined.dtype.element_ty), mask=keep_out)


def combine_neighbours(call: Call, norms: torch.Tensor, tables: FrameTables, chunk: RowChunk) -> torch.Tensor:
    """z[f] = sum over k of w[f, k] unit(y[k]), own frame included, for the rows of ``chunk``: (rows, E).

    It is in the products' type. ``norms`` (B, S, M): inverse norms of the teacher's rows.
    """
    teacher, features = call.teacher, call.feature_size
    combined = teacher.new_empty((chunk.rows, features), dtype=call.compute_dtype)
    chunk_frames = chunk.last_frame - chunk.first_frame
    block = 16 if chunk_frames <= 16 else 32
    launch(
        "combine", _combine_kernel, (call.per_frame, ceil_div(chunk_frames, block), chunk.clips),
        Cost((teacher,), (combined,)), teacher=teacher, norms=norms,
        teacher_frame=tables.teacher_frame, weights=tables.weights, combined=combined, first_clip=chunk.first_clip,
        first_frame=chunk.first_frame, last_frame=chunk.last_frame, first_row=chunk.first_row, chunk_rows=chunk.rows,
        clip_rows=call.rows, start=call.start, frames=call.frames, teacher_frames=call.teacher_frames,
        tokens=call.per_frame, features=features, reach=call.reach,
        clip_stride=teacher.stride(0), frame_stride=teacher.stride(1), token_stride=teacher.stride(2),
        BLOCK_T=block, BLOCK_E=max(16, min(128, power_of_2(features))),
        PRECISION=precision(teacher.device),
    )  # fmt: skip
    return combined


def precision(device: torch.device) -> str:
    """Of products with fp32 weights: three products of 10-bit parts where a GPU has those, exact to about 21 bits."""
    nvidia = device.type != "cpu" and torch.version.hip is None
    return "tf32x3" if nvidia and not INTERPRETED else "ieee"
