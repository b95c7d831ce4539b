"""``crepa_kernels::align_rows`` and its backward, ``normalize_rows``: what the ``torch`` backend does to rows.

The kernels are the C++ extension's on a CPU where it is there; what is here in PyTorch runs everywhere else.
Equations, for row p of token m of student frame f, y its teacher rows and ŷ = y / max(|y|, 1e-12)::

    z = ŷ[f] + sum_k w[f, k] ŷ[k]           total = <p, z> / max(|p|, 1e-12),   own = <p, ŷ[f]> / max(|p|, 1e-12)
    q = z - (<p, z> / |p|^2) p              or q = z where |p| is below the floor
    g = q grad[f] / (M max(|p|, 1e-12))     the gradient of p
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .namespace import add_op_namespace_prefix, ops
from .register import define, keeps_type
from .resample import HALF_TYPES

NORM_FLOOR = 1e-12

Rows = tuple[Tensor, Tensor, Tensor, Tensor]

define(
    "align_rows",
    "(Tensor projected, Tensor? mean, Tensor? inverse_std, Tensor? row_sums, Tensor? offset, Tensor[] teacher, "
    "int base, Tensor weights, int first, int[] offsets, int start, int stop, Tensor(a!) q) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
define(
    "align_rows_backward",
    "(Tensor q, Tensor grad, Tensor inverse_norm, Tensor q_dot_p, Tensor? offset, Tensor inverse_std, int width, "
    "Tensor(a!) g, Tensor(b!) scaled, Tensor(c!) along, Tensor(d!) sum) -> ()",
)
define("layer_norm_rows", "(Tensor tokens, float eps, bool normalised) -> (Tensor, Tensor, Tensor, Tensor)")
define("normalize_rows", "(Tensor tokens, Tensor mean, Tensor low, Tensor inverse_std, Tensor(a!) out) -> ()")
for _name in ("align_rows", "align_rows_backward", "layer_norm_rows", "normalize_rows"):
    keeps_type(_name)
align_rows_op = ops.align_rows.default
align_rows_backward_op = ops.align_rows_backward.default
layer_norm_rows_op = ops.layer_norm_rows.default
normalize_rows_op = ops.normalize_rows.default


@torch.library.impl(add_op_namespace_prefix("align_rows"), "CompositeExplicitAutograd")
def _align_rows(
    projected: Tensor,
    mean: Tensor | None,
    inverse_std: Tensor | None,
    row_sums: Tensor | None,
    offset: Tensor | None,
    teacher: Sequence[Tensor],
    base: int,
    weights: Tensor,
    first: int,
    offsets: Sequence[int],
    start: int,
    stop: int,
    q: Tensor,
) -> Rows:
    """Rows of frames first, first + 1, ... of a clip: p = (projected - mean row_sums) inverse_std + offset.

    Args:
        projected: (F x M, E), in the products' type.
        mean, inverse_std, row_sums: (F x M,), (F x M,), (E,) of tokens that were projected before they were
            normalised; all None where they were not.
        offset: (E,) or None.
        teacher: (M, E) of the clip's frames base, base + 1, ...
        weights: (T, T), w[f, k] of the clip's frames; 0 where k is no neighbour of f or does not exist.
        offsets: k - f of all neighbours, negative ones as well.
        start, stop: rows outside are not in the loss: zeros.
        q: (F x M, E), written; or empty.

    Returns:
        own, total, 1 / max(|p|, floor) and <q, p>, each (F x M,) in fp32 (fp64 for fp64).
    """
    tokens, accum_dtype = teacher[0].shape[0], weights.dtype
    p = unfolded_rows(projected.to(accum_dtype), mean, inverse_std, row_sums, offset)
    unit = [_unit(frame.to(accum_dtype)) for frame in teacher]
    frames = range(first, first + len(p) // tokens)
    y = torch.cat([unit[frame - base] for frame in frames])
    z = y if not offsets else y.clone()
    for frame, rows in zip(frames, z.split(tokens), strict=True):
        for offset_ in offsets:
            if 0 <= frame + offset_ < weights.shape[0]:
                rows.addcmul_(unit[frame + offset_ - base], weights[frame, frame + offset_])
    if (start, stop) != (0, len(p)):
        row = torch.arange(len(p), device=p.device)
        inside = ((row >= start) & (row < stop))[:, None]
        y, z = y.where(inside, 0), z.where(inside, 0)
    norm = torch.linalg.vector_norm(p, dim=-1)
    inverse = floored_norm(norm).reciprocal_()
    scratch = torch.mul(p, z)
    total = scratch.sum(dim=-1).mul_(inverse)
    own = torch.mul(p, y, out=scratch).sum(dim=-1).mul_(inverse)
    floored = norm <= NORM_FLOOR
    if q.numel():
        along = (total * inverse).where(~floored, 0)
        torch.addcmul(z, p, along[:, None], value=-1, out=q)
    return own, total, inverse, (total / inverse).where(floored, 0)


def unfolded_rows(
    projected: Tensor,
    mean: Tensor | None,
    inverse_std: Tensor | None,
    row_sums: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """p (rows, E) of ``projected`` tokens, which may have been projected before they were normalised."""
    p = projected
    if mean is not None and inverse_std is not None and row_sums is not None:
        p = torch.addr(p, mean, row_sums, alpha=-1) * inverse_std[:, None]
    return p if offset is None else p + offset


def _unit(rows: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / floored_norm(norm)


def floored_norm(norm: Tensor) -> Tensor:
    """max(norm, 1e-12), NaN where it overflowed, which would make a row of zeros."""
    return norm.clamp_min(NORM_FLOOR).where(norm < math.inf, math.nan)


@torch.library.register_fake(add_op_namespace_prefix("align_rows"))
def _align_rows_fake(
    projected: Tensor,
    mean: Tensor | None,
    inverse_std: Tensor | None,
    row_sums: Tensor | None,
    offset: Tensor | None,
    teacher: Sequence[Tensor],
    base: int,
    weights: Tensor,
    first: int,
    offsets: Sequence[int],
    start: int,
    stop: int,
    q: Tensor,
) -> Rows:
    own, total, inverse_norm, q_dot_p = (weights.new_empty(projected.shape[0]) for _ in range(4))
    return own, total, inverse_norm, q_dot_p


@torch.library.impl(add_op_namespace_prefix("align_rows_backward"), "CompositeExplicitAutograd")
def _align_rows_backward(
    q: Tensor,
    grad: Tensor,
    inverse_norm: Tensor,
    q_dot_p: Tensor,
    offset: Tensor | None,
    inverse_std: Tensor,
    width: int,
    g: Tensor,
    scaled: Tensor,
    along: Tensor,
    sum: Tensor,
) -> None:
    """The gradient of rows, from ``align_rows`` and the gradient ``grad`` (F,) of each frame's mean total.

    Args:
        q, inverse_norm, q_dot_p: (F x M, E), (F x M,), (F x M,) of ``align_rows``.
        offset: (E,) or None, c of p = W' x + c.
        inverse_std: (F x M,) of the tokens, and ``width`` their channels D; read with ``along``.
        g, scaled: (F x M, E), written: the gradient of p, and that times ``inverse_std``; or empty.
        along: (F x M,), written: (<g, c> - <g, p>) / (D std), where dh's sum starts; or empty. With ``scaled`` it is
            not empty.
        sum: (E,), added to: the sum of the gradient over rows.
    """
    tokens = len(q) // len(grad)
    scale = (grad / tokens).repeat_interleave(tokens) * inverse_norm
    gradient = q * scale[:, None]
    sum += gradient.sum(dim=0)
    if g.numel():
        g.copy_(gradient)
    if scaled.numel():
        torch.mul(gradient, inverse_std[:, None], out=scaled)
    if along.numel():
        dot = -q_dot_p * scale if offset is None else gradient @ offset - q_dot_p * scale
        torch.mul(dot, inverse_std / width, out=along)


def wide_statistics(tokens: Tensor) -> Tensor | None:
    """A weight (C,) with which PyTorch's LayerNorm of ``tokens`` (..., C) keeps mean and 1/std in fp32: ones, or None.

    Without one LayerNorm on a CPU keeps those of half types in that type: in bf16 a mean of 100 may be 0.25 off.
    """
    half = tokens.device.type == "cpu" and tokens.dtype in HALF_TYPES
    return tokens.new_ones(tokens.shape[-1], dtype=torch.float32) if half else None


def layer_norm(tokens: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's LayerNorm without affine part, of tokens (..., C), and mean and 1/std (..., 1).

    Where the variance overflows, of which PyTorch's makes a row of zeros, the row's first number and 1/std are NaN.
    """
    x, mean, inverse_std = torch.native_layer_norm(tokens, tokens.shape[-1:], wide_statistics(tokens), None, eps)
    overflowed = inverse_std == 0
    x[..., :1].masked_fill_(overflowed, math.nan)
    return x, mean, inverse_std.masked_fill_(overflowed, math.nan)


