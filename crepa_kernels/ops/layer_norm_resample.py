"""``crepa_kernels::layer_norm_resample`` and its backward: LayerNorm without affine part, then resampling of tokens.

Equation, for token i with mean m_i and r_i = 1/sqrt(variance + eps), and R of ``resample_tokens``::

    x_i = (h_i - m_i) r_i,    out = R x
    dx = R' dout,             dh_i = scale r_i (dx_i - mean(dx_i) - x_i mean(dx_i x_i))

``in_loss`` has one bool for each frame. Where it is false the tokens are not read, whatever is in them: rows and
statistics are 0, and so is the gradient. ``scale`` is one number, in the statistics' type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .extension import log_fallback
from .namespace import add_op_namespace_prefix, ops
from .register import define, keeps_type
from .resample import check_tokens, in_parts, on_grid, resampler, widened
from .rows import layer_norm

Statistics = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Forward(NamedTuple):
    """What ``layer_norm_resample`` takes: ``tokens`` (..., N, C) on the grid ``source``, ``in_loss`` (...) or None."""

    tokens: torch.Tensor
    source: Sequence[int]
    target: Sequence[int]
    antialias: bool
    eps: float
    in_loss: torch.Tensor | None = None

    def empty(self) -> Statistics:
        """Memory for the rows (..., M, C), and mean and 1/std (..., N) in fp32 (fp64 for fp64); ValueError as said."""
        _check(self.tokens, self.source, self.target, in_loss=self.in_loss)
        kind = torch.promote_types(self.tokens.dtype, torch.float32)
        mean, inverse_std = (self.tokens.new_empty(self.tokens.shape[:-1], dtype=kind) for _ in range(2))
        return on_grid(self.tokens, self.target), mean, inverse_std


class Backward(NamedTuple):
    """What its backward takes: the gradient (..., M, C) of the rows, and what the forward pass took and made."""

    grad: torch.Tensor
    tokens: torch.Tensor
    mean: torch.Tensor
    inverse_std: torch.Tensor
    source: Sequence[int]
    target: Sequence[int]
    antialias: bool
    in_loss: torch.Tensor | None = None
    scale: torch.Tensor | None = None

    @classmethod
    def and_out(cls, arguments: tuple[Any, ...]) -> tuple[Backward, torch.Tensor]:
        """Of the out form's arguments, and where the gradient is to be written."""
        given, out = cls(*arguments[:_OUT], *arguments[_OUT + 1 :]), arguments[_OUT]
        given.check(out)
        return given, out

    def check(self, out: torch.Tensor | None = None) -> None:
        others = {name: getattr(self, name) for name in ("mean", "inverse_std", "in_loss", "scale")}
        _check(self.tokens, self.source, self.target, self.grad, out=out, **others)

    def empty(self) -> torch.Tensor:
        """Memory for the gradient of the tokens; ValueError as said."""
        self.check()
        return torch.empty_like(self.tokens, memory_format=torch.contiguous_format)


_OUT = Backward._fields.index("in_loss")  # among the arguments of the out form


def normalize_and_resample(*arguments: Any) -> Statistics:
    """In PyTorch: (..., N, C) -> (..., M, C) with mean and 1/std (..., N), both in fp32 (fp64 for fp64)."""
    given = Forward(*arguments)
    tokens, source, target, antialias, eps, in_loss = given
    log_fallback(tokens.device.type)
    out, mean, inverse_std = given.empty()
    if tokens.numel() == 0:
        return out, mean, inverse_std
    make = resampler(tokens, source, target, antialias)
    statistics = (mean[..., None], inverse_std[..., None])
    for h, rows, into_mean, into_std, keep in in_parts(tokens, out, *statistics, _of_rows(in_loss)):
        x, part_mean, part_std = layer_norm(_readable(h, keep), eps)
        into_mean.copy_(part_mean)
        into_std.copy_(part_std if keep is None else part_std.where(keep, 0))
        rows.copy_(make(x))
    return out, mean, inverse_std


def normalize_and_resample_into(*arguments: Any) -> None:
    """In PyTorch: the gradient of the above with respect to ``tokens``."""
    given, out = Backward.and_out(arguments)
    grad, tokens, mean, inverse_std, source, target, antialias, in_loss, scale = given
    log_fallback(tokens.device.type)
    if tokens.numel() == 0:
        return
    if out.shape != tokens.shape or not out.is_contiguous():  # parts are views of contiguous memory alone
        out.copy_(in_new_memory(normalize_and_resample_into)(*given))
        return
    make = resampler(tokens, source, target, antialias, adjoint=True)
    statistics = (mean[..., None], inverse_std[..., None])
    for g, h, part_mean, part_std, dh, keep in in_parts(grad, tokens, *statistics, out, _of_rows(in_loss)):
        dx = make(_readable(g, keep))
        part = torch.ops.aten.native_layer_norm_backward(
            dx, _readable(h, keep), h.shape[-1:], part_mean, part_std, None, None, [True, False, False]
        )[0]
        dh.copy_(part if scale is None else part.mul_(scale))


def in_new_memory(write: Callable[..., None]) -> Callable[..., torch.Tensor]:
    """The backward pass without ``out``, made of one that ``write`` is: the gradient is in memory of its own."""

    def made(*arguments: Any) -> torch.Tensor:
        out = Backward(*arguments).empty()
        write(*arguments[:_OUT], out, *arguments[_OUT:])
        return out

    return made


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
layer_norm_resample_backward_out_op = ops.layer_norm_resample_backward_out.default
layer_norm_resample_op = ops.layer_norm_resample.default
layer_norm_resample_backward_op = ops.layer_norm_resample_backward.default


_KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "layer_norm_resample": (normalize_and_resample, lambda *given: Forward(*given).empty()),
    # Of this one alone the extension has no kernel: autograd needs a gradient that nothing else holds.
    "layer_norm_resample_backward": (
        in_new_memory(layer_norm_resample_backward_out_op),
        lambda *given: Backward(*given).empty(),
    ),
    "layer_norm_resample_backward_out": (normalize_and_resample_into, lambda *given: Backward.and_out(given) and None),
}
for _name, (_kernel, _fake) in _KERNELS.items():
    torch.library.impl(add_op_namespace_prefix(_name), "CompositeExplicitAutograd")(_kernel)
    torch.library.register_fake(add_op_namespace_prefix(_name))(_fake)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Statistics) -> None:
    tokens, *ctx.geometry, _, in_loss = inputs
    _, mean, inverse_std = output
    ctx.mark_non_differentiable(mean, inverse_std)
    ctx.save_for_backward(tokens, mean, inverse_std, in_loss)


def _backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    *saved, in_loss = ctx.saved_tensors
    return layer_norm_resample_backward_op(grad, *saved, *ctx.geometry, in_loss), *[None] * 5


def _no_second_derivative(ctx: Any, grad: torch.Tensor) -> None:
    raise RuntimeError("crepa_kernels::layer_norm_resample can be differentiated once")


torch.library.register_autograd(add_op_namespace_prefix("layer_norm_resample"), _backward, setup_context=_keep)
torch.library.register_autograd(add_op_namespace_prefix("layer_norm_resample_backward"), _no_second_derivative)
