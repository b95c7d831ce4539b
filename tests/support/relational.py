"""Drawn configurations of the relational loss, and their exact results from its definition, in float64.

As ``cases`` and ``oracle`` for CREPA's loss: what is drawn there of shapes, masks, grids, weights and memory is drawn
here, and nothing of the package is used for what is exact.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import Case, draw, simple
from oracle import NORM_FLOOR, StudentSide, Truth, row_norms, student_side

from crepa_kernels import relational_loss

PAIRS = ("all", "frame", "cross", "neighbours")
MARGINS = (None, None, None, 0.0, 0.05, 0.1, 0.4)
Tensors = dict[str, torch.Tensor | None]


@dataclass(frozen=True)
class Related:
    """A case of the relational loss: ``case`` has all but the two options that it alone has."""

    case: Case
    pairs: str = "all"
    margin: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``relational_loss``."""
        shared = (
            "student_grid", "teacher_grid", "distance", "tau", "spatial_align", "antialias", "frame_index",
            "frame_mask", "teacher_mask",
        )  # fmt: skip
        return {"pairs": self.pairs, "margin": self.margin, **{name: getattr(self.case, name) for name in shared}}

    def run(self, tensors: Tensors, backend: str) -> dict[str, torch.Tensor]:
        """The loss and the gradients that the case asks for, by the name of the input."""
        projector = self.case.projector(tensors)
        leaves = self.case.leaves(tensors, projector)
        loss = relational_loss(leaves["h"], tensors["y"], projector, backend=backend, **self.options)
        return {"loss": loss.detach(), **self.case.gradients(loss, leaves)}


