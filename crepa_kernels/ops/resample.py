"""``crepa_kernels::resample_tokens`` and its adjoint: bilinear resampling of token-major features.

The kernels are the C++/CUDA extension's where it is there; what is here in PyTorch runs everywhere else. On a CPU it is
``F.interpolate``. On other devices that rounds the weights to the type of 16-bit tokens, copies to channels-first, and
its backward pass adds atomically; there each row is gathered by ``F.embedding_bag``: fp32 (fp64) sums in one order, and
no matrix product, whose fp32 operands TF32 or autocast might round.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from .extension import log_fallback
from .namespace import add_op_namespace_prefix, ops
from .register import define, keeps_type

HALF_TYPES = (torch.float16, torch.bfloat16)
TYPES = (torch.float64, torch.float32, *HALF_TYPES)

# The largest number of anything: what PyTorch takes an integer for.
LARGEST = 2**63 - 1

# Bytes of widened tokens held at a time, at least a frame's: enough to fill a GPU, and no second copy of all tokens.
PART_BYTES = 32 << 20


def resample(
    tokens: torch.Tensor, source: Sequence[int], target: Sequence[int], antialias: bool, adjoint: bool = False
) -> torch.Tensor:
    """R tokens, (..., N, C) -> (..., M, C); with ``adjoint`` R' of (..., M, C) on the target grid."""
    make = resampler(tokens, source, target, antialias, adjoint)
    if tokens.device.type == "cpu":
        return make(tokens)
    out = on_grid(tokens, source if adjoint else target)
    for part, into in in_parts(tokens, out):
        into.copy_(make(widened(part)))
    return out


def resampler(
    like: torch.Tensor, source: Sequence[int], target: Sequence[int], antialias: bool, adjoint: bool = False
) -> Callable[[torch.Tensor], torch.Tensor]:
    """R (or R') as a function of (F, N, C), made once for many frames on the device of ``like``, in its wide type."""
    if like.device.type == "cpu":
        interpolate = _interpolate_adjoint if adjoint else _interpolate
        return partial(interpolate, source=source, target=target, antialias=antialias)
    return partial(gather, taps=frame_taps(like, source, target, antialias, adjoint))


def widened(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))


