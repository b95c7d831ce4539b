"""CREPA in float64, loop by loop from its definition: what every backend is tested against.

Nothing of the package is used here: the resampling is a pair of explicit weight matrices, LayerNorm and the norms are
spelled out, and frames are compared one pair at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

NORM_FLOOR = 1e-12
METRICS = ("loss", "similarity", "self_similarity", "alignment_score", "frame_similarity")


def axis_weights(source: int, target: int, antialias: bool) -> torch.Tensor:
    """(target, source) bilinear weights with half-pixel centres: a triangle around each target centre.

    The triangle is one source cell wide to each side, or ``source / target`` cells where the axis shrinks and
    ``antialias`` is on; what falls outside the frame is cut off and the rest scaled to sum to 1.
    """
    scale = source / target
    reach = max(scale, 1.0) if antialias else 1.0
    centres = (torch.arange(target, dtype=torch.float64) + 0.5) * scale
    cells = torch.arange(source, dtype=torch.float64) + 0.5
    weights = (1 - (cells[None, :] - centres[:, None]).abs() / reach).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)


def grid_weights(source: tuple[int, int], target: tuple[int, int], antialias: bool) -> torch.Tensor:
    """(tokens of ``target``, tokens of ``source``), separable, raster order."""
    rows, columns = (axis_weights(s, t, antialias) for s, t in zip(source, target, strict=True))
    return torch.kron(rows, columns)


def alignment(
    spatial_align: str, student: tuple[int, int], teacher: tuple[int, int], antialias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, P) and (M, N): what takes the student's and the teacher's tokens to the common grid."""
    students, teachers = student[0] * student[1], teacher[0] * teacher[1]
    if student == teacher:
        return torch.eye(students, dtype=torch.float64), torch.eye(teachers, dtype=torch.float64)
    if spatial_align == "pool":
        return tuple(torch.full((1, n), 1 / n, dtype=torch.float64) for n in (students, teachers))  # type: ignore[return-value]
    student_moves = {"student": False, "teacher": True, "smaller": students > teachers}[spatial_align]
    if student_moves:
        return grid_weights(student, teacher, antialias), torch.eye(teachers, dtype=torch.float64)
    return torch.eye(students, dtype=torch.float64), grid_weights(teacher, student, antialias)


def row_norms(rows: torch.Tensor) -> torch.Tensor:
    """max(L2 norm, 1e-12); below the floor a constant, so the gradient is that of dividing by 1e-12."""
    squares = (rows * rows).sum(dim=-1, keepdim=True)
    above = squares > NORM_FLOOR**2
    return torch.where(above, torch.where(above, squares, 1.0).sqrt(), NORM_FLOOR)


@dataclass
class Truth:
    """The exact loss, metrics and gradients of one case, and the size of their summands.

    Attributes:
        results: loss and metrics by name, and gradients by the name of the input.
        squares: of the same shapes, each number's square without cancellation (see ``Sums``).
        floored: (B, T, P) bool, tokens whose gradient went through a row below the norm's floor.
        cancelled: at least 1, how much larger than a row of p its summands are, in the worst row.
    """

    results: dict[str, torch.Tensor]
    squares: dict[str, torch.Tensor]
    floored: torch.Tensor
    cancelled: float

    def part(self, name: str, tensor: torch.Tensor, floored: bool) -> torch.Tensor:
        """Rows of ``tensor`` (of the shape of result ``name``) to compare together: divided by 1e-12, or not.

        In dh alone are both kinds, 1e12 apart; together nobody would see an error in the smaller ones.
        """
        if name == "h":
            return tensor[self.floored == floored]
        return tensor.new_zeros(0) if floored else tensor.flatten()

    def size(self, name: str, floored: bool = False) -> float:
        """The norm of result ``name`` without cancellation; not smaller than the norm that it has."""
        norms = [self.part(name, t, floored).double() for t in (self.squares[name], self.results[name])]
        return max(float(norms[0].sum()) ** 0.5, float(norms[1].norm()))


