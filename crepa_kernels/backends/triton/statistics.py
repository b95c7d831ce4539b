"""Passes over tokens of width D: mean and 1/std, the normalised tokens, and LayerNorm's backward pass."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .call import Call
from .launch import Cost, ceil_div, launch, narrowed, split_width


@triton.jit
def in_loss(mask, row, inside, per_clip, start, per_frame, frames, MASKED: tl.constexpr):
    """Whether each row exists and its frame is in the loss: row r is token ``start + r % per_clip`` of its clip."""
    if MASKED:
        frame = (row // per_clip) * frames + (row % per_clip + start) // per_frame
        inside = inside & (tl.load(mask + frame, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _statistics_kernel(
    tokens, mean_out, inverse_std_out, normalized, mask,
    rows, width, row_stride, eps, first, per_clip, start, per_frame, frames,
    MASKED: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, LO)[None, :]
    low = tl.load(tokens + row[:, None] * row_stride + column, mask=inside[:, None], other=0).to(tl.float32)
    total = tl.sum(low, axis=1)
    if HI > 0:
        tail = LO + tl.arange(0, HI)[None, :]
        there = inside[:, None] & (tail < width)
        high = tl.load(tokens + row[:, None] * row_stride + tail, mask=there, other=0).to(tl.float32)
        total += tl.sum(high, axis=1)
    mean = total / width
    low = low - mean[:, None]
    if HI > 0:
        high = tl.where(there, high - mean[:, None], 0)
    if NORMALIZE:
        # A large mean is rounded to more than the tokens spread: what is left of it shows once it is off.
        left = tl.sum(low, axis=1)
        if HI > 0:
            left += tl.sum(high, axis=1)
        left = left / width
        mean += left
        low = low - left[:, None]
        if HI > 0:
            high = tl.where(there, high - left[:, None], 0)
    squares = tl.sum(low * low, axis=1)
    if HI > 0:
        squares += tl.sum(high * high, axis=1)
    # NaN where the variance overflowed, whose row would be zeros.
    inverse_std = 1 / tl.sqrt(squares / width + eps) + (squares - squares)
    tl.store(mean_out + row, mean, mask=inside)
    tl.store(inverse_std_out + row, inverse_std, mask=inside)
    if NORMALIZE:
        keep = in_loss(mask, first + row, inside, per_clip, start, per_frame, frames, MASKED)
        out = normalized.dtype.element_ty
        low = tl.where(keep[:, None], low * inverse_std[:, None], 0)
        tl.store(normalized + row[:, None] * width + column, narrowed(low, out), mask=inside[:, None])
        if HI > 0:
            high = tl.where(keep[:, None], high * inverse_std[:, None], 0)
            tl.store(normalized + row[:, None] * width + tail, narrowed(high, out), mask=there)


def _frame_arguments(call: Call, first: int, dummy: torch.Tensor) -> dict[str, Any]:
    """What ``in_loss`` takes, for rows from ``first`` on of the hidden states."""
    mask = call.mask
    return {
        "mask": dummy if mask is None else mask, "first": first, "per_clip": call.tokens.shape[1], "start": call.start,
        "per_frame": call.student_per_frame, "frames": call.frames, "MASKED": mask is not None,
    }  # fmt: skip


def token_statistics(
    call: Call,
    tokens: torch.Tensor,
    first: int,
    mean: torch.Tensor,
    inverse_std: torch.Tensor,
    normalized: torch.Tensor | None = None,
) -> None:
    """mean and 1/std of each row of ``tokens`` (rows, D), and (h - mean)/std into ``normalised`` if given.

    The tokens are the call's rows from ``first`` on. Normalised rows of frames outside the loss are 0, whatever the
    tokens hold.
    """
    rows, width = tokens.shape
    tile, (low, high) = call.choice.tokens, split_width(width)
    written = (mean, inverse_std) if normalized is None else (mean, inverse_std, normalized)
    launch(
        "statistics", _statistics_kernel, (ceil_div(rows, tile.rows),), Cost((tokens,), written),
        warps=tile.warps, tokens=tokens, mean_out=mean, inverse_std_out=inverse_std,
        normalized=mean if normalized is None else normalized, rows=rows, width=width, row_stride=tokens.stride(0),
        eps=call.eps, **_frame_arguments(call, first, mean), NORMALIZE=normalized is not None, ROWS=tile.rows,
        LO=low, HI=high,
    )  # fmt: skip


@triton.jit
def _layer_norm_backward_kernel(
    tokens, grad, mean_in, inverse_std_in, scale_in, out, mask,
    rows, width, row_stride, repeat, share, first, per_clip, start, per_frame, frames,
    MASKED: tl.constexpr, ROWS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    keep = in_loss(mask, first + row, inside, per_clip, start, per_frame, frames, MASKED)
    mean = tl.load(mean_in + row, mask=keep, other=0)
    inverse_std = tl.load(inverse_std_in + row, mask=keep, other=0)
    scale = tl.load(scale_in) * share
    source = grad + (row // repeat)[:, None] * width
    column = tl.arange(0, LO)[None, :]
    low_there = keep[:, None]
    low = tl.load(tokens + row[:, None] * row_stride + column, mask=low_there, other=0).to(tl.float32)
    low = tl.where(low_there, (low - mean[:, None]) * inverse_std[:, None], 0)
    low_grad = tl.load(source + column, mask=low_there, other=0).to(tl.float32)
    total = tl.sum(low_grad, axis=1)
    along = tl.sum(low_grad * low, axis=1)
    if HI > 0:
        tail = LO + tl.arange(0, HI)[None, :]
        there = keep[:, None] & (tail < width)
        high = tl.load(tokens + row[:, None] * row_stride + tail, mask=there, other=0).to(tl.float32)
        high = tl.where(there, (high - mean[:, None]) * inverse_std[:, None], 0)
        high_grad = tl.load(source + tail, mask=there, other=0).to(tl.float32)
        total += tl.sum(high_grad, axis=1)
        along += tl.sum(high_grad * high, axis=1)
    total = (total / width)[:, None]
    along = (along / width)[:, None]
    factor = (inverse_std * scale)[:, None]
    kind = out.dtype.element_ty
    low = factor * (low_grad - total - low * along)
    tl.store(out + row[:, None] * width + column, narrowed(low, kind), mask=inside[:, None])
    if HI > 0:
        high = factor * (high_grad - total - high * along)
        tl.store(out + row[:, None] * width + tail, narrowed(high, kind), mask=inside[:, None] & (tail < width))


def layer_norm_backward(
    call: Call,
    tokens: torch.Tensor,
    first: int,
    grad: torch.Tensor,
    mean: torch.Tensor,
    inverse_std: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    repeat: int = 1,
) -> None:
    """``out = scale (dx - mean(dx) - x mean(dx x)) / std`` by rows, 0 for frames outside the loss.

    Args:
        call: its options.
        tokens: (rows, D), the call's rows from ``first`` on.
        grad: (rows / repeat, D), dx; with ``repeat`` tokens averaged into one it is that one's, shared equally.
        mean: (rows,), with ``inverse_std`` (rows,) LayerNorm's statistics.
        scale: one number on the device.
        out: (rows, D) contiguous, in the type of the hidden states; may be ``grad``.
    """
    rows, width = tokens.shape
    tile, (low, high) = call.choice.tokens, split_width(width)
    launch(
        "layer_norm_backward", _layer_norm_backward_kernel, (ceil_div(rows, tile.rows),),
        Cost((tokens, grad), (out,)), warps=tile.warps,
        tokens=tokens, grad=grad, mean_in=mean, inverse_std_in=inverse_std, scale_in=scale, out=out,
        rows=rows, width=width, row_stride=tokens.stride(0), repeat=repeat, share=1.0 / repeat,
        **_frame_arguments(call, first, mean), ROWS=tile.rows, LO=low, HI=high,
    )  # fmt: skip
