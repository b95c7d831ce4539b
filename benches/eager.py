"""What the loss is measured against: the same arithmetic as training scripts write it in eager PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn


def eager_transposed(
    hidden_states: torch.Tensor,
    teacher_features: torch.Tensor,
    projector: nn.Module,
    student_grid: Sequence[int],
    teacher_grid: Sequence[int],
    distance: int = 1,
    tau: float = 1.0,
) -> torch.Tensor:
    """The loss of adjacent neighbours with every token projected and the larger side interpolated as transposed copies.

    It is ``crepa_loss(..., spatial_align="smaller", antialias=False)``. Half-precision hidden states run under
    autocast of their type, others in their own.

    Args:
        hidden_states: (B, T, P, D), T > distance.
        teacher_features: (B, T, N, E).
        projector: D -> E, applied to all tokens.
        student_grid: (height, width) of the P tokens.
        teacher_grid: (height, width) of the N tokens.
        distance: neighbour offset, frames.
        tau: decay of the neighbours' weight, frames.
    """
    with _autocast(hidden_states):
        p, y = projector(hidden_states), teacher_features  # (B, T, P, E), (B, T, N, E)
        if p.shape[2] > y.shape[2]:
            p = _interpolated(p, student_grid, teacher_grid)
        elif tuple(student_grid) != tuple(teacher_grid):
            y = _interpolated(y, teacher_grid, student_grid)
        return _adjacent_loss(p, y, distance, tau)


def eager_neighbours(
    hidden_states: torch.Tensor,
    teacher_features: torch.Tensor,
    projector: nn.Module,
    student_grid: Sequence[int],
    teacher_grid: Sequence[int],
    antialias: bool = True,
    distance: int = 1,
    tau: float = 1.0,
) -> torch.Tensor:
    """The loss of adjacent neighbours as a careful user writes it for torch.compile: no pair of frames too many.

    It is ``crepa_loss(..., spatial_align="teacher")``: the student is resampled to the teacher's grid, through a view
    that copies nothing. Types and arguments are as of ``eager_transposed``; ``antialias`` widens the filter where an
    axis shrinks.
    """
    with _autocast(hidden_states):
        p = projector(hidden_states)  # (B, T, P, E)
        if tuple(student_grid) != tuple(teacher_grid):
            images = p.flatten(0, 1).unflatten(1, tuple(student_grid)).permute(0, 3, 1, 2)
            if antialias and images.device.type == "cpu":
                images = images.float()  # PyTorch has no antialiased filter for bf16 there
            images = F.interpolate(images, size=tuple(teacher_grid), mode="bilinear", antialias=antialias)
            p = images.permute(0, 2, 3, 1).flatten(1, 2).unflatten(0, p.shape[:2])
        return _adjacent_loss(p, teacher_features, distance, tau)


def eager_relations(
    hidden_states: torch.Tensor, teacher_features: torch.Tensor, projector: nn.Module, margin: float | None = None
) -> torch.Tensor:
    """The relational loss of all pairs on one grid as its papers' code has it: two matrices of all tokens by all.

    Args:
        hidden_states: (B, T, M, D).
        teacher_features: (B, T, M, E).
        projector: D -> E, applied to all tokens.
        margin: differences of cosines cost what they exceed it by; None: their squares.
    """
    with _autocast(hidden_states):
        p, y = (F.normalize(rows, dim=-1).flatten(1, 2) for rows in (projector(hidden_states), teacher_features))
        difference = p @ p.mT - y @ y.mT  # (B, T M, T M)
        cost = difference.square() if margin is None else F.relu(difference.abs() - margin)
        return cost.mean()


def _autocast(hidden_states: torch.Tensor) -> AbstractContextManager[object]:
    half = hidden_states.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(hidden_states.device.type, dtype=hidden_states.dtype) if half else nullcontext()


def _adjacent_loss(p: torch.Tensor, y: torch.Tensor, distance: int, tau: float) -> torch.Tensor:
    """-mean over frames of the own frame's similarity and the two neighbours': (B, T, M, E) twice."""
    p, y = F.normalize(p, dim=-1), F.normalize(y, dim=-1)
    total = (p * y).sum(dim=-1).mean(dim=-1)  # (B, T)
    if distance > 0:
        weight = math.exp(-distance / tau)
        later = (p[:, :-distance] * y[:, distance:]).sum(dim=-1).mean(dim=-1)
        earlier = (p[:, distance:] * y[:, :-distance]).sum(dim=-1).mean(dim=-1)
        total = total + weight * (F.pad(later, (0, distance)) + F.pad(earlier, (distance, 0)))
    return -total.mean()


def _interpolated(tokens: torch.Tensor, source: Sequence[int], target: Sequence[int]) -> torch.Tensor:
    """(B, T, N, C) on ``source`` -> (B, T, M, C) on ``target``, through channels-first copies."""
    batch, frames, _, channels = tokens.shape
    images = tokens.reshape(batch * frames, *source, channels).permute(0, 3, 1, 2).contiguous()
    images = F.interpolate(images, size=tuple(target), mode="bilinear", align_corners=False)
    return images.permute(0, 2, 3, 1).contiguous().reshape(batch, frames, -1, channels)
