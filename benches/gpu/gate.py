"""The correctness gate: on this GPU, against float64, before any time is taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from benches.gpu.measure import Gpu
from crepa_kernels import CrepaProjector, crepa_loss

# Both neighbour modes, each way of the student's side, masks, both paths, odd and even sizes.
_EQUAL: dict[str, Any] = {"student_grid": (9, 13), "teacher_grid": (9, 13)}
CASES: dict[str, dict[str, Any]] = {
    "equal": _EQUAL,
    "recomputed": _EQUAL | {"recompute": True},
    "cumulative": _EQUAL | {"cumulative": True, "distance": 8},
    "cumulative-recomputed": _EQUAL | {"cumulative": True, "distance": 8, "recompute": True},
    "masked": _EQUAL | {"frame_mask": True, "distance": 2, "normalize_neighbour_sum": True},
    "fewer": {"student_grid": (9, 13), "teacher_grid": (6, 6), "spatial_align": "teacher"},
    "fewer-masked": {"student_grid": (9, 13), "teacher_grid": (4, 5), "spatial_align": "teacher", "frame_mask": True},
    "more-recomputed": {
        "student_grid": (9, 13), "teacher_grid": (12, 14), "spatial_align": "teacher", "recompute": True,
    },
    "pooled": {"student_grid": (9, 13), "teacher_grid": (6, 6), "spatial_align": "pool"},
}  # fmt: skip
WIDTHS = ((1536, 384), (1536, 1536), (5120, 1536), (1001, 77))
# The tokens' type and autocast's.
TYPES = {
    "bfloat16": (torch.bfloat16, None),
    "float32": (torch.float32, None),
    "float16": (torch.float16, None),
    "autocast": (torch.float32, torch.bfloat16),
}
# These take the others' kernels for other types: one pair of widths is enough.
MIXED = ("float16", "autocast")


class GateError(Exception):
    """A result is further from float64 than max(2 x eager's error, 8 eps) allows, or is not the same twice."""


def _results(
    device: str, backend: str, types: str, width: int, features: int, options: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    frames = 11
    students, teachers = (options[side][0] * options[side][1] for side in ("student_grid", "teacher_grid"))
    h = torch.randn(1, frames, students, width, device=device).mul_(3).add_(5).bfloat16()
    y = torch.randn(1, frames, teachers, features, device=device).bfloat16()
    dtype, autocast = (torch.float64, None) if backend == "exact" else TYPES[types]
    projector = CrepaProjector(width, features).to(device, torch.promote_types(dtype, torch.float32))
    h = h.to(dtype).requires_grad_()
    call = dict(options)
    if call.get("frame_mask"):
        call["frame_mask"] = torch.arange(frames, device=device)[None] % 3 != 0
    name = "reference" if backend == "exact" else backend
    with torch.autocast(torch.device(device).type, autocast, enabled=autocast is not None):
        output = crepa_loss(h, y.to(dtype), projector, backend=name, **call)
    names = ("dh", "dgamma", "dbeta", "dweight", "dbias")
    grads = torch.autograd.grad(output.loss, [h, *projector.parameters()])
    return {"loss": output.loss.detach(), "frame_similarity": output.frame_similarity.detach()} | dict(
        zip(names, grads, strict=True)
    )


def check(
    gpu: Gpu,
    cases: Sequence[str] = tuple(CASES),
    widths: Sequence[tuple[int, int]] = WIDTHS,
    types: Sequence[str] = tuple(TYPES),
) -> Iterator[str]:
    """One line for each type and pair of widths whose cases passed; GateError at the first case that does not.

    The error's norm is at most twice that of eager arithmetic in the same type, or 8 eps of the exact norm. A dry run
    has no numbers to compare, and compares shapes and types.
    """
    for kind in types:
        eps = torch.finfo(TYPES[kind][1] or TYPES[kind][0]).eps
        for width, features in widths[:1] if kind in MIXED else widths:
            worst = 0.0
            for name in cases:
                where = f"{name}, {kind}, D {width}, E {features}"
                call = gpu.device, kind, width, features, CASES[name]
                with gpu.launching():
                    found, again = (_results(call[0], "triton", *call[1:]) for _ in range(2))
                eager = _results(call[0], "reference", *call[1:])
                if gpu.dry:
                    _same_kinds(found, eager, where)
                    continue
                for key, value in found.items():
                    if not torch.equal(value, again[key]):
                        raise GateError(f"{key}, {where}: two runs differ")
                del again
                exact = _results(call[0], "exact", *call[1:])
                worst = max(worst, _compare(found, eager, exact, eps, where))
            found_out = "ran, nothing compared" if gpu.dry else f"at most {worst:.2f} of the bound"
            yield f"{kind}, D {width}, E {features}: {len(cases)} cases, {found_out}"


def _same_kinds(found: dict[str, torch.Tensor], eager: dict[str, torch.Tensor], where: str) -> None:
    for key, value in found.items():
        ours, theirs = ((made.shape, made.dtype) for made in (value, eager[key]))
        if ours != theirs:
            raise GateError(f"{key}, {where}: {ours}, the reference's is {theirs}")


def _compare(
    found: dict[str, torch.Tensor], eager: dict[str, torch.Tensor], exact: dict[str, torch.Tensor],
    eps: float, where: str,
) -> float:  # fmt: skip
    """The largest error as a share of its bound."""
    worst = 0.0
    for key, value in found.items():
        truth = exact[key].double()
        error, other = ((made.double() - truth).norm().item() for made in (value, eager[key]))
        bound = max(2 * other, 8 * eps * truth.norm().item())
        if not error <= bound:
            raise GateError(f"{key}, {where}: error {error:.3e} > {bound:.3e}, eager's {other:.3e}")
        worst = max(worst, error / bound if bound else 0.0)
    return worst
