"""Token grids: which side is resampled, and the resampling."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from .ops.resample import LARGEST, check_flag, check_tokens, check_type, resample_tokens_op

Grid = tuple[int, int]
SpatialAlign = Literal["student", "teacher", "smaller", "pool"]
Change = Literal["keep", "resample", "pool"]


def as_grid(grid: Sequence[int], name: str) -> Grid:
    """``grid`` as (height, width); a ValueError names it when it is not two positive integers."""
    values = tuple(grid) if isinstance(grid, Sequence) else ()
    if len(values) != 2 or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
        raise ValueError(f"{name} must be (height, width), two positive integers, got {grid!r}")
    if values[0] * values[1] > LARGEST:
        raise ValueError(f"{name} {values} has more tokens than 64 bits count")
    return values[0], values[1]


def grid_of(
    student_grid: Sequence[int] | None,
    latent_shape: Sequence[int] | None,
    patch: Sequence[int] | None,
    hidden_states: torch.Tensor,
) -> Sequence[int]:
    """The student's grid as it is given, or of latents (frames, height, width) cut into patches of (t, h, w).

    Raises:
        ValueError: where both or neither are given, for other than three positive integers each, sides that are no
            multiple of the patch's, or another number of frames than ``hidden_states`` (B, T, P, D) have.
    """
    if student_grid is not None:
        if latent_shape is not None or patch is not None:
            raise ValueError("give student_grid=, or latent_shape= and patch= that say it, and not both")
        return student_grid
    if latent_shape is None or patch is None:
        raise ValueError("student_grid= is missing, or latent_shape= (frames, height, width) with patch= (t, h, w)")
    frames, height, width = as_sizes(latent_shape, "latent_shape")
    depth, rows, columns = as_sizes(patch, "patch")
    # What is missing of the last patch is padded. Other shapes are checked by the number of their tokens.
    if hidden_states.dim() == 4 and hidden_states.shape[1] != -(-frames // depth):
        raise ValueError(
            f"hidden_states have {hidden_states.shape[1]} frames of tokens, latents of {frames} frames in patches of "
            f"{depth} have {-(-frames // depth)}: latent_shape {tuple(latent_shape)}, patch {tuple(patch)}"
        )
    if height % rows or width % columns:
        raise ValueError(
            f"latents of {height} x {width} are no whole patches of {rows} x {columns}: "
            f"latent_shape {tuple(latent_shape)}, patch {tuple(patch)}"
        )
    return height // rows, width // columns


def as_sizes(sizes: object, name: str) -> tuple[int, int, int]:
    """``sizes`` as (frames, height, width); a ValueError names it when it is not three positive integers."""
    values = tuple(sizes) if isinstance(sizes, Sequence) else ()
    if len(values) != 3 or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
        raise ValueError(f"{name} must be (frames, height, width), three positive integers, got {sizes!r}")
    return values


def constant(grid: Grid) -> Grid:
    """``grid`` as plain integers: a loss traced with symbolic sizes is for the grids it was traced with.

    Inductor loses one of two symbols that a comparison has made equal (torch 2.13: NameError in its own code).
    """
    return operator.index(grid[0]), operator.index(grid[1])


def num_tokens(grid: Grid) -> int:
    """Tokens on ``grid``."""
    return grid[0] * grid[1]


def should_save_aligned(aligned: int, tokens: int) -> bool:
    """Whether ``aligned`` tokens made of ``tokens`` are kept for the backward pass.

    Making them again reads every token, which costs more than so few are worth.
    """
    return 4 * aligned <= tokens


def should_project_first(aligned: int, tokens: int) -> bool:
    """Whether ``tokens`` are projected before they are resampled to ``aligned`` ones: where those are more.

    Linear commutes with the resampling, so the side with fewer tokens is projected.
    """
    return aligned > tokens


@dataclass(frozen=True)
class SpatialPlan:
    """What happens to each side so that both lie on one grid of ``tokens`` tokens a frame."""

    student_grid: Grid
    teacher_grid: Grid
    grid: Grid
    student: Change
    teacher: Change
    antialias: bool

    @property
    def tokens(self) -> int:
        """M."""
        return num_tokens(self.grid)

    @property
    def project_first(self) -> bool:
        """Whether the student is projected on its own grid, and p is resampled."""
        return self.student == "resample" and should_project_first(self.tokens, num_tokens(self.student_grid))

    @property
    def projected(self) -> int:
        """Tokens a frame that are projected: P or M."""
        return num_tokens(self.student_grid) if self.project_first else self.tokens

    def align(self, features: torch.Tensor, side: Literal["student", "teacher"]) -> torch.Tensor:
        """(..., tokens of that side's grid, C) -> (..., M, C), differentiable."""
        change, source = (self.student, self.student_grid) if side == "student" else (self.teacher, self.teacher_grid)
        if change == "pool":
            return features.mean(dim=-2, keepdim=True)
        if change == "resample":
            return resample_tokens_op(features, source, self.grid, self.antialias)
        return features


def plan_alignment(
    spatial_align: SpatialAlign,
    student_grid: Sequence[int],
    teacher_grid: Sequence[int],
    antialias: bool = True,
) -> SpatialPlan:
    """Chooses the common grid of a frame's student and teacher tokens.

    ``"student"``: the teacher is resampled to the student's grid. ``"teacher"``: the student to the teacher's.
    ``"smaller"``: the side with more tokens to the other's grid; with equal counts the teacher to the student's.
    ``"pool"``: where the grids differ, both sides become one averaged token a frame.

    Raises:
        ValueError: for another name, a grid that is not two positive integers, or a flag that is none.
    """
    student, teacher = constant(as_grid(student_grid, "student_grid")), constant(as_grid(teacher_grid, "teacher_grid"))
    check_flag(antialias, "antialias")
    if spatial_align not in get_args(SpatialAlign):
        raise ValueError(f"spatial_align must be one of {', '.join(get_args(SpatialAlign))}, got {spatial_align!r}")
    if student == teacher:
        return SpatialPlan(student, teacher, student, "keep", "keep", antialias)
    if spatial_align == "pool":
        return SpatialPlan(student, teacher, (1, 1), "pool", "pool", antialias)
    student_moves = spatial_align == "teacher" or (
        spatial_align == "smaller" and num_tokens(student) > num_tokens(teacher)
    )
    if student_moves:
        return SpatialPlan(student, teacher, teacher, "resample", "keep", antialias)
    return SpatialPlan(student, teacher, student, "keep", "resample", antialias)


def resample_tokens(
    tokens: torch.Tensor, source_grid: Sequence[int], target_grid: Sequence[int], antialias: bool = True
) -> torch.Tensor:
    """Bilinear resampling of token-major features with half-pixel centres.

    Args:
        tokens: (..., N, C), N tokens in raster order on ``source_grid``, fp64, fp32, fp16 or bf16.
        source_grid: (height, width) with height x width = N.
        target_grid: (height, width) of the result.
        antialias: where an axis shrinks, widen the filter by the scale so that every token takes part
            (``F.interpolate(..., antialias=True)``); False gives the plain four-point filter.

    Returns:
        (..., height x width of ``target_grid``, C), contiguous, in the type of ``tokens``; differentiable any number
        of times.

    Raises:
        ValueError: if the grid does not match N, a grid is not two positive integers, or too large for 64 bits, or the
            type is another.
    """
    source, target = as_grid(source_grid, "source_grid"), as_grid(target_grid, "target_grid")
    if tokens.dim() < 2 or tokens.shape[-2] != num_tokens(source):
        raise ValueError(
            f"tokens of shape {tuple(tokens.shape)} do not lie on source_grid {source}: "
            f"the last axis but one must be {source[0]} x {source[1]} = {num_tokens(source)}"
        )
    check_type(tokens, "tokens")
    check_flag(antialias, "antialias")
    check_tokens(tokens, source, target)
    return resample_tokens_op(tokens, source, target, antialias)
