"""The correctness gate: on this GPU, against float64, before any time is taken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from crepa_kernels import CrepaProjector, crepa_loss

# Both neighbour modes, each way of the student's side, masks, both paths, odd and even sizes.
_EQUAL: dict[str, Any] = {"student_grid": (9, 13), "teacher_grid": (9, 13)}
CASES: list[dict[str, Any]] = [
    _EQUAL,
    _EQUAL | {"recompute": True},
    _EQUAL | {"cumulative": True, "distance": 8},
    _EQUAL | {"cumulative": True, "distance": 8, "recompute": True},
    _EQUAL | {"frame_mask": True, "distance": 2, "normalize_neighbour_sum": True},
    {"student_grid": (9, 13), "teacher_grid": (6, 6), "spatial_align": "teacher"},
    {"student_grid": (9, 13), "teacher_grid": (4, 5), "spatial_align": "teacher", "frame_mask": True},
    {"student_grid": (9, 13), "teacher_grid": (12, 14), "spatial_align": "teacher", "recompute": True},
    {"student_grid": (9, 13), "teacher_grid": (6, 6), "spatial_align": "pool"},
]
WIDTHS = [(1536, 384), (1536, 1536), (5120, 1536), (1001, 77)]


class GateError(Exception):
    """A result is further from float64 than max(2 x eager's error, 8 eps) allows."""


def _results(backend: str, dtype: torch.dtype, width: int, features: int, options: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    frames = 11
    students, teachers = (options[side][0] * options[side][1] for side in ("student_grid", "teacher_grid"))
    h = torch.randn(1, frames, students, width, device="cuda").mul_(3).add_(5).bfloat16()
    y = torch.randn(1, frames, teachers, features, device="cuda").bfloat16()
    kind = torch.float64 if backend == "exact" else dtype
    projector = CrepaProjector(width, features).cuda().to(torch.promote_types(kind, torch.float32))
    h = h.to(kind).requires_grad_()
    call = dict(options)
    if call.get("frame_mask"):
        call["frame_mask"] = torch.arange(frames, device="cuda")[None] % 3 != 0
    name = "reference" if backend == "exact" else backend
    output = crepa_loss(h, y.to(kind), projector, backend=name, **call)
    names = ("dh", "dgamma", "dbeta", "dweight", "dbias")
    grads = torch.autograd.grad(output.loss, [h, *projector.parameters()])
    return {"loss": output.loss.detach(), "frame_similarity": output.frame_similarity} | dict(
        zip(names, grads, strict=True)
    )


def check() -> Iterator[str]:
    """One line a case that passed; GateError at the first that does not.

    The error's norm is at most twice that of eager arithmetic in the same type, or 8 eps of the exact norm.
    """
    for dtype in (torch.bfloat16, torch.float32):
        for width, features in WIDTHS:
            worst = 0.0
            for options in CASES:
                exact = _results("exact", dtype, width, features, options)
                eager = _results("reference", dtype, width, features, options)
                found = _results("triton", dtype, width, features, options)
                again = _results("triton", dtype, width, features, options)
                for name, value in found.items():
                    truth = exact[name].double()
                    error, other = ((made[name].double() - truth).norm().item() for made in (found, eager))
                    bound = max(2 * other, 8 * torch.finfo(dtype).eps * truth.norm().item())
                    where = f"{name}, {dtype}, D {width}, E {features}, {options}"
                    if not error <= bound:
                        raise GateError(f"{where}: error {error:.3e} > {bound:.3e}, eager's {other:.3e}")
                    if not torch.equal(value, again[name]):
                        raise GateError(f"{where}: two runs differ")
                    worst = max(worst, error / bound)
            yield f"{dtype}, D {width}, E {features}: {len(CASES)} cases, at most {worst:.2f} of the bound"
