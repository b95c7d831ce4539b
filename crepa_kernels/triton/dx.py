"""The gradient of raw tokens: one product whose sum starts from LayerNorm's own terms."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Cost, dot_type, launch, narrowed
from .tiles import ProductTile


@triton.jit
def tile_of(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column tile of a program; GROUP row tiles share the columns that are in L2."""
    per_group = GROUP * column_tiles
    first = (program // per_group) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    return first + (program % per_group) % size, (program % per_group) // size


@triton.jit
def _dx_kernel(
    grad, weight, tokens, mean_in, slope_in, scale_in, out, rows, features, width, row_stride,
    DOT: tl.constexpr, MASKED: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP)
    # 64 bits to the tile, 32 within it: half the registers for addresses.
    first_row = row_tile.to(tl.int64) * BLOCK_M
    local = tl.arange(0, BLOCK_M)
    inside = local < rows - first_row
    # Rows past the end repeat the last one: their results are not stored.
    safe = tl.minimum(local, (rows - 1 - first_row).to(tl.int32))
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    there = column < width
    slope = tl.load(slope_in + first_row + safe)
    mean = tl.load(mean_in + first_row + safe)
    source = tokens + first_row * row_stride + (safe[:, None] * row_stride + column[None, :])
    if EVEN_N:
        total = tl.load(source).to(tl.float32)
    else:
        total = tl.load(source, mask=there[None, :], other=0).to(tl.float32)
    total = slope[:, None] * (total - mean[:, None])
    if MASKED:
        # Tokens of a frame outside the loss may hold anything, and their slope is 0.
        total = tl.where(slope[:, None] != 0, total, 0)
    k = tl.arange(0, BLOCK_K)
    left = grad + first_row * features + (safe[:, None] * features + k[None, :])
    right = weight + (k[:, None] * width + column[None, :])
    for first in tl.range(0, features, BLOCK_K):
        near = k < features - first
        if EVEN_K:
            a = tl.load(left)
        else:
            a = tl.load(left, mask=near[None, :], other=0)
        if EVEN_K and EVEN_N:
            b = tl.load(right)
        else:
            b = tl.load(right, mask=near[:, None] & there[None, :], other=0)
        total = tl.dot(a.to(DOT), b.to(DOT), total, input_precision="ieee")
        left += BLOCK_K
        right += BLOCK_K * width
    total = total * tl.load(scale_in)
    target = out + first_row * width + (local[:, None] * width + column[None, :])
    kind = out.dtype.element_ty
    if EVEN_N:
        tl.store(target, narrowed(total, kind), mask=inside[:, None])
    else:
        tl.store(target, narrowed(total, kind), mask=inside[:, None] & there[None, :])


def token_gradient(
    grad: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    mean: torch.Tensor,
    slope: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    tile: ProductTile,
    masked: bool,
) -> None:
    """``out = scale (grad weight + slope (tokens - mean))``.

    Args:
        grad: (rows, E) contiguous, r dp.
        weight: (E, D) contiguous, W' with centred rows, in the type of ``grad``.
        tokens: (rows, D), raw.
        mean: (rows,), with ``slope`` (rows,) what LayerNorm adds.
        scale: one number on the device.
        out: (rows, D) contiguous.
        masked: tokens and means of rows whose ``slope`` is 0 may hold anything, NaN included.
    """
    rows, features = grad.shape
    width = weight.shape[1]
    launch(
        "dx", _dx_kernel, (triton.cdiv(rows, tile.m) * triton.cdiv(width, tile.n),),
        Cost((grad, weight, tokens), (out,), 2 * rows * features * width), warps=tile.warps, stages=tile.stages,
        grad=grad, weight=weight, tokens=tokens, mean_in=mean, slope_in=slope, scale_in=scale, out=out,
        rows=rows, features=features, width=width, row_stride=tokens.stride(0), DOT=dot_type(grad.dtype), MASKED=masked,
        EVEN_K=features % tile.k == 0, EVEN_N=width % tile.n == 0, GROUP=8,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
    )  # fmt: skip