def neighbour_weights(case: Any, exists: torch.Tensor) -> torch.Tensor:
    """(B, T, T): w(|k - f|) where k is an existing neighbour of f, else 0."""
    weights = torch.zeros(case.batch, case.frames, case.frames, dtype=torch.float64)
    for b in range(case.batch):
        distance = max(min(case.distance, int(exists[b].sum()) - 1), 0)
        for f in range(case.frames):
            offsets = range(1, distance + 1) if case.cumulative else [distance] if distance else []
            for offset in offsets:
                for k in (f - offset, f + offset):
                    if 0 <= k < case.frames and exists[b, k]:
                        weights[b, f, k] = math.exp(-offset / case.tau)
    return weights


@dataclass
class StudentSide:
    """The way from h to p, and the teacher's features before theirs.

    Attributes:
        leaves: h, gamma, beta, weight and bias by name, those that there are.
        p: (B, T, M, E), on the common grid.
        x, affine, inverse_std: LayerNorm of h (B, T, P, D), without and with its affine part, and 1/std.
        y: (B, S, N, E), as given.
        to_student, to_teacher: (M, P) and (M, N), what takes the two sides to the common grid.
    """

    leaves: dict[str, torch.Tensor]
    p: torch.Tensor
    x: torch.Tensor
    affine: torch.Tensor
    inverse_std: torch.Tensor
    y: torch.Tensor
    to_student: torch.Tensor
    to_teacher: torch.Tensor

    def floored(self, counted: torch.Tensor) -> torch.Tensor:
        """(B, T, P) bool, tokens of the frames ``counted`` whose gradient goes through a row below the norm's floor."""
        below = (row_norms(self.p)[..., 0] <= NORM_FLOOR) & counted[..., None]
        return (below.to(self.p.dtype) @ self.to_student) > 0

    @property
    def cancelled2(self) -> torch.Tensor:
        """(B, T, M, 1), at least 1: the summands of a row of p over what is left of them, squared."""
        weight, bias = self.leaves.get("weight"), self.leaves.get("bias")
        summands2 = self.affine**2 if weight is None else self.affine**2 @ (weight**2).T
        summands2 = self.to_student**2 @ (summands2 if bias is None else summands2 + bias**2)
        norms = row_norms(self.p)
        lost = summands2.sum(dim=-1, keepdim=True) / norms**2
        return torch.where(norms > NORM_FLOOR, lost.clamp(min=1), 1.0)

    def cancelled(self, counted: torch.Tensor) -> float:
        """The root of the largest of the above in the frames ``counted``."""
        cancelled2 = self.cancelled2[counted]
        return float(cancelled2.max()) ** 0.5 if cancelled2.numel() else 1.0

    def of_leaves(self, dp: torch.Tensor, power: int = 2) -> dict[str, torch.Tensor]:
        """Of the gradients of ``leaves``, the sum of summands to a power, from that of p's (B, T, M, E).

        The power is 2 for errors that are not related, 1 for the most that related ones make.
        """
        to_student, x, affine = (tensor.abs() ** power for tensor in (self.to_student, self.x, self.affine))
        dp = to_student.T @ dp  # (B, T, P, E)
        if "weight" not in self.leaves:
            return {"h": dp}
        weight, gamma = self.leaves["weight"].abs() ** power, self.leaves.get("gamma")
        daffine = dp @ weight
        dx = daffine if gamma is None else daffine * gamma.abs() ** power
        row_sums = dx.sum(dim=-1, keepdim=True) + x * (dx * x).sum(dim=-1, keepdim=True)
        return {
            "h": self.inverse_std**power * (dx + row_sums / self.x.shape[-1] ** power),
            "gamma": (daffine * x).sum(dim=(0, 1, 2)),
            "beta": daffine.sum(dim=(0, 1, 2)),
            "weight": torch.einsum("btpe,btpd->ed", dp, affine),
            "bias": dp.sum(dim=(0, 1, 2)),
        }


