"""What the tests of token resampling share: grids, and R as an exact matrix."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import torch

from crepa_kernels.grid import Grid

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
    centred = tokens.double() - tokens.double().mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
