"""``crepa_kernels::resample_tokens`` and its adjoint: bilinear resampling of token-major features, in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

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


def _out(tokens: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    return tokens.new_empty((*tokens.shape[:-2], grid[0] * grid[1], tokens.shape[-1]))


@torch.library.custom_op("crepa_kernels::resample_tokens", mutates_args=())
def resample_tokens_op(
    tokens: torch.Tensor, source_grid: Sequence[int], target_grid: Sequence[int], antialias: bool
) -> torch.Tensor:
    if tokens.numel() == 0:
        return _out(tokens, target_grid)
    return resample(tokens, source_grid, target_grid, antialias)


@torch.library.custom_op("crepa_kernels::resample_tokens_adjoint", mutates_args=())
def resample_tokens_adjoint_op(
    grad: torch.Tensor, source_grid: Sequence[int], target_grid: Sequence[int], antialias: bool
) -> torch.Tensor:
    if grad.numel() == 0:
        return _out(grad, source_grid)
    return resample_adjoint(grad, source_grid, target_grid, antialias)


@resample_tokens_op.register_fake
def _(tokens: torch.Tensor, source_grid: Sequence[int], target_grid: Sequence[int], antialias: bool) -> torch.Tensor:
    return _out(tokens, target_grid)


@resample_tokens_adjoint_op.register_fake
def _(grad: torch.Tensor, source_grid: Sequence[int], target_grid: Sequence[int], antialias: bool) -> torch.Tensor:
    return _out(grad, source_grid)


def _keep_geometry(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, ctx.source_grid, ctx.target_grid, ctx.antialias = inputs


def _resample_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    return resample_tokens_adjoint_op(grad, ctx.source_grid, ctx.target_grid, ctx.antialias), None, None, None


def _adjoint_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    return resample_tokens_op(grad, ctx.source_grid, ctx.target_grid, ctx.antialias), None, None, None


resample_tokens_op.register_autograd(_resample_backward, setup_context=_keep_geometry)
resample_tokens_adjoint_op.register_autograd(_adjoint_backward, setup_context=_keep_geometry)