def student_side(
    case: Any, tensors: dict[str, torch.Tensor | None], wide: torch.dtype, narrow: torch.dtype | None
) -> StudentSide:
    """The student's side of ``case`` in ``wide``, fp64 or as eager arithmetic has it: see ``truth``."""
    exact = wide == torch.float64
    narrow = wide if exact else narrow or tensors["h"].dtype
    inputs = {name: None if t is None else t.detach().to(wide).contiguous() for name, t in tensors.items()}
    counted = case.counted
    inputs["h"] = torch.where(counted[..., None, None], inputs["h"], 0.0)
    leaves = {name: t.requires_grad_() for name, t in inputs.items() if t is not None and name != "y"}
    h, y, gamma, beta, weight, bias = (inputs[name] for name in ("h", "y", "gamma", "beta", "weight", "bias"))
    sides = alignment(case.spatial_align, case.student_grid, case.teacher_grid, case.antialias)
    to_student, to_teacher = (side.to(wide) for side in sides)
    if weight is None:  # h is p: no LayerNorm, nothing narrow
        given = h.detach()
        return StudentSide(
            leaves, to_student @ h, given, given, torch.ones_like(given[..., :1]), y, to_student, to_teacher
        )

    centered = h - h.mean(dim=-1, keepdim=True)
    inverse_std = ((centered**2).mean(dim=-1, keepdim=True) + case.eps).rsqrt()
    x = centered * inverse_std
    affine = x if gamma is None else x * gamma
    affine = affine if beta is None else affine + beta
    if not exact:
        affine = torch.nn.functional.layer_norm(h, h.shape[-1:], gamma, beta, case.eps)
    p = (affine.to(narrow) @ weight.to(narrow).T).to(wide)
    p = to_student @ (p if bias is None else p + bias)  # (B, T, M, E)
    if exact and h.shape[-1] == 1:
        # LayerNorm of one number is all cancellation, of fp32 (fp64) numbers whatever the type of h.
        kind = tensors["h"].dtype
        x = (
            h * inverse_std * torch.finfo(torch.promote_types(kind, torch.float32)).eps / torch.finfo(kind).eps
        ).detach()
        affine = (affine.abs() + x.abs()).detach()
    return StudentSide(leaves, p, x.detach(), affine.detach(), inverse_std.detach(), y, to_student, to_teacher)


