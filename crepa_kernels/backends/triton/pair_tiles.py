"""Tiles of all pairs of a clip's tokens: how their cosines differ from the teacher's, and what that asks of the rows.

With unit rows Z, Y and D = Z - Y, ``A = Z_f Z_k' - Y_f Y_k' = Y_f D_k' + D_f Z_k'``: both Gram matrices are in one sum,
which one pass over E makes and registers hold. Of a tile of A what is written is phi'(A), a sign of 16 bits a pair, for
``TILE`` pairs at a time; the second kernel multiplies it with Z from both sides, since A is symmetric, and adds what it
finds to the rows' running gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.relation import Tile, tile_size, tiles
from .dx import tile_of
from .launch import Cost, ceil_div, dot_type, launch, narrowed
from .tiles import PairTiles, choose_pair_tiles


@triton.jit
def _differences_kernel(
    left_z, left_d, right_z, right_d, slopes, costs, rows, tokens, features, stride, margin, weight,
    OWN: tl.constexpr, KEEP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK), tl.cdiv(tokens, BLOCK)
    pair = (program // (row_tiles * column_tiles)).to(tl.int64)
    row_tile, column_tile = tile_of(program % (row_tiles * column_tiles), row_tiles, column_tiles, GROUP)
    if OWN and column_tile < row_tile:
        return
    # 64 bits to the tile, 32 within it; rows past the end repeat the last one, and count nothing.
    local = tl.arange(0, BLOCK)
    first_row, first_column = row_tile.to(tl.int64) * BLOCK, column_tile.to(tl.int64) * BLOCK
    row = tl.minimum(local, (rows - 1 - first_row).to(tl.int32))[:, None]
    column = tl.minimum(local, (tokens - 1 - first_column).to(tl.int32))[None, :]
    k = tl.arange(0, BLOCK_K)
    frame = pair * tokens
    row_place = row * features + k[None, :]
    column_place = column * features + k[:, None]
    left_z += (frame + first_row) * features
    left_d += (frame + first_row) * features
    right_z += (frame + first_column) * features
    right_d += (frame + first_column) * features
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in tl.range(0, features, BLOCK_K):
        near = k < features - first
        if EVEN_K:
            z = tl.load(left_z + row_place)
            d = tl.load(left_d + row_place)
            other_z = tl.load(right_z + column_place)
            other_d = tl.load(right_d + column_place)
        else:
            z = tl.load(left_z + row_place, mask=near[None, :], other=0)
            d = tl.load(left_d + row_place, mask=near[None, :], other=0)
            other_z = tl.load(right_z + column_place, mask=near[:, None], other=0)
            other_d = tl.load(right_d + column_place, mask=near[:, None], other=0)
        y = z.to(tl.float32) - d.to(tl.float32)
        total = tl.dot(y.to(DOT), other_d.to(DOT), total, input_precision=PRECISION)
        total = tl.dot(d.to(DOT), other_z.to(DOT), total, input_precision=PRECISION)
        left_z += BLOCK_K
        left_d += BLOCK_K
        right_z += BLOCK_K
        right_d += BLOCK_K

    inside = (local < rows - first_row)[:, None] & (local < tokens - first_column)[None, :]
    excess = tl.abs(total) - margin
    # Not a maximum: NaN is no less than the margin.
    cost = tl.where(inside & ~(excess <= 0), excess, 0.0)
    twice = tl.where(OWN & (column_tile > row_tile), 2.0, 1.0)
    # In one sum: Triton 3.7 fails to compile the sum of a sum for sm_100.
    tl.store(costs + program, tl.sum(tl.reshape(cost, [BLOCK * BLOCK]), axis=0) * weight * twice)
    if KEEP:
        sign = tl.where(total > 0, 1.0, -1.0)
        slope = narrowed(tl.where(cost > 0, sign, cost - cost), slopes.dtype.element_ty)
        slopes += pair * row_tiles * BLOCK * stride
        tl.store(slopes + (first_row + local)[:, None] * stride + (first_column + local)[None, :], slope)
        if OWN and column_tile > row_tile:
            mirrored = slopes + (first_column + local)[:, None] * stride + (first_row + local)[None, :]
            tl.store(mirrored, tl.trans(slope))


@triton.jit
def _gradient_kernel(
    slopes, z, gradient, rows, others, height, tokens, features, stride, scale,
    TRANSPOSED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, EVEN_N: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(features, BLOCK_N)
    pair = (program // (row_tiles * column_tiles)).to(tl.int64)
    row_tile, column_tile = tile_of(program % (row_tiles * column_tiles), row_tiles, column_tiles, GROUP)
    first_row = row_tile.to(tl.int64) * BLOCK_M
    local = tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    there = column < features
    k = tl.arange(0, BLOCK_K)
    slopes += pair * height * stride
    # What a tile of slopes has beyond its rows and columns is 0.
    if TRANSPOSED:
        left = slopes + first_row + (local[:, None] + k[None, :] * stride)
    else:
        left = slopes + first_row * stride + (local[:, None] * stride + k[None, :])
    right = z + pair * tokens * features + (k[:, None] * features + column[None, :])
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(0, others, BLOCK_K):
        near = (k < others - first)[:, None]
        a = tl.load(left)
        if EVEN_N:
            b = tl.load(right, mask=near, other=0)
        else:
            b = tl.load(right, mask=near & there[None, :], other=0)
        total = tl.dot(a.to(DOT), b.to(DOT), total, input_precision=PRECISION)
        if TRANSPOSED:
            left += BLOCK_K * stride
        else:
            left += BLOCK_K
        right += BLOCK_K * features
    place = gradient + (pair * tokens + first_row) * features + (local[:, None] * features + column[None, :])
    keep = (local < rows - first_row)[:, None] & there[None, :]
    tl.store(place, tl.load(place, mask=keep, other=0) + scale * total, mask=keep)


def relate(
    z: Tensor,
    d: Tensor,
    gradient: Tensor | None,
    weights: dict[int, float],
    margin: float,
    slope_scale: float,
    choice: PairTiles | None = None,
) -> Tensor:
    """The sum of w max(|A| - margin, 0) over all pairs of tokens of the pairs of frames of each offset.

    Args:
        z, d: (T, M, E) contiguous, the rows and what they differ from the teacher's by, in fp32, fp16 or bf16.
        gradient: (T, M, E) fp32, to which ``slope_scale`` w phi'(A) Z is added; None: not wanted.
        weights: offset between frames -> w.
        choice: tiles of the products; by the device if not given.

    Returns:
        A scalar in fp32. Every number is summed in one order, by one program.
    """
    frames, tokens = z.shape[:2]
    choice = choice or choose_pair_tiles(z.device, z.dtype)
    block = choice.differences.m
    walk = list(tiles(frames, tokens, weights, tile_size(z), block))
    stride = ceil_div(tokens, block)
    # Of each launch a number of its own a program; they begin where 16 bytes do.
    programs = [(t.left.stop - t.left.start) * ceil_div(t.part.stop - t.part.start, block) * stride for t in walk]
    places = [0]
    for count in programs:
        places.append(places[-1] + ceil_div(count, 4) * 4)
    costs = z.new_zeros(places[-1], dtype=torch.float32)
    room = max(programs, default=0) * block**2 if gradient is not None else 0
    slopes = z.new_empty(room, dtype=torch.bfloat16 if z.dtype == torch.float32 else z.dtype)
    for tile, place, count in zip(walk, places, programs, strict=False):
        _differences(z, d, slopes, costs[place : place + count], tile, margin, stride * block, choice)
        if gradient is not None:
            scale = slope_scale * tile.weight
            _add_gradient(z[tile.right], slopes, gradient[tile.left, tile.part], tile, scale, False, choice)
            if not tile.own:
                _add_gradient(z[tile.left, tile.part], slopes, gradient[tile.right], tile, scale, True, choice)
    return costs.sum()


def _precision(z: Tensor) -> str:
    """Of products of fp32, as PyTorch has them."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.version.hip is None
    return "tf32" if tf32 and z.dtype == torch.float32 else "ieee"


