"""The projector's weights: LayerNorm folded into Linear before the product, and taken apart after it."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .call import Call
from .launch import Cost, ceil_div, launch, narrowed, operator, split_width


class FoldedProjector(NamedTuple):
    """``p = r (h weight' - mean shift) + offset`` for raw tokens, ``p = x weight' + offset`` for normalised ones.

    Attributes:
        weight: (E, D), W diag(gamma), in the products' type; for raw tokens with its row means taken off.
        shift: (E,) fp32, the row sums of ``weight`` as rounded.
        offset: (E,) fp32, c = W beta + b.
    """

    weight: torch.Tensor
    shift: torch.Tensor
    offset: torch.Tensor


@triton.jit
def _fold_kernel(
    weight, gamma, beta, bias, scale_in, folded, shift_out, offset_out, width,
    HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr, HAS_BIAS: tl.constexpr, CENTERED: tl.constexpr,
    SCALED: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    kind = folded.dtype.element_ty
    column = tl.arange(0, LO)
    offset = 0.0
    low = tl.load(weight + row * width + column).to(tl.float32)
    if HI > 0:
        tail = LO + tl.arange(0, HI)
        there = tail < width
        high = tl.load(weight + row * width + tail, mask=there, other=0).to(tl.float32)
    if HAS_BETA:
        offset += tl.sum(low * tl.load(beta + column).to(tl.float32))
        if HI > 0:
            offset += tl.sum(high * tl.load(beta + tail, mask=there, other=0).to(tl.float32))
    if HAS_GAMMA:
        low = low * tl.load(gamma + column).to(tl.float32)
        if HI > 0:
            high = high * tl.load(gamma + tail, mask=there, other=0).to(tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias + row).to(tl.float32)
    if CENTERED:
        total = tl.sum(low)
        if HI > 0:
            total += tl.sum(high)
        low = low - total / width
        if HI > 0:
            high = tl.where(there, high - total / width, 0)
    if SCALED:
        scale = tl.load(scale_in)
        low = low * scale
        if HI > 0:
            high = high * scale
    rounded = narrowed(low, kind)
    tl.store(folded + row * width + column, rounded)
    shift = tl.sum(rounded.to(tl.float32))
    if HI > 0:
        rounded_high = narrowed(high, kind)
        tl.store(folded + row * width + tail, rounded_high, mask=there)
        shift += tl.sum(rounded_high.to(tl.float32))
    tl.store(shift_out + row, shift)
    tl.store(offset_out + row, offset)


def fold_projector(call: Call, scale: torch.Tensor | None = None) -> FoldedProjector:
    """Folds LayerNorm's affine part into Linear; for raw tokens, whose x sum to 0, the row means go.

    ``scale``, one fp32 number on the device, multiplies the weight and its row sums; the offset is then left out.
    """
    assert call.weight is not None  # for the type checker
    weight, gamma = call.weight.contiguous(), call.gamma
    beta, bias = (call.beta, call.bias) if scale is None else (None, None)
    features, width = weight.shape
    low, high = split_width(width)
    folded = FoldedProjector(
        weight.new_empty(weight.shape, dtype=call.compute_dtype),
        weight.new_empty(features, dtype=torch.float32),
        weight.new_empty(features, dtype=torch.float32),
    )
    launch(
        "fold", _fold_kernel, (features,), Cost((weight,), (folded.weight,)),
        weight=weight, gamma=weight if gamma is None else gamma, beta=weight if beta is None else beta,
        bias=weight if bias is None else bias, scale_in=folded.shift if scale is None else scale,
        folded=folded.weight, shift_out=folded.shift, offset_out=folded.offset,
        width=width, HAS_GAMMA=gamma is not None, HAS_BETA=beta is not None, HAS_BIAS=bias is not None,
        CENTERED=call.raw, SCALED=scale is not None, LO=low, HI=high,
    )  # fmt: skip
    return folded


@triton.jit
def _unfold_part(
    grad, d_offset, value, gamma, beta, weight_grad, start, inside, column, width, d_gamma, d_beta,
    HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr, WEIGHT: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """Writes some columns of some rows of dW and adds the rows' share to dgamma and dbeta."""
    there = column < width
    if AFFINE:
        d_gamma += tl.sum(value * grad, axis=0)
        d_beta += tl.sum(value * d_offset, axis=0)
    if WEIGHT:
        if HAS_GAMMA:
            grad = grad * tl.load(gamma + column, mask=there, other=0).to(tl.float32)[None, :]
        if HAS_BETA:
            grad = grad + d_offset * tl.load(beta + column, mask=there, other=0).to(tl.float32)[None, :]
        keep = inside & there[None, :]
        tl.store(weight_grad + start + column[None, :], narrowed(grad, weight_grad.dtype.element_ty), mask=keep)
    return d_gamma, d_beta


@triton.jit
def _weight_gradient_kernel(
    folded_grad, offset_grad, scale_in, weight, gamma, beta, weight_grad, gamma_parts, beta_parts, features, width,
    HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr, CENTERED: tl.constexpr, WEIGHT: tl.constexpr,
    AFFINE: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
):  # fmt: skip
    # Means need whole rows, LO + HI wide; without them HI is 0 and a program has LO columns.
    column = tl.program_id(1) * LO + tl.arange(0, LO)
    scale = tl.load(scale_in)
    d_gamma = tl.zeros([LO], tl.float32)
    d_beta = tl.zeros([LO], tl.float32)
    if HI > 0:
        tail = LO + tl.arange(0, HI)
        high_d_gamma = tl.zeros([HI], tl.float32)
        high_d_beta = tl.zeros([HI], tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < features)[:, None]
        start = row.to(tl.int64)[:, None] * width
        keep = inside & (column < width)[None, :]
        grad = tl.load(folded_grad + start + column[None, :], mask=keep, other=0)
        value = grad
        if AFFINE:
            value = tl.load(weight + start + column[None, :], mask=keep, other=0).to(tl.float32)
        if HI > 0:
            keep = inside & (tail < width)[None, :]
            high = tl.load(folded_grad + start + tail[None, :], mask=keep, other=0)
            high_value = high
            if AFFINE:
                high_value = tl.load(weight + start + tail[None, :], mask=keep, other=0).to(tl.float32)
        if CENTERED:
            total = tl.sum(grad, axis=1)
            if HI > 0:
                total += tl.sum(high, axis=1)
            mean = (total / width)[:, None]
            grad = grad - mean
            if HI > 0:
                high = high - mean
        d_offset = tl.load(offset_grad + row, mask=row < features, other=0)[:, None] * scale
        d_gamma, d_beta = _unfold_part(
            grad * scale, d_offset, value, gamma, beta, weight_grad, start, inside, column, width, d_gamma, d_beta,
            HAS_GAMMA, HAS_BETA, WEIGHT, AFFINE,
        )  # fmt: skip
        if HI > 0:
            high_d_gamma, high_d_beta = _unfold_part(
                high * scale, d_offset, high_value, gamma, beta, weight_grad, start, inside, tail, width,
                high_d_gamma, high_d_beta, HAS_GAMMA, HAS_BETA, WEIGHT, AFFINE,
            )  # fmt: skip
    if AFFINE:
        part = tl.program_id(0).to(tl.int64) * width
        tl.store(gamma_parts + part + column, d_gamma, mask=column < width)
        tl.store(beta_parts + part + column, d_beta, mask=column < width)
        if HI > 0:
            tl.store(gamma_parts + part + tail, high_d_gamma, mask=tail < width)
            tl.store(beta_parts + part + tail, high_d_beta, mask=tail < width)


# Whole rows: as many programs as the smaller GPUs run at once, each of which keeps a row of dgamma and of dbeta.
_PROGRAMS = 96
_ROWS, _STEPS, _COLUMNS = 16, 4, 128


def unfold_gradients(
    call: Call,
    folded_grad: torch.Tensor,
    offset_grad: torch.Tensor,
    scale: torch.Tensor,
    need_weight: bool,
    need_affine: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dW, dgamma, dbeta from dW' and dc: ``dW = dW' diag(gamma) + dc beta'``, ``dgamma = sum_e W dW'``, ``W' dc``.

    Args:
        call: with the projector's weights.
        folded_grad: (E, D) fp32; for raw tokens its row means are still in it.
        offset_grad: (E,) fp32.
        scale: one number on the device, on both.

    Returns:
        dW (E, D) in the weight's type, or empty; dgamma and dbeta (D,) in fp32, or empty.
    """
    assert call.weight is not None  # for the type checker
    weight, gamma, beta, centered = call.weight.contiguous(), call.gamma, call.beta, call.raw
    features, width = weight.shape
    rows, steps, (low, high), warps = _ROWS, _STEPS, (_COLUMNS, 0), 4
    if centered:
        rows, steps, (low, high) = 1, ceil_div(features, _PROGRAMS), split_width(width)
        warps = max(1, min(8, low // (4 * call.choice.tokens.lanes)))  # 16 bytes of fp32 a lane
    programs = ceil_div(features, rows * steps)
    weight_grad = torch.empty_like(weight) if need_weight else weight.new_empty(0)
    parts = weight.new_empty((2, programs, width) if need_affine else (2, 0, 0), dtype=torch.float32)
    gamma_parts, beta_parts = parts.unbind()
    launch(
        "weight_gradients", _weight_gradient_kernel, (programs, 1 if centered else ceil_div(width, low)),
        Cost((folded_grad, weight), (weight_grad, parts)), warps=warps,
        folded_grad=folded_grad, offset_grad=offset_grad, scale_in=scale, weight=weight,
        gamma=weight if gamma is None else gamma, beta=weight if beta is None else beta, weight_grad=weight_grad,
        gamma_parts=gamma_parts, beta_parts=beta_parts, features=features, width=width, HAS_GAMMA=gamma is not None,
        HAS_BETA=beta is not None, CENTERED=centered, WEIGHT=need_weight, AFFINE=need_affine,
        ROWS=rows, STEPS=steps, LO=low, HI=high,
    )  # fmt: skip
    # One sum each, since an operator's results share no memory.
    gamma_grad, beta_grad = (
        operator("weight_sums", Cost((part,), (4 * part.shape[1],)), partial(part.sum, 0))
        for part in (gamma_parts, beta_parts)
    )
    return weight_grad, gamma_grad, beta_grad
