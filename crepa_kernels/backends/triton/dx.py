"""The gradient of raw tokens: one product whose sum starts from LayerNorm's own terms.

Either a Triton product, whose accumulator starts from them, or the vendor library's, added to a pass that writes them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .call import Call
from .launch import Cost, ceil_div, dot_type, launch, narrowed, product, split_width
from .projector import fold_projector
from .tiles import VENDOR, ProductTile


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
    scale = tl.load(scale_in)
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
    total = total * scale
    target = out + first_row * width + (local[:, None] * width + column[None, :])
    kind = out.dtype.element_ty
    if EVEN_N:
        tl.store(target, narrowed(total, kind), mask=inside[:, None])
    else:
        tl.store(target, narrowed(total, kind), mask=inside[:, None] & there[None, :])


@triton.jit
def _layer_norm_term_kernel(
    tokens, mean_in, slope_in, scale_in, out, rows, width, row_stride,
    MASKED: tl.constexpr, ROWS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    slope = tl.load(slope_in + row, mask=inside, other=0)
    mean = tl.load(mean_in + row, mask=inside, other=0)[:, None]
    factor = (slope * tl.load(scale_in))[:, None]
    source = tokens + row[:, None] * row_stride
    target = out + row[:, None] * width
    kind = out.dtype.element_ty
    column = tl.arange(0, LO)[None, :]
    low = factor * (tl.load(source + column, mask=inside[:, None], other=0).to(tl.float32) - mean)
    if HI > 0:
        tail = LO + tl.arange(0, HI)[None, :]
        there = inside[:, None] & (tail < width)
        high = factor * (tl.load(source + tail, mask=there, other=0).to(tl.float32) - mean)
    if MASKED:
        # As above: what a frame outside the loss holds does not count.
        low = tl.where(slope[:, None] != 0, low, 0)
        if HI > 0:
            high = tl.where(slope[:, None] != 0, high, 0)
    tl.store(target + column, narrowed(low, kind), mask=inside[:, None])
    if HI > 0:
        tl.store(target + tail, narrowed(high, kind), mask=there)


def scaled_weight(call: Call, folded: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight that ``token_gradient`` multiplies: ``folded`` (E, D), or for the vendor's product ``scale`` times it.

    ``addmm`` takes no factor from the device, and one read by the host would wait for it. The scaled weight is made
    from the projector's own and rounded once, so it is as exact as ``folded``.
    """
    return fold_projector(call, scale).weight if call.choice.dx == VENDOR else folded


def token_gradient(
    call: Call,
    grad: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    mean: torch.Tensor,
    slope: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """``out = scale (grad W'' + slope (tokens - mean))``.

    Args:
        call: its choice; with a mask, tokens and means of rows whose ``slope`` is 0 may hold anything, NaN included.
        grad: (rows, E) contiguous, r dp.
        weight: (E, D) contiguous, ``scaled_weight`` of W'', the folded weight with centred rows, in the type of
            ``grad``.
        tokens: (rows, D), raw.
        mean: (rows,), with ``slope`` (rows,) what LayerNorm adds.
        scale: one number on the device.
        out: (rows, D) contiguous; in the type of ``grad`` where the product is the vendor's.
    """
    rows, features = grad.shape
    width = weight.shape[1]
    shared: dict[str, Any] = {
        "tokens": tokens, "mean_in": mean, "slope_in": slope, "scale_in": scale, "out": out, "rows": rows,
        "width": width, "row_stride": tokens.stride(0), "MASKED": call.mask is not None,
    }  # fmt: skip
    tile = call.choice.dx
    if not isinstance(tile, ProductTile):
        row_tile, (low, high) = call.choice.tokens, split_width(width)
        launch(
            "layer_norm_term", _layer_norm_term_kernel, (ceil_div(rows, row_tile.rows),), Cost((tokens,), (out,)),
            warps=row_tile.warps, **shared, ROWS=row_tile.rows, LO=low, HI=high,
        )  # fmt: skip
        product("dx", grad, weight, out=out, add=True)
        return
    launch(
        "dx", _dx_kernel, (ceil_div(rows, tile.m) * ceil_div(width, tile.n),),
        Cost((grad, weight, tokens), (out,), 2 * rows * features * width), warps=tile.warps, stages=tile.stages,
        grad=grad, weight=weight, features=features, **shared, DOT=dot_type(grad.dtype),
        EVEN_K=features % tile.k == 0, EVEN_N=width % tile.n == 0, GROUP=8,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
    )  # fmt: skip