def draw_related(seed: int) -> Related:
    """The configuration of ``seed``; each way of choosing pairs goes with each of aligning the grids."""
    rng = random.Random(-1 - seed)
    case, pairs, margin = draw(seed), PAIRS[(seed + seed // 8) % len(PAIRS)], rng.choice(MARGINS)
    if seed % 6 != 1:  # those that compare nothing are many enough without
        if not case.counted.any():
            case = replace(case, frame_mask=None, teacher_mask=None)
        if case.frames == 1 and pairs == "cross":
            pairs = "frame"
        if case.frames > 1 and case.student_grid != case.teacher_grid and case.spatial_align == "pool":
            pairs = "all" if pairs == "frame" else pairs
    return Related(case, pairs, margin)


def simply_related(pairs: str = "all", margin: float | None = None, **changes: Any) -> Related:
    return Related(simple(**changes), pairs, margin)


def pair_weights(related: Related) -> torch.Tensor:
    """(B, T, T), w[f, k] over the sum of all of the clip's and over the clips; 0 outside the masks."""
    case = related.case
    weights = torch.zeros(case.batch, case.frames, case.frames, dtype=torch.float64)
    for b in range(case.batch):
        frames = case.counted[b].nonzero().flatten().tolist()
        for f in frames:
            for k in frames:
                weights[b, f, k] = {
                    "all": 1.0,
                    "frame": float(f == k),
                    "cross": float(f != k),
                    "neighbours": math.exp(-abs(f - k) / case.tau) * (abs(f - k) <= case.distance),
                }[related.pairs]
    sums = weights.sum(dim=(1, 2))
    return weights / torch.where(sums > 0, sums, 1.0)[:, None, None] / max(int((sums > 0).sum()), 1)


def teacher_rows(case: Case, side: StudentSide) -> torch.Tensor:
    """(B, T, M, E), unit rows of the frames in the loss; zero elsewhere."""
    index = torch.arange(case.frames) if case.frame_index is None else torch.as_tensor(case.frame_index)
    index = index.expand(case.batch, case.frames)
    rows = torch.zeros(side.p.shape, dtype=side.p.dtype)
    for b, f in case.counted.nonzero().tolist():
        y = side.to_teacher @ side.y[b, index[b, f]]
        rows[b, f] = y / row_norms(y)
    return rows


def relational_truth(
    related: Related, tensors: Tensors, wide: torch.dtype = torch.float64, narrow: torch.dtype | None = None
) -> Truth:
    """Loss and all gradients in float64, or with ``wide`` fp32 by eager arithmetic; the arguments are ``truth``'s."""
    case, counted = related.case, related.case.counted
    side = student_side(case, tensors, wide, narrow)
    tokens = side.p.shape[2]
    u = torch.where(counted[..., None, None], side.p / row_norms(side.p), 0.0).flatten(1, 2)  # (B, T M, E)
    v = teacher_rows(case, side).flatten(1, 2)
    weights = pair_weights(related).to(wide) / tokens**2
    weights = weights.repeat_interleave(tokens, 1).repeat_interleave(tokens, 2)  # (B, T M, T M)
    a = u @ u.mT - v @ v.mT
    cost = a**2 if related.margin is None else torch.where(a.abs() > related.margin, a.abs() - related.margin, 0.0)
    loss = (weights * cost).sum()
    gradients = torch.autograd.grad(loss, list(side.leaves.values()))
    results = {"loss": loss.detach(), **dict(zip(side.leaves, gradients, strict=True))}
    with torch.no_grad():
        floored = side.floored(counted)
        if wide != torch.float64:
            return Truth(results, {}, floored, 1.0)
        kind = torch.finfo(narrow or tensors["h"].dtype)
        roundings = _Roundings(related, side, u, v, weights, a, kind.eps)
        squares = {"loss": roundings.of_loss(), **roundings.of_leaves()}
        return Truth(results, squares, floored, side.cancelled(counted))


@dataclass
class _Roundings:
    """How far a relative error of one, in each number of the rows and apart, would move the loss and the gradient.

    To first order, each error apart and its square added, as ``oracle.Sums`` does for sums. Here an error of a row
    reaches its cosine with every other row, so it is followed to the gradient as one, whatever many sums it is in. Of
    second order is what is left of the loss where all differences of cosines are zero.

    With a margin the slope jumps where |a| is the margin, and rounding decides on which side of it a pair of tokens
    within its reach is: both are right.
    """

    related: Related
    side: StudentSide
    u: torch.Tensor  # (B, N, E), the student's unit rows
    v: torch.Tensor  # (B, N, E), the teacher's
    weights: torch.Tensor  # (B, N, N)
    a: torch.Tensor  # (B, N, N)
    eps: float

    def __post_init__(self) -> None:
        self.cancelled2 = self.side.cancelled2.flatten(1, 2)  # (B, N, 1)
        u2, v2 = self.u**2, self.v**2
        of_u2 = u2 @ u2.mT
        # Errors of a, squared. That of a row's norm, in fp32 (fp64) whatever the type of h, is one of all its numbers.
        wide = torch.finfo(torch.float64 if self.eps < 1e-12 else torch.float32).eps / self.eps
        norms2 = 2 * wide**2 * ((self.u @ self.u.mT) ** 2 + (self.v @ self.v.mT) ** 2)
        self.a2 = of_u2 * (self.cancelled2 + self.cancelled2.mT) + 2 * v2 @ v2.mT + norms2
        margin = self.related.margin
        if margin is None:
            self.slope, self.near = 2 * self.a, torch.zeros_like(self.a)
        else:
            self.slope = torch.where(self.a.abs() > margin, self.a.sign(), 0.0)
            self.near = ((self.a.abs() - margin).abs() <= 8 * self.eps * self.a2.sqrt()).double()

    def of_loss(self) -> torch.Tensor:
        first = self.weights * self.slope
        rows2 = (2 * first @ self.u) ** 2 * self.u**2 * self.cancelled2 + (2 * first @ self.v) ** 2 * self.v**2
        found = rows2.sum() + (first**2 * self.a2).sum()
        if self.related.margin is None:
            return found + (self.eps * (self.weights * self.a2).sum()) ** 2
        return found + (self.weights * self.near * self.a2.sqrt()).sum() ** 2

    def of_leaves(self) -> dict[str, torch.Tensor]:
        found = self.side.of_leaves(self.of_p())
        if self.related.margin is None:
            return found
        # As many as are near may change sides at once, and what each changes is whole.
        sides = self.side.of_leaves(self._changes_of_sides(), power=1)
        return {name: value + (sides[name] / (8 * self.eps)) ** 2 for name, value in found.items()}

    def _changes_of_sides(self) -> torch.Tensor:
        """(B, T, M, E), the most that the gradient of p changes by where every pair near the margin changes sides."""
        # A row's part along itself is taken off again.
        others = 1 - torch.eye(self.a.shape[1], dtype=torch.float64)
        moved = (2 * self.weights * self.near * others) @ self.u.abs()
        moved = moved + self.u.abs() * (self.u.abs() * moved).sum(dim=-1, keepdim=True)
        return (moved / row_norms(self.side.p).flatten(1, 2)).unflatten(1, self.side.p.shape[1:3])

    def of_p(self) -> torch.Tensor:
        """(B, T, M, E), of the gradient of p."""
        first, u2, v2 = self.weights * self.slope, self.u**2, self.v**2
        gradient = 2 * first @ self.u
        moved2 = (2 * first) ** 2 @ (u2 * self.cancelled2)  # the other rows themselves
        if self.related.margin is None:
            curved2 = (4 * self.weights) ** 2  # of the differences of cosines
            moved2 += self._own_row(self.u, u2 * self.cancelled2) + self._own_row(self.v, v2)
            moved2 += (curved2 * ((u2 @ (u2 * self.cancelled2).mT) + v2 @ v2.mT)) @ u2
        else:
            moved2 += (2 * self.weights * self.near) ** 2 @ u2
        norms = row_norms(self.side.p).flatten(1, 2)
        above = norms > NORM_FLOOR

        def tangent2(row: torch.Tensor) -> torch.Tensor:
            """Square of ``row`` and of what the cosine's derivative takes off it along u."""
            terms = self.u * row
            along2 = torch.maximum(terms.sum(dim=-1, keepdim=True) ** 2, (terms**2).sum(dim=-1, keepdim=True))
            return row**2 + torch.where(above, along2 * u2, 0.0)

        dp2 = (tangent2(gradient) * self.cancelled2 + tangent2(moved2.sqrt())) / norms**2
        return dp2.unflatten(1, self.side.p.shape[1:3])

    def _own_row(self, rows: torch.Tensor, errors2: torch.Tensor) -> torch.Tensor:
        """(B, N, E): an error of row i, whose squares are ``errors2``, through its cosines with all of ``rows``."""
        frames, tokens = self.side.p.shape[1:3]
        weights = self.weights[:, ::tokens]  # (B, T, N): those of a frame's tokens are alike
        through = torch.einsum("bfj,bjd,bje->bfde", weights, rows, self.u)
        return torch.einsum("bfid,bfde->bfie", errors2.unflatten(1, (frames, tokens)), (4 * through) ** 2).flatten(1, 2)