def _differences(
    z: Tensor, d: Tensor, slopes: Tensor, costs: Tensor, tile: Tile, margin: float, stride: int, choice: PairTiles
) -> None:
    left, right, part, weight = tile
    product, (_, tokens, features) = choice.differences, z.shape
    rows, whole = part.stop - part.start, part == slice(0, tokens)
    # A frame's own tile is symmetric where it is whole.
    written = slopes.element_size() * costs.numel() * product.m**2 if slopes.numel() else 0
    pairs = (left.stop - left.start) * rows * (rows + product.m if tile.own and whole else 2 * tokens) // 2
    launch(
        "differences", _differences_kernel, (costs.numel(),),
        Cost((z[left, part], d[left, part], z[right], d[right]), (costs, written), 4 * pairs * features),
        warps=product.warps, stages=product.stages,
        left_z=z[left, part], left_d=d[left, part], right_z=z[right], right_d=d[right], slopes=slopes, costs=costs,
        rows=rows, tokens=tokens, features=features, stride=stride, margin=float(margin),
        weight=weight * (1 if tile.own else 2), OWN=tile.own and whole, KEEP=slopes.numel() > 0,
        DOT=dot_type(z.dtype), PRECISION=_precision(z), EVEN_K=features % product.k == 0, GROUP=8, BLOCK=product.m,
        BLOCK_K=product.k,
    )  # fmt: skip


def _add_gradient(
    z: Tensor, slopes: Tensor, gradient: Tensor, tile: Tile, scale: float, transposed: bool, choice: PairTiles
) -> None:
    """Adds ``scale`` times the slopes (their transpose) of each pair of frames, times z, to ``gradient``."""
    product, block = choice.gradient, choice.differences.m
    count, rows, features = gradient.shape
    part, others = tile.part.stop - tile.part.start, z.shape[1]
    height, stride = ceil_div(part, block) * block, ceil_div(rows if transposed else others, block) * block
    read = slopes.element_size() * count * rows * others
    arguments: dict[str, Any] = {"tokens": gradient.stride(0) // features, "features": features, "stride": stride}
    launch(
        "relation_gradient", _gradient_kernel,
        (count * ceil_div(rows, product.m) * ceil_div(features, product.n),),
        Cost((read, z, gradient), (gradient,), 2 * count * rows * others * features), warps=product.warps,
        stages=product.stages, slopes=slopes, z=z, gradient=gradient, rows=rows, others=others, height=height,
        scale=scale, **arguments, TRANSPOSED=transposed, DOT=dot_type(z.dtype), PRECISION=_precision(z),
        EVEN_N=features % product.n == 0, GROUP=8, BLOCK_M=product.m, BLOCK_N=product.n, BLOCK_K=product.k,
    )  # fmt: skip