@torch.library.impl(add_op_namespace_prefix("layer_norm_rows"), "CompositeExplicitAutograd")
def _layer_norm_rows(tokens: Tensor, eps: float, normalized: bool) -> Rows:
    """x (N..., C) = (h - mean) / std of ``tokens`` (..., N, C), or nothing (0, C), and mean, its low part and 1/std.

    The three are (N...,) in fp32 (fp64 for fp64); the mean is the sum of two numbers, where one would be rounded.
    """
    rows = tokens.reshape(-1, tokens.shape[-1])
    accum_dtype = torch.promote_types(tokens.dtype, torch.float32)
    x, mean, inverse_std = layer_norm(rows, eps)
    mean, inverse_std = mean.flatten().to(accum_dtype), inverse_std.flatten().to(accum_dtype)
    return x if normalized else x[:0].clone(), mean, torch.zeros_like(mean), inverse_std


@torch.library.register_fake(add_op_namespace_prefix("layer_norm_rows"))
def _layer_norm_rows_fake(tokens: Tensor, eps: float, normalized: bool) -> Rows:
    rows, accum_dtype = tokens.shape[:-1].numel(), torch.promote_types(tokens.dtype, torch.float32)
    mean, low, inverse_std = (tokens.new_empty(rows, dtype=accum_dtype) for _ in range(3))
    return tokens.new_empty((rows if normalized else 0, tokens.shape[-1])), mean, low, inverse_std


@torch.library.impl(add_op_namespace_prefix("normalize_rows"), "CompositeExplicitAutograd")
def _normalize_rows(tokens: Tensor, mean: Tensor, low: Tensor, inverse_std: Tensor, out: Tensor) -> None:
    """out (N..., C) = (h - mean - low) / std of ``tokens`` (..., N, C), from what ``layer_norm_rows`` returned."""
    rows = tokens.reshape(-1, tokens.shape[-1]) - mean[:, None]
    out.copy_(rows.sub_(low[:, None]).mul_(inverse_std[:, None]))


@torch.library.register_fake(add_op_namespace_prefix("align_rows_backward"))
@torch.library.register_fake(add_op_namespace_prefix("normalize_rows"))
def _normalize_rows_fake(*arguments: object) -> None:
    return None