def truth(
    case: Any,
    tensors: dict[str, torch.Tensor | None],
    wide: torch.dtype = torch.float64,
    narrow: torch.dtype | None = None,
) -> Truth:
    """Loss, metrics and all gradients of ``case`` on ``tensors`` (h, y, gamma, beta, weight, bias), in float64.

    With ``wide`` fp32 this is the eager arithmetic that crepa_loss promises for its types instead: ``F.layer_norm``
    and all else in fp32, the product's operands and result rounded to ``narrow``, the type of h if not given. Its
    error is the yardstick of ``reference``.
    """
    exact = wide == torch.float64
    side = student_side(case, tensors, wide, narrow)
    p, y, leaves, exists, counted = side.p, side.y, side.leaves, case.existing, case.counted
    student = p / row_norms(p)

    weights = neighbour_weights(case, exists).to(wide)
    index = torch.arange(case.frames) if case.frame_index is None else torch.as_tensor(case.frame_index)
    index = index.expand(case.batch, case.frames)
    own, total = (torch.zeros(case.batch, case.frames, dtype=wide) for _ in range(2))
    own_rows, z = (torch.zeros(p.shape, dtype=wide) for _ in range(2))
    for b, f in counted.nonzero().tolist():
        for k, w in [(f, 1.0)] + [(k, float(w)) for k, w in enumerate(weights[b, f]) if w > 0]:
            rows = side.to_teacher @ y[b, index[b, k]]
            rows = rows / row_norms(rows)
            s = (student[b, f] * rows).sum() / len(rows)
            total[b, f] = total[b, f] + w * s
            z[b, f] += w * rows
            if k == f:
                own[b, f] = s
                own_rows[b, f] = rows

    divisor = 1 + weights.sum(dim=-1)
    loss_divisor = divisor if case.normalize_neighbour_sum else torch.ones_like(divisor)
    clips = [b for b in range(case.batch) if counted[b].any()]
    cost = torch.zeros(case.batch, case.frames, dtype=wide)  # -d loss / d total
    for b in clips:
        cost[b] = counted[b].to(wide) / len(clips) / loss_divisor[b]
        cost[b] /= counted[b].sum() if case.normalize_by_frames else 1
    seen = max(int(counted.sum()), 1)
    values = {
        "loss": -(cost * total).sum(),
        "similarity": (total / divisor)[counted].sum() / seen,
        "self_similarity": own[counted].sum() / seen,
        "alignment_score": (total / loss_divisor)[counted].sum() / seen,
        "frame_similarity": own,
    }
    connected = values["loss"] + 0 * p.sum()  # so that there are zeros to compare where no frame counts
    gradients = dict(zip(leaves, torch.autograd.grad(connected, list(leaves.values())), strict=True))
    results = {name: value.detach() for name, value in {**values, **gradients}.items()}
    with torch.no_grad():
        if not exact:
            return Truth(results, {}, side.floored(counted), 1.0)
        sums = Sums(side, z, own_rows)
        squares = {**sums.of_gradients(cost), **sums.of_values(cost, seen)}
        return Truth(results, squares, side.floored(counted), side.cancelled(counted))


@dataclass
class Sums:
    """What is summed on the way to each result, for the norm that the result would have without cancellation.

    That norm takes the root of the summands' squares for each sum: the size of a sum of unrelated summands. Where
    they cancel (the cosine's gradient for E = 1, LayerNorm's for D = 1, a row of p that comes out near zero, a
    gradient over many tokens) the exact result is smaller, but each summand is still rounded in proportion to its own
    size, and these roundings, being unrelated, add up to eps times this norm. Sums of absolute values would be the
    worst case of aligned roundings, sqrt(n) looser, and would hide real errors in bf16. LayerNorm's own h - mean is
    left out for D > 1, so that mean / std = 100 is no excuse: there eager's own error is the bound.
    """

    side: StudentSide
    z: torch.Tensor
    own_rows: torch.Tensor

    def of_gradients(self, cost: torch.Tensor) -> dict[str, torch.Tensor]:
        p = self.side.p
        norms = row_norms(p)
        unit = p / norms
        terms = unit * self.z
        cosine2 = torch.maximum(terms.sum(dim=-1, keepdim=True) ** 2, (terms**2).sum(dim=-1, keepdim=True))
        along2 = torch.where(norms > NORM_FLOOR, cosine2 * unit**2, 0.0)
        dp2 = (cost[..., None, None] / p.shape[2] / norms) ** 2 * (self.z**2 + along2) * self.side.cancelled2
        return self.side.of_leaves(dp2)

    def of_values(self, cost: torch.Tensor, seen: int) -> dict[str, torch.Tensor]:
        unit, tokens = self.side.p / row_norms(self.side.p), self.side.p.shape[2]
        lost2 = self.side.cancelled2
        total2, own2 = ((lost2 * (unit * k) ** 2).sum(dim=(-2, -1)) / tokens**2 for k in (self.z, self.own_rows))
        return {
            "loss": (cost**2 * total2).sum(),
            "similarity": total2.sum() / seen**2,
            "self_similarity": own2.sum() / seen**2,
            "alignment_score": total2.sum() / seen**2,
            "frame_similarity": own2,
        }
