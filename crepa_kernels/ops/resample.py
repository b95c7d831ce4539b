"""``crepa_kernels::resample_tokens`` and its adjoint: bilinear resampling of token-major features.

The kernels are the C++/CUDA extension's where it is there; what is here in PyTorch runs everywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .extension import log_fallback
from .register import define, keeps_type

HALF_TYPES = (torch.float16, torch.bfloat16)


def resample(tokens: torch.Tensor, source: Sequence[int], target: Sequence[int], antialias: bool) -> torch.Tensor:
    """``F.interpolate`` on a channels-last view of ``tokens`` (..., N, C), which copies nothing."""
    images, antialias = _images(tokens, source), _widened(source, target, antialias)
    if _needs_fp32(tokens, antialias):
        images = images.float()
    if antialias and target[1] == 1:
        # PyTorch's antialiased CPU filter reads the wrong rows where the target is one column of several rows, unless
        # the images are channels-last. One row of several columns it gets right in every layout.
        out = F.interpolate(images.mT, size=(1, target[0]), mode="bilinear", antialias=True).mT
    else:
        out = F.interpolate(images, size=tuple(target), mode="bilinear", antialias=antialias)
    return _tokens(out, tokens)


def resample_adjoint(grad: torch.Tensor, source: Sequence[int], target: Sequence[int], antialias: bool) -> torch.Tensor:
    """R' of the operator R above: takes ``grad`` (..., M, C) on the target grid to (..., N, C) on the source grid."""
    images, antialias = _images(grad, target), _widened(source, target, antialias)
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


def _widened(source: Sequence[int], target: Sequence[int], antialias: bool) -> bool:
    """Where no axis shrinks the two filters are one, and the plain one is faster."""
    return antialias and (target[0] < source[0] or target[1] < source[1])


def _needs_fp32(tokens: torch.Tensor, antialias: bool) -> bool:
    """PyTorch has no antialiased filter for half types on a CPU."""
    return antialias and tokens.device.type == "cpu" and tokens.dtype in HALF_TYPES


def check_tokens(tokens: torch.Tensor, grid: Sequence[int], other: Sequence[int]) -> None:
    """ValueError unless ``tokens`` are (..., N, C), floating point, N on ``grid``, and both grids have sizes > 0."""
    for sizes in (grid, other):
        if len(sizes) != 2 or min(sizes) < 1:
            raise ValueError(f"a grid must be (height, width), two positive integers, got {tuple(sizes)}")
    if tokens.dim() < 2 or tokens.shape[-2] != grid[0] * grid[1]:
        raise ValueError(
            f"tokens of shape {tuple(tokens.shape)} do not lie on the grid {tuple(grid)}: the last axis but one must "
            f"be {grid[0]} x {grid[1]} = {grid[0] * grid[1]}"
        )
    if not tokens.is_floating_point():
        raise ValueError(f"tokens must be floating point, got {tokens.dtype}")


def on_grid(tokens: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """An empty (..., tokens of ``grid``, C)."""
    return tokens.new_empty((*tokens.shape[:-2], grid[0] * grid[1], tokens.shape[-1]))


_GEOMETRY = "int[] source_grid, int[] target_grid, bool antialias"
define("resample_tokens", f"(Tensor tokens, {_GEOMETRY}) -> Tensor")
define("resample_tokens_adjoint", f"(Tensor grad, {_GEOMETRY}) -> Tensor")
keeps_type("resample_tokens")
keeps_type("resample_tokens_adjoint")
resample_tokens_op = torch.ops.crepa_kernels.resample_tokens.default
resample_tokens_adjoint_op = torch.ops.crepa_kernels.resample_tokens_adjoint.default


@torch.library.impl("crepa_kernels::resample_tokens", "CompositeExplicitAutograd")
def _(tokens: torch.Tensor, source_grid: Sequence[int], target_grid: Sequence[int], antialias: bool) -> torch.Tensor:
    log_fallback(tokens.device.type)
    check_tokens(tokens, source_grid, target_grid)
    return resample(tokens, source_grid, target_grid, antialias) if tokens.numel() else on_grid(tokens, target_grid)


@torch.library.impl("crepa_kernels::resample_tokens_adjoint", "CompositeExplicitAutograd")
def _(grad: torch.Tensor, source_grid: Sequence[int], target_grid: Sequence[int], antialias: bool) -> torch.Tensor:
    log_fallback(grad.device.type)
    check_tokens(grad, target_grid, source_grid)
    return resample_adjoint(grad, source_grid, target_grid, antialias) if grad.numel() else on_grid(grad, source_grid)


@torch.library.register_fake("crepa_kernels::resample_tokens")
def _(tokens: torch.Tensor, source_grid: Sequence[int], target_grid: Sequence[int], antialias: bool) -> torch.Tensor:
    check_tokens(tokens, source_grid, target_grid)
    return on_grid(tokens, target_grid)


@torch.library.register_fake("crepa_kernels::resample_tokens_adjoint")
def _(grad: torch.Tensor, source_grid: Sequence[int], target_grid: Sequence[int], antialias: bool) -> torch.Tensor:
    check_tokens(grad, target_grid, source_grid)
    return on_grid(grad, source_grid)


def _keep_geometry(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, ctx.source_grid, ctx.target_grid, ctx.antialias = inputs


def _resample_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    return resample_tokens_adjoint_op(grad, ctx.source_grid, ctx.target_grid, ctx.antialias), None, None, None


def _adjoint_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    return resample_tokens_op(grad, ctx.source_grid, ctx.target_grid, ctx.antialias), None, None, None


for _name, _backward in (("resample_tokens", _resample_backward), ("resample_tokens_adjoint", _adjoint_backward)):
    torch.library.register_autograd(f"crepa_kernels::{_name}", _backward, setup_context=_keep_geometry)
