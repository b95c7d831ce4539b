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
from .resample import check_tokens, on_grid, resample, resample_adjoint

Statistics = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def normalise_and_resample(
    tokens: torch.Tensor,
    source: Sequence[int],
    target: Sequence[int],
    antialias: bool,
    eps: float,
    in_loss: torch.Tensor | None = None,
) -> Statistics:
    """In PyTorch: (..., N, C) -> (..., M, C) with mean and 1/std (..., N), both in fp32 (fp64 for fp64)."""
    width, wide = tokens.shape[-1], torch.promote_types(tokens.dtype, torch.float32)
    tokens = _readable(tokens, in_loss)
    x, mean, inverse_std = torch.native_layer_norm(tokens, (width,), _ones(tokens), None, eps)
    mean, inverse_std = (each.squeeze(-1).to(wide) for each in (mean, inverse_std))
    if in_loss is not None:
        inverse_std = inverse_std.where(in_loss[..., None], 0)
    return resample(x, source, target, antialias), mean, inverse_std


def normalise_and_resample_backward(
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
    dx = resample_adjoint(_readable(grad, in_loss), source, target, antialias)
    dh: torch.Tensor = torch.ops.aten.native_layer_norm_backward(
        dx,
        _readable(tokens, in_loss),
        tokens.shape[-1:],
        mean[..., None],
        inverse_std[..., None],
        _ones(tokens),
        None,
        [True, False, False],
    )[0].contiguous()
    return dh if scale is None else dh.mul_(scale)


def _readable(tokens: torch.Tensor, in_loss: torch.Tensor | None) -> torch.Tensor:
    return tokens if in_loss is None else tokens.where(in_loss[..., None, None], 0)


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


def _ones(tokens: torch.Tensor) -> torch.Tensor | None:
    """On a CPU LayerNorm keeps the statistics of half types in them unless it is given fp32 weights."""
    half = tokens.device.type == "cpu" and tokens.dtype in (torch.float16, torch.bfloat16)
    return tokens.new_ones(tokens.shape[-1], dtype=torch.float32) if half else None


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
def _(
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
    return normalise_and_resample(tokens, source_grid, target_grid, antialias, eps, in_loss)


@torch.library.impl("crepa_kernels::layer_norm_resample_backward", "CompositeExplicitAutograd")
def _(
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
    return normalise_and_resample_backward(grad, tokens, mean, inverse_std, *geometry, in_loss, scale)


@torch.library.register_fake("crepa_kernels::layer_norm_resample_backward")
def _(
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
def _(
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
def _(
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