def in_parts(*tensors: torch.Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Each of ``tensors`` (..., rows, C) by the same runs of frames, (frames, rows, C), short enough to be widened."""
    given = [tensor for tensor in tensors if tensor is not None]
    size = torch.promote_types(given[0].dtype, torch.float32).itemsize
    frames = max(1, PART_BYTES // (size * max(tensor.shape[-2] * tensor.shape[-1] for tensor in given)))
    return zip(
        *(
            itertools.repeat(None) if tensor is None else tensor.reshape(-1, *tensor.shape[-2:]).split(frames)
            for tensor in tensors
        ),
        strict=False,
    )


Taps = tuple[torch.Tensor, torch.Tensor]


def frame_taps(
    like: torch.Tensor, source: Sequence[int], target: Sequence[int], antialias: bool, adjoint: bool
) -> Taps:
    """Which rows a frame's rows are made of, and their weights: both (rows, taps), int64 and the wide type of ``like``.

    They are made on the device for every call. A table that is kept would be filled by a CUDA graph's first replay when
    a capture makes it, belong to that graph's memory, and be read by other streams too early.
    """
    (rows, row_weights), (columns, column_weights) = (
        _axis_taps(like, *sizes, antialias, adjoint) for sizes in zip(source, target, strict=True)
    )
    width = (target if adjoint else source)[1]
    index = rows[:, None, :, None] * width + columns[:, None]
    weight = row_weights[:, None, :, None] * column_weights[:, None]
    return index.flatten(2).flatten(0, 1), weight.flatten(2).flatten(0, 1)


def _axis_taps(like: torch.Tensor, source: int, target: int, antialias: bool, adjoint: bool) -> Taps:
    """The tent of csrc/geometry.h along one axis; every integer is exact, so a weight is rounded once."""
    accum_dtype, device = torch.promote_types(like.dtype, torch.float32), like.device
    reach = 2 * (source if antialias and source > target else target)
    at = torch.arange(source, 2 * source * target, 2 * source, device=device)  # in (2 o + 1)
    token = torch.arange(target, 2 * source * target, 2 * target, device=device)  # out (2 j + 1)
    tent = (reach - (at[:, None] - token).abs_()).clamp_min_(0)
    weight = tent.to(accum_dtype) / tent.sum(dim=1, keepdim=True).to(accum_dtype)
    count, other, centre = (source, target, at)
    if adjoint:
        weight, count, other, centre = weight.T, target, source, token
    # An open interval of length reach / other; on equal sides its ends are tokens.
    most = 1 if source == target else min(count, -(-reach // other))
    first = (centre + (other - reach)).div_(2 * other, rounding_mode="floor").clamp_(0, count - most)
    index = first[:, None] + torch.arange(most, device=device)
    return index, weight.gather(1, index)


def gather(frames: torch.Tensor, taps: Taps) -> torch.Tensor:
    """(F, N, C) -> (F, M, C), row i of each frame being the sum over k of weight[i, k] times its row index[i, k]."""
    index, weight = taps
    count, rows, _ = frames.shape
    first = torch.arange(0, count * rows, rows, device=index.device)
    index = (first[:, None, None] + index).flatten(0, 1)
    sums = F.embedding_bag(index, frames.flatten(0, 1), mode="sum", per_sample_weights=weight.repeat(count, 1))
    return sums.unflatten(0, (count, -1))


def _interpolate(tokens: torch.Tensor, source: Sequence[int], target: Sequence[int], antialias: bool) -> torch.Tensor:
    """``F.interpolate`` on a channels-last view of ``tokens`` (..., N, C), which copies nothing."""
    images, antialias = _images(tokens, source), _widens(source, target, antialias)
    if _needs_fp32(tokens, antialias):
        images = images.float()
    if antialias and target[1] == 1:
        # PyTorch's antialiased CPU filter reads the wrong rows where the target is one column of several rows, unless
        # the images are channels-last. One row of several columns it gets right in every layout.
        out = F.interpolate(images.mT, size=(1, target[0]), mode="bilinear", antialias=True).mT
    else:
        out = F.interpolate(images, size=tuple(target), mode="bilinear", antialias=antialias)
    return _tokens(out, tokens)


def _interpolate_adjoint(
    grad: torch.Tensor, source: Sequence[int], target: Sequence[int], antialias: bool
) -> torch.Tensor:
    """R' of the operator R above: takes ``grad`` (..., M, C) on the target grid to (..., N, C) on the source grid."""
    images, antialias = _images(grad, target), _widens(source, target, antialias)
    if _needs_fp32(grad, antialias):
        images = images.float()
    adjoint = (
        torch.ops.aten._upsample_bilinear2d_aa_backward if antialias else torch.ops.aten.upsample_bilinear2d_backward
    )
    out = adjoint(images, tuple(target), (*images.shape[:2], *source), False, None, None)
    return _tokens(out, grad)


def _images(tokens: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    return tokens.reshape(-1, *grid, tokens.shape[-1]).permute(0, 3, 1, 2)


def _tokens(images: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    tokens = images.permute(0, 2, 3, 1).reshape(*like.shape[:-2], -1, like.shape[-1])
    return tokens.to(like.dtype).contiguous()


def _widens(source: Sequence[int], target: Sequence[int], antialias: bool) -> bool:
    """Where no axis shrinks the two filters are one, and the plain one is faster."""
    return antialias and (target[0] < source[0] or target[1] < source[1])


def _needs_fp32(tokens: torch.Tensor, antialias: bool) -> bool:
    """PyTorch has no antialiased filter for half types on a CPU."""
    return antialias and tokens.dtype in HALF_TYPES


def check_flag(value: bool, name: str) -> None:
    """ValueError naming ``name`` where ``value`` is not True or False: text such as "no" would be true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_type(tensor: torch.Tensor, name: str) -> None:
    """ValueError for another type than float64, float32, float16 and bfloat16: 8-bit floats have no arithmetic."""
    if tensor.dtype not in TYPES:
        names = ", ".join(str(kind).removeprefix("torch.") for kind in TYPES)
        raise ValueError(f"{name} must be floating point, one of {names}, got {tensor.dtype}")


def check_tokens(tokens: torch.Tensor, grid: Sequence[int], other: Sequence[int]) -> None:
    """ValueError unless ``tokens`` are (..., N, C) of ``TYPES``, N on ``grid``, and both grids have sizes > 0.

    Also where the result, or what the weights are made of, has more elements than 64 bits count.
    """
    for sizes in (grid, other):
        if len(sizes) != 2 or min(sizes) < 1:
            raise ValueError(f"a grid must be (height, width), two positive integers, got {tuple(sizes)}")
    if tokens.dim() < 2 or tokens.shape[-2] != grid[0] * grid[1]:
        raise ValueError(
            f"tokens of shape {tuple(tokens.shape)} do not lie on the grid {tuple(grid)}: the last axis but one must "
            f"be {grid[0]} x {grid[1]} = {grid[0] * grid[1]}"
        )
    if tokens.shape[:-2].numel() * other[0] * other[1] * tokens.shape[-1] > LARGEST:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)} on the grid {tuple(other)} are too many for 64 bits")
    if any(4 * one * two > LARGEST for one, two in zip(grid, other, strict=True)):
        raise ValueError(f"from the grid {tuple(grid)} to {tuple(other)} an axis is too long: weights need 64 bits")
    check_type(tokens, "tokens")


def on_grid(tokens: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """An empty (..., tokens of ``grid``, C)."""
    return tokens.new_empty((*tokens.shape[:-2], grid[0] * grid[1], tokens.shape[-1]))


_GEOMETRY = "int[] source_grid, int[] target_grid, bool antialias"
define("resample_tokens", f"(Tensor tokens, {_GEOMETRY}) -> Tensor")
define("resample_tokens_adjoint", f"(Tensor grad, {_GEOMETRY}) -> Tensor")
keeps_type("resample_tokens")
keeps_type("resample_tokens_adjoint")
resample_tokens_op = ops.resample_tokens.default
resample_tokens_adjoint_op = ops.resample_tokens_adjoint.default


def _resample_checked(
    tokens: torch.Tensor, source_grid: Sequence[int], target_grid: Sequence[int], antialias: bool, adjoint: bool = False
) -> torch.Tensor:
    log_fallback(tokens.device.type)
    here, there = (target_grid, source_grid) if adjoint else (source_grid, target_grid)
    check_tokens(tokens, here, there)
    return resample(tokens, source_grid, target_grid, antialias, adjoint) if tokens.numel() else on_grid(tokens, there)


def _resample_fake(
    tokens: torch.Tensor, source_grid: Sequence[int], target_grid: Sequence[int], antialias: bool, adjoint: bool = False
) -> torch.Tensor:
    here, there = (target_grid, source_grid) if adjoint else (source_grid, target_grid)
    check_tokens(tokens, here, there)
    return on_grid(tokens, there)


def _keep_geometry(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, ctx.source_grid, ctx.target_grid, ctx.antialias = inputs


def _backward_by(operator: Any, ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    return operator(grad, ctx.source_grid, ctx.target_grid, ctx.antialias), None, None, None


for _name, _adjoint, _other in (
    (add_op_namespace_prefix("resample_tokens"), False, resample_tokens_adjoint_op),
    (add_op_namespace_prefix("resample_tokens_adjoint"), True, resample_tokens_op),
):
    torch.library.impl(_name, "CompositeExplicitAutograd")(partial(_resample_checked, adjoint=_adjoint))
    torch.library.register_fake(_name)(partial(_resample_fake, adjoint=_adjoint))
    torch.library.register_autograd(_name, partial(_backward_by, _other), setup_context=_keep_geometry)
