"""What the tests of token resampling share: grids, and R as an exact matrix."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import Any

import torch

from crepa_kernels.grid import Grid
from crepa_kernels.ops.layer_norm_resample import in_new_memory

# The students' grids that people train, against the teacher's two (DINOv2 at 224 and at 518 pixels).
STUDENT_GRIDS: list[Grid] = [(30, 52), (45, 80), (22, 40), (16, 24), (22, 38), (32, 48), (30, 45), (30, 53)]
TEACHER_GRIDS: list[Grid] = [(16, 16), (37, 37)]
TRAINED = [pair for s in STUDENT_GRIDS for t in TEACHER_GRIDS for pair in ((s, t), (t, s))]
ODD: list[tuple[Grid, Grid]] = [
    ((5, 7), (9, 3)),
    ((3, 5), (7, 11)),
    ((13, 9), (4, 2)),
    ((1, 1), (3, 4)),
    ((4, 4), (1, 1)),
    ((1, 6), (1, 17)),
    ((1, 35), (1, 4)),
    ((6, 1), (2, 1)),
    ((7, 2), (7, 2)),
]
PAIRS = TRAINED + ODD


def pair_id(pair: tuple[Grid, Grid]) -> str:
    return "-to-".join("x".join(map(str, grid)) for grid in pair)


def draw(grid: Grid, dtype: torch.dtype, channels: int = 11, frames: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(grid[0] * 1000 + grid[1])
    tokens = torch.randn(frames, grid[0] * grid[1], channels, dtype=torch.float64, generator=generator)
    return tokens.to(dtype)


@cache
def axis_matrix(source: int, target: int, antialias: bool) -> torch.Tensor:
    """(target, source) in fp64, each weight rounded once: a tent of one cell, or of source/target cells."""
    scale = Fraction(source, target)
    reach = max(scale, Fraction(1)) if antialias else Fraction(1)
    rows = []
    for o in range(target):
        centre = (o + Fraction(1, 2)) * scale
        row = [max(Fraction(0), 1 - abs(j + Fraction(1, 2) - centre) / reach) for j in range(source)]
        total = sum(row)
        rows.append([float(weight / total) for weight in row])
    return torch.tensor(rows, dtype=torch.float64)


def exact(tokens: torch.Tensor, source: Grid, target: Grid, antialias: bool) -> torch.Tensor:
    """R tokens in fp64, differentiable: (..., N, C) -> (..., M, C)."""
    rows, columns = (axis_matrix(s, t, antialias) for s, t in zip(source, target, strict=True))
    image = tokens.double().reshape(*tokens.shape[:-2], *source, tokens.shape[-1])
    out = torch.einsum("yi,xj,...ijc->...yxc", rows, columns, image)
    return out.reshape(*tokens.shape[:-2], -1, tokens.shape[-1])


def exact_adjoint(grad: torch.Tensor, source: Grid, target: Grid, antialias: bool) -> torch.Tensor:
    """R' grad in fp64: (..., M, C) -> (..., N, C)."""
    rows, columns = (axis_matrix(s, t, antialias) for s, t in zip(source, target, strict=True))
    image = grad.double().reshape(*grad.shape[:-2], *target, grad.shape[-1])
    out = torch.einsum("yi,xj,...yxc->...ijc", rows, columns, image)
    return out.reshape(*grad.shape[:-2], -1, grad.shape[-1])


def exact_layer_norm(tokens: torch.Tensor, eps: float) -> torch.Tensor:
    centered = tokens.double() - tokens.double().mean(dim=-1, keepdim=True)
    return centered / (centered.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def assert_exact_numbers(
    operators: Any, pair: tuple[Grid, Grid], channels: int, antialias: bool, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Resampling and LayerNorm with resampling, both ways, of ``torch.ops.<library>`` on ``device``."""
    source, target = pair
    torch.manual_seed(0)
    tokens = torch.randn(2, source[0] * source[1], channels, dtype=torch.float64).to(dtype)
    grad = torch.randn(2, target[0] * target[1], channels, dtype=torch.float64).to(dtype)
    wide = tokens.to(torch.float64, copy=True).requires_grad_()
    rows = exact(exact_layer_norm(wide, 1e-5), source, target, antialias)
    (dh,) = torch.autograd.grad(rows, wide, grad.double())

    on_device, grad_on_device = tokens.to(device), grad.to(device)
    geometry = (source, target, antialias)
    out, mean, inverse_std = operators.layer_norm_resample(on_device, *geometry, 1e-5)
    backward = (grad_on_device, on_device, mean, inverse_std, *geometry)
    results = [
        (operators.resample_tokens(on_device, *geometry), exact(tokens, *geometry)),
        (operators.resample_tokens_adjoint(grad_on_device, *geometry), exact_adjoint(grad, *geometry)),
        (out, rows.detach()),
        (in_new_memory(operators.layer_norm_resample_backward_out)(*backward), dh),
    ]
    for actual, expected in results:
        assert_close(actual, expected, mean.dtype)
    assert torch.equal(in_new_memory(operators.layer_norm_resample_backward_out)(*backward), results[-1][0])


def assert_close(actual: torch.Tensor, expected: torch.Tensor, sums: torch.dtype) -> None:
    """One rounding to the type; fp32 (fp64) sums of up to 60 terms, largest where the grid grows."""
    off = (actual.cpu().double() - expected).abs()
    bound = torch.finfo(actual.dtype).eps * expected.abs() + 100 * torch.finfo(sums).eps * (1 + expected.abs().max())
    assert (off <= bound).all()


def assert_rounded(actual: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor, terms: float) -> None:
    """One rounding to the result's type, and fp32 (fp64) sums whose terms are as large as ``scale``, ``terms`` of them.

    Half of the type's eps is the rounding itself; a sum of n terms is off by at most n eps of the sum of magnitudes.
    """
    storage = torch.finfo(actual.dtype).eps
    sums = torch.finfo(torch.float64 if actual.dtype == torch.float64 else torch.float32).eps
    smallest = torch.finfo(actual.dtype).tiny
    excess = (actual.double() - expected).abs() - (storage / 2 * expected.abs() + terms * sums * scale + smallest)
    assert excess.max() <= 0, f"beyond the bound by {excess.max():.3e}"
