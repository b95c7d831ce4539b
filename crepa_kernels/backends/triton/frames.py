"""Numbers per frame: neighbour weights and each frame's share before the tokens are read, loss and metrics after."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...ops.rows import NORM_FLOOR
from .call import Call, mask_bytes
from .launch import Cost, launch, power_of_2

FLOOR = tl.constexpr(NORM_FLOOR)


@triton.jit
def inverse_norm(squares):
    """1 / max(norm, 1e-12) of rows from their sums of squares; NaN where those overflow: the row would be zeros."""
    return tl.fma(squares, 0.0, tl.rsqrt(tl.maximum(squares, FLOOR * FLOOR)))


class FrameTables(NamedTuple):
    """What the kernels look up per frame.

    Attributes:
        teacher_frame: (B, T) int32, the teacher frame of each student frame.
        distance: (B,) int32, d clamped to the clip's existing teacher frames - 1.
        weights: (B, T, T) fp32 over (clip, student frame f, teacher frame k): 1 at k = f, w(|k - f|) at neighbours, 0
            elsewhere and where k does not exist; NaN at k whose ``frame_index`` lies outside the teacher's frames.
        shares: (B, T, 4) fp32, what a frame's total counts in -loss, in ``similarity`` and in ``alignment_score``, and
            its own similarity in ``self_similarity``; 0 outside the loss.
    """

    teacher_frame: torch.Tensor
    distance: torch.Tensor
    weights: torch.Tensor
    shares: torch.Tensor


@triton.jit
def _tables_kernel(
    frame_index, frame_mask, teacher_mask, teacher_frame, distance_out, weights, shares,
    batch, frames, teacher_frames, distance, tau,
    HAS_INDEX: tl.constexpr, MASKED: tl.constexpr, TEACHER_MASKED: tl.constexpr, CUMULATIVE: tl.constexpr,
    NORMALIZE_SUM: tl.constexpr, BY_FRAMES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    clip = pair // frames
    f = pair % frames
    k = tl.arange(0, BLOCK)
    there = k < frames
    exists = there
    reach = tl.minimum(distance, frames - 1)
    if TEACHER_MASKED:
        exists = tl.load(teacher_mask + clip * frames + k, mask=there, other=0) != 0
        reach = tl.minimum(distance, tl.maximum(tl.sum(exists.to(tl.int32), axis=0) - 1, 0))
    index = k
    known = there
    if HAS_INDEX:
        index = tl.load(frame_index + clip * frames + k, mask=there, other=0).to(tl.int32)
        known = (index >= 0) & (index < teacher_frames)
        index = tl.minimum(tl.maximum(index, 0), teacher_frames - 1)
    offset = tl.where(k > f, k - f, f - k)
    if CUMULATIVE:
        chosen = offset <= reach
    else:
        chosen = offset == reach
    weight = tl.where(chosen & (offset > 0) & exists, tl.exp(-offset.to(tl.float32) / tau), 0.0)
    divisor = 1 + tl.sum(weight, axis=0)
    weight = tl.where((k == f) & exists, 1.0, weight)
    weight = tl.where(known | (weight == 0), weight, float("nan"))
    tl.store(weights + pair.to(tl.int64) * frames + k, weight, mask=there)

    counted = 1.0
    per_clip = 1.0 * frames
    all_frames = 1.0 * batch * frames
    clips = 1.0 * batch
    if MASKED:
        counted = tl.load(frame_mask + pair).to(tl.float32)
        per_clip = 0.0
        all_frames = 0.0
        clips = 0.0
        for other in range(batch):
            in_clip = tl.sum(tl.load(frame_mask + other * frames + k, mask=there, other=0).to(tl.float32), axis=0)
            all_frames += in_clip
            clips += tl.where(in_clip > 0, 1.0, 0.0)
            per_clip += tl.where(other == clip, in_clip, 0.0)
    share = counted / tl.maximum(all_frames, 1.0)
    in_loss = counted / tl.maximum(clips, 1.0)
    if BY_FRAMES:
        in_loss = in_loss / tl.maximum(per_clip, 1.0)
    in_score = share
    if NORMALIZE_SUM:
        in_loss = in_loss / divisor
        in_score = share / divisor
    tl.store(shares + pair * 4, in_loss)
    tl.store(shares + pair * 4 + 1, share / divisor)
    tl.store(shares + pair * 4 + 2, in_score)
    tl.store(shares + pair * 4 + 3, share)
    if f == 0:
        tl.store(teacher_frame + pair + k, index, mask=there)
        tl.store(distance_out + clip, reach)


def frame_tables(call: Call) -> FrameTables:
    """The tables of one call, from its index and masks.

    One launch, although ``Neighbours.weights`` and ``plan_reduction`` say the same: as operators of PyTorch those two
    are 17 kernels, 30 with masks, and the rest of a step has 11 launches.
    """
    device, batch, frames = call.tokens.device, call.batch, call.frames

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    index = None if call.frame_index is None else call.frame_index.contiguous()
    exists = None if call.teacher_mask is None else mask_bytes(call.teacher_mask)
    mask = call.mask
    tables = FrameTables(
        new(batch, frames, dtype=torch.int32), new(batch, dtype=torch.int32), new(batch, frames, frames),
        new(batch, frames, 4),
    )  # fmt: skip
    dummy = tables.distance
    launch(
        "frame_tables", _tables_kernel, (batch * frames,), Cost((), tables), warps=1,
        frame_index=dummy if index is None else index, frame_mask=dummy if mask is None else mask,
        teacher_mask=dummy if exists is None else exists, teacher_frame=tables.teacher_frame,
        distance_out=tables.distance, weights=tables.weights, shares=tables.shares, batch=batch, frames=frames,
        teacher_frames=call.teacher_frames, distance=call.reach, tau=call.tau,
        HAS_INDEX=index is not None, MASKED=mask is not None, TEACHER_MASKED=exists is not None,
        CUMULATIVE=call.cumulative, NORMALIZE_SUM=call.normalize_sum, BY_FRAMES=call.by_frames,
        BLOCK=power_of_2(frames),
    )  # fmt: skip
    return tables


@triton.jit
def _frame_means_kernel(
    parts, mask, own_out, total_out, rows, start, frames, tokens, part_count,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    clip = pair // frames
    f = pair % frames
    first = tl.maximum(f * tokens - start, 0)
    stop = tl.minimum((f + 1) * tokens - start, rows)
    own = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    part = tl.arange(0, PARTS)[None, :]
    for block in tl.range(first, stop, BLOCK):
        row = block + tl.arange(0, BLOCK)
        place = ((clip.to(tl.int64) * rows + row)[:, None] * part_count + part) * 3
        keep = (row < stop)[:, None] & (part < part_count)
        squares = tl.sum(tl.load(parts + place, mask=keep, other=0), axis=1)
        along = tl.sum(tl.load(parts + place + 1, mask=keep, other=0), axis=1)
        along_own = tl.sum(tl.load(parts + place + 2, mask=keep, other=0), axis=1)
        inverse = 1 / tl.maximum(tl.sqrt(squares), FLOOR) + (squares - squares)
        total += along * inverse
        own += along_own * inverse
    own_mean = tl.sum(own, axis=0) / tokens
    total_mean = tl.sum(total, axis=0) / tokens
    if MASKED:
        counted = tl.load(mask + pair) != 0
        own_mean = tl.where(counted, own_mean, 0.0)
        total_mean = tl.where(counted, total_mean, 0.0)
    tl.store(own_out + pair, own_mean)
    tl.store(total_out + pair, total_mean)


@triton.jit
def _finish_kernel(own_in, total_in, shares, loss_out, metrics, count, BLOCK: tl.constexpr):
    loss = tl.zeros([BLOCK], tl.float32)
    similarity = tl.zeros([BLOCK], tl.float32)
    score = tl.zeros([BLOCK], tl.float32)
    self_similarity = tl.zeros([BLOCK], tl.float32)
    for block in tl.range(0, count, BLOCK):
        pair = block + tl.arange(0, BLOCK)
        there = pair < count
        own = tl.load(own_in + pair, mask=there, other=0)
        total = tl.load(total_in + pair, mask=there, other=0)
        loss -= total * tl.load(shares + pair * 4, mask=there, other=0)
        similarity += total * tl.load(shares + pair * 4 + 1, mask=there, other=0)
        score += total * tl.load(shares + pair * 4 + 2, mask=there, other=0)
        self_similarity += own * tl.load(shares + pair * 4 + 3, mask=there, other=0)
    tl.store(loss_out, tl.sum(loss, axis=0))
    tl.store(metrics, tl.sum(similarity, axis=0))
    tl.store(metrics + 1, tl.sum(self_similarity, axis=0))
    tl.store(metrics + 2, tl.sum(score, axis=0))


def finish(parts: torch.Tensor, call: Call, tables: FrameTables) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per-frame means of the tokens' cosines, then their sums over frames; the same order at every run.

    Args:
        parts: (rows, n, 3) fp32: a row's p.p, p.z and p.y over n column tiles.

    Returns:
        loss, a scalar; (3,): similarity, self_similarity, alignment_score; frame_similarity (B, T).
    """
    batch, frames, count, mask = call.batch, call.frames, parts.shape[1], call.mask
    own = parts.new_empty((batch, frames))
    total = torch.empty_like(own)
    launch(
        "frame_means", _frame_means_kernel, (batch * frames,), Cost((parts,), (own, total)),
        parts=parts, mask=own if mask is None else mask, own_out=own, total_out=total, rows=call.rows,
        start=call.start, frames=frames, tokens=call.per_frame, part_count=count, MASKED=mask is not None,
        BLOCK=256, PARTS=power_of_2(count),
    )  # fmt: skip
    loss, metrics = parts.new_empty(()), parts.new_empty(3)
    launch(
        "finish", _finish_kernel, (1,), Cost((own, total, tables.shares), (loss, metrics)),
        own_in=own, total_in=total, shares=tables.shares, loss_out=loss, metrics=metrics, count=batch * frames,
        BLOCK=256,
    )  # fmt: skip
    return loss, metrics, own
