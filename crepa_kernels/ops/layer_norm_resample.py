"""``crepa_kernels::layer_norm_resample`` and its backward: LayerNorm without affine part, then resampling of tokens.

Equation, for token i with mean m_i and r_i = 1/sqrt(variance + eps), and R of ``resample_tokens``::

    x_i = (h_i - m_i) r_i,    out = R x
    dx = R' dout,             dh_i = scale r_i (dx_i - mean(dx_i) - x_i mean(dx_i x_i))

``in_loss`` has one bool for each frame. Where it is false the tokens are not read, whatever is in them: rows and
statistics are 0, and so is the gradient. ``scale`` is one number, in the statistics' type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .extension import log_fallback
from .register import define, keeps_type
from .resample import check_tokens, in_parts, on_grid, resampler, widened

Statistics = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def normalize_and_resample(
    tokens: torch.Tensor,
    source: Sequence[int],
    target: Sequence[int],
    antialias: bool,
    eps: float,
    in_loss: torch.Tensor | None = None,
) -> Statistics:
    """In PyTorch: (..., N, C) -> (..., M, C) with mean and 1/std (..., N), both in fp32 (fp64 for fp64)."""
    out = on_grid(tokens, target)
    mean, inverse_std = (tokens.new_empty((*tokens.shape[:-1], 1), dtype=_wide(tokens)) for _ in range(2))
    make = resampler(tokens, source, target, antialias)
    for h, rows, into_mean, into_std, keep in in_parts(tokens, out, mean, inverse_std, _of_rows(in_loss)):
        x, part_mean, part_std = torch.native_layer_norm(_readable(h, keep), h.shape[-1:], None, None, eps)
        into_mean.copy_(part_mean)
        into_std.copy_(part_std if keep is None else part_std.where(keep, 0))
        rows.copy_(make(x))
    return out, mean.squeeze(-1), inverse_std.squeeze(-1)


def normalize_and_resample_backward(
    grad: torch.Tensor,
    tokens: torch.Tensor,
    mean: torch.Tensor,
    inverse_std: torch.Tensor,
    source: Sequence[int],
    target: Sequence[int],
    antialias: bool,
    in_loss: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """In PyTorch: gradient of the above with respect to ``tokens``, for ``grad`` (..., M, C)."""
    out = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    make = resampler(tokens, source, target, antialias, adjoint=True)
    statistics = (mean[..., None], inverse_std[..., None])
    for g, h, part_mean, part_std, dh, keep in in_parts(grad, tokens, *statistics, out, _of_rows(in_loss)):
        dx = make(_readable(g, keep))
        part = torch.ops.aten.native_layer_norm_backward(
            dx, _readable(h, keep), h.shape[-1:], part_mean, part_std, None, None, [True, False, False]
        )[0]
        dh.copy_(part if scale is None else part.mul_(scale))
    return out


def _wide(tokens: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tokens.dtype, torch.float32)


def _of_rows(in_loss: torch.Tensor | None) -> torch.Tensor | None:
    """(...) -> (..., 1, 1), beside tokens (..., N, C)."""
    return None if in_loss is None else in_loss[..., None, None]


def _readable(frames: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """``frames`` in fp32 (fp64): what is between the two steps, and the sums of each, are not rounded to half types."""
    return widened(frames if keep is None else frames.where(keep, 0))


def _check(
    tokens: torch.Tensor,
    source: Sequence[int],
    target: Sequence[int],
    grad: torch.Tensor | None = None,
    **others: torch.Tensor | None,
) -> None:
    """ValueError unless ``tokens`` and ``grad`` lie on their grids, and all are on one device."""
    check_tokens(tokens, source, target)
    if grad is not None:
        check_tokens(grad, target, source)
    for name, tensor in {"grad": grad, **others}.items():
        if tensor is not None and tensor.device != tokens.device:
            raise ValueError(f"{name} is on {tensor.device}, the tokens on {tokens.device}")


_GEOMETRY = "int[] source_grid, int[] target_grid, bool antialias"
_OPTIONS = "Tensor? in_loss=None, Tensor? scale=None"
define(
    "layer_norm_resample", f"(Tensor tokens, {_GEOMETRY}, float eps, Tensor? in_loss=None) -> (Tensor, Tensor, Tensor)"
)
define(
    "layer_norm_resample_backward",
    f"(Tensor grad, Tensor tokens, Tensor mean, Tensor inverse_std, {_GEOMETRY}, {_OPTIONS}) -> Tensor",
)
define(
    "layer_norm_resample_backward_out",
    f"(Tensor grad, Tensor tokens, Tensor mean, Tensor inverse_std, {_GEOMETRY}, Tensor(a!) out, {_OPTIONS}) -> ()",
)
for _name in ("layer_norm_resample", "layer_norm_resample_backward", "layer_norm_resample_backward_out"):
    keeps_type(_name)
layer_norm_resample_backward_out_op = torch.ops.crepa_kernels.layer_norm_resample_backward_out.default
layer_norm_resample_op = torch.ops.crepa_kernels.layer_norm_resample.default
layer_norm_resample_backward_op = torch.ops.crepa_kernels.layer_norm_resample_backward.default


@torch.library.register_fake("crepa_kernels::layer_norm_resample")
def _empty(
    tokens: torch.Tensor,
    source_grid: Sequence[int],
    target_grid: Sequence[int],
    antialias: bool,
    eps: float,
    in_loss: torch.Tensor | None = None,
) -> Statistics:
    _check(tokens, source_grid, target_grid, in_loss=in_loss)
    mean = tokens.new_empty(tokens.shape[:-1], dtype=torch.promote_types(tokens.dtype, torch.float32))
    return on_grid(tokens, target_grid), mean, torch.empty_like(mean)


@torch.library.impl("crepa_kernels::layer_norm_resample", "CompositeExplicitAutograd")
def _layer_norm_resample(
    tokens: torch.Tensor,
    source_grid: Sequence[int],
    target_grid: Sequence[int],
    antialias: bool,
    eps: float,
    in_loss: torch.Tensor | None = None,
) -> Statistics:
    log_fallback(tokens.device.type)
    _check(tokens, source_grid, target_grid, in_loss=in_loss)
    if tokens.numel() == 0:
        return _empty(tokens, source_grid, target_grid, antialias, eps)
    return normalize_and_resample(tokens, source_grid, target_grid, antialias, eps, in_loss)


@torch.library.impl("crepa_kernels::layer_norm_resample_backward", "CompositeExplicitAutograd")
def _layer_norm_resample_backward(
    grad: torch.Tensor,
    tokens: torch.Tensor,
    mean: torch.Tensor,
    inverse_std: torch.Tensor,
    source_grid: Sequence[int],
    target_grid: Sequence[int],
    antialias: bool,
    in_loss: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    log_fallback(tokens.device.type)
    _check(tokens, source_grid, target_grid, grad, mean=mean, inverse_std=inverse_std, in_loss=in_loss, scale=scale)
    if tokens.numel() == 0:
        return torch.empty_like(tokens, memory_format=torch.contiguous_format)
    geometry = (source_grid, target_grid, antialias)
    return normalize_and_resample_backward(grad, tokens, mean, inverse_std, *geometry, in_loss, scale)


@torch.library.register_fake("crepa_kernels::layer_norm_resample_backward")
def _layer_norm_resample_backward_fake(
    grad: torch.Tensor,
    tokens: torch.Tensor,
    mean: torch.Tensor,
    inverse_std: torch.Tensor,
    source_grid: Sequence[int],
    target_grid: Sequence[int],
    antialias: bool,
    in_loss: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    _check(tokens, source_grid, target_grid, grad, mean=mean, inverse_std=inverse_std, in_loss=in_loss, scale=scale)
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


@torch.library.impl("crepa_kernels::layer_norm_resample_backward_out", "CompositeExplicitAutograd")
def _layer_norm_resample_backward_out(
    grad: torch.Tensor,
    tokens: torch.Tensor,
    mean: torch.Tensor,
    inverse_std: torch.Tensor,
    source_grid: Sequence[int],
    target_grid: Sequence[int],
    antialias: bool,
    out: torch.Tensor,
    in_loss: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> None:
    geometry = (source_grid, target_grid, antialias)
    out.copy_(layer_norm_resample_backward_op(grad, tokens, mean, inverse_std, *geometry, in_loss, scale))


@torch.library.register_fake("crepa_kernels::layer_norm_resample_backward_out")
def _layer_norm_resample_backward_out_fake(
    grad: torch.Tensor,
    tokens: torch.Tensor,
    mean: torch.Tensor,
    inverse_std: torch.Tensor,
    source_grid: Sequence[int],
    target_grid: Sequence[int],
    antialias: bool,
    out: torch.Tensor,
    in_loss: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> None:
    others = {"mean": mean, "inverse_std": inverse_std, "out": out, "in_loss": in_loss, "scale": scale}
    _check(tokens, source_grid, target_grid, grad, **others)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Statistics) -> None:
    tokens, ctx.source_grid, ctx.target_grid, ctx.antialias, _, in_loss = inputs
    _, mean, inverse_std = output
    ctx.mark_non_differentiable(mean, inverse_std)
    ctx.save_for_backward(tokens, mean, inverse_std, in_loss)


def _backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    *saved, in_loss = ctx.saved_tensors
    geometry = (ctx.source_grid, ctx.target_grid, ctx.antialias)
    return layer_norm_resample_backward_op(grad, *saved, *geometry, in_loss), *[None] * 5


def _no_second_derivative(ctx: Any, grad: torch.Tensor) -> None:
    raise RuntimeError("crepa_kernels::layer_norm_resample can be differentiated once")


torch.library.register_autograd("crepa_kernels::layer_norm_resample", _backward, setup_context=_keep)
torch.library.register_autograd("crepa_kernels::layer_norm_resample_backward", _no_second_derivative)
