"""One shape of benches/shapes.py on the GPU: the calls to compare, and the floors under them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benches.gpu.measure import Step, timed
from benches.shapes import Shape
from crepa_kernels import CrepaProjector, crepa_loss
from crepa_kernels.grid import count, plan_alignment


@dataclass(frozen=True)
class Floor:
    """The least time of forward + backward in milliseconds, what it is made of, and the formula with its numbers."""

    honest_ms: float
    physical_ms: float
    operations: int
    moved: int  # bytes
    formula: str


class Workload:
    """bf16 inputs of one shape, and fp32 copies for the eager baseline while it runs."""

    def __init__(self, shape: Shape):
        self.shape = shape
        self.plan = plan_alignment(shape.spatial_align, shape.student_grid, shape.teacher_grid, shape.antialias)
        torch.manual_seed(0)
        self.h = self._normal(count(shape.student_grid), shape.hidden_size).requires_grad_()
        self.y = self._normal(count(shape.teacher_grid), shape.feature_size)
        self.projector = CrepaProjector(shape.hidden_size, shape.feature_size).cuda()

    def _normal(self, tokens: int, width: int) -> torch.Tensor:
        return torch.randn(1, self.shape.frames, tokens, width, device="cuda", dtype=torch.bfloat16)

    @property
    def inputs(self) -> list[torch.Tensor]:
        return [self.h, *self.projector.parameters()]

    def loss(
        self, backend: str, h: torch.Tensor | None = None, y: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        return crepa_loss(
            self.h if h is None else h, self.y if y is None else y, self.projector,
            student_grid=self.shape.student_grid, teacher_grid=self.shape.teacher_grid,
            spatial_align=self.shape.spatial_align, antialias=self.shape.antialias, backend=backend, **options,
        ).loss  # fmt: skip

    def step(self, loss: Callable[[], torch.Tensor], inputs: list[torch.Tensor] | None = None) -> Step:
        """Forward + backward, its gradients dropped."""
        return lambda: torch.autograd.grad(loss(), self.inputs if inputs is None else inputs)

    def triton(self, **options: Any) -> Step:
        return self.step(lambda: self.loss("triton", **options))

    def eager_fp32(self) -> Step:
        h, y = self.h.detach().float().requires_grad_(), self.y.float()
        return self.step(lambda: self.loss("reference", h, y), [h, *self.projector.parameters()])

    def compiled(self) -> Step:
        torch.compiler.reset()
        compiled = torch.compile(lambda: self.loss("reference"), fullgraph=True)
        return self.step(compiled)

    def floor(self, copy_rate: float, matrix_rate: float) -> Floor:
        """Two lower bounds in ms: the honest one, made of what is measured here, and the physical one.

        Honest: the vendor's three products at this shape, and ``passes`` bytes at the copy rate. Physical: the larger
        of the operations at the best matrix rate and the bytes that must move at the copy rate.
        """
        shape, plan = self.shape, self.plan
        rows = shape.frames * plan.tokens
        x = torch.randn(rows, shape.hidden_size, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(shape.feature_size, shape.hidden_size, device="cuda", dtype=torch.bfloat16)
        q = torch.randn(rows, shape.feature_size, device="cuda", dtype=torch.bfloat16)
        forward, dx = timed(lambda: x @ w.t()).median, timed(lambda: q @ w).median
        dw = timed(lambda: torch.mm(q.t(), x, out_dtype=torch.float32) if torch.version.cuda else q.t() @ x).median
        h_bytes, x_bytes = 2 * self.h.numel(), 2 * x.numel()
        e_bytes, y_bytes = 2 * q.numel(), 2 * self.y.numel()
        resampled = plan.student != "keep"
        passes = 2 * h_bytes + h_bytes + 2 * x_bytes + 3 * e_bytes if resampled else h_bytes + 3 * e_bytes
        moved = 3 * h_bytes + 2 * x_bytes if resampled else 3 * h_bytes + 2 * y_bytes
        operations = 6 * rows * shape.hidden_size * shape.feature_size
        honest = forward + dx + dw + passes / copy_rate * 1e3
        physical = max(operations / matrix_rate, moved / copy_rate) * 1e3
        parts = "2 h + dh + 2 x + 3 rows E" if resampled else "h + 3 rows E"
        formula = (
            f"honest = products {forward:.4f} + {dx:.4f} + {dw:.4f} ms + ({parts}) x 2 bytes = {passes} B / copy rate; "
            f"physical = max(6 rows D E = {operations} / matrix rate, {moved} B / copy rate); "
            f"rows {rows}, D {shape.hidden_size}, E {shape.feature_size}"
        )
        return Floor(honest, physical, operations, moved, formula)
