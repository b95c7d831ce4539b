"""One shape of benches/shapes.py on the GPU: the calls to compare, and the floors under them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benches.eager import eager_neighbours
from benches.gpu.measure import Gpu
from benches.shapes import Shape
from crepa_kernels.backends.triton.clock import Step
from crepa_kernels.grid import plan_alignment


@dataclass(frozen=True)
class Floor:
    """The least time of forward + backward in milliseconds, what it is made of, and the formula with its numbers.

    Attributes:
        honest_ms: the vendor's three products at this shape, and the passes over tokens x D and tokens x E.
        weights_ms: the passes over (E, D) in fp32, in no other floor: W read and W' written, then dW' and W read and
            dW written.
        physical_ms: the larger of the operations at the best matrix rate and the bytes that must move at the copy rate.
        operations: matrix operations.
        moved: bytes that must move.
        formula: of the first and the last.
    """

    honest_ms: float
    weights_ms: float
    physical_ms: float
    operations: int
    moved: int
    formula: str


class Workload:
    """Inputs of one shape in its type, and fp32 copies for the eager baseline while it runs."""

    def __init__(self, shape: Shape, gpu: Gpu):
        self.shape, self.gpu = shape, gpu
        self.dtype = getattr(torch, shape.dtype)
        self.plan = plan_alignment(shape.spatial_align, shape.student_grid, shape.teacher_grid, shape.antialias)
        self.h, self.y, self.projector = shape.inputs(shape.frames, gpu.device)

    def step(self, loss: Callable[[], torch.Tensor], h: torch.Tensor | None = None) -> Step:
        """Forward + backward, its gradients dropped."""
        inputs = [self.h if h is None else h, *self.projector.parameters()]
        return lambda: torch.autograd.grad(loss(), inputs)

    def triton(self, **options: Any) -> Step:
        return self.step(lambda: self.shape.loss(self.h, self.y, self.projector, "triton", **options))

    def eager_fp32(self) -> Step:
        h, y = self.h.detach().float().requires_grad_(), self.y.float()
        return self.step(lambda: self.shape.loss(h, y, self.projector, "reference"), h)

    def compiled(self) -> Step:
        shape = self.shape
        grids = shape.student_grid, shape.teacher_grid, shape.antialias
        return self.step(self.gpu.compiled(lambda: eager_neighbours(self.h, self.y, self.projector, *grids)))

    def floor(self, copy_rate: float, matrix_rate: float) -> Floor:
        shape, plan = self.shape, self.plan
        rows = shape.frames * plan.tokens
        x, w, q = (
            torch.randn(size, device=self.gpu.device, dtype=self.dtype)
            for size in (
                (rows, shape.hidden_size), (shape.feature_size, shape.hidden_size), (rows, shape.feature_size)
            )
        )  # fmt: skip
        wide: dict[str, Any] = {"out_dtype": torch.float32} if x.is_cuda and torch.version.hip is None else {}
        products: dict[str, Step] = {
            "p": lambda: x @ w.t(),
            "dx": lambda: q @ w,
            "dW": lambda: torch.mm(q.t(), x, **wide),
        }
        products["all"] = lambda: [product() for name, product in products.items() if name != "all"]
        times = self.gpu.interleaved({name: self.gpu.graphed(product) for name, product in products.items()})
        h_bytes, x_bytes = 2 * self.h.numel(), 2 * x.numel()
        e_bytes, y_bytes = 2 * q.numel(), 2 * self.y.numel()
        resampled = plan.student != "keep"
        passes = 2 * h_bytes + h_bytes + 2 * x_bytes + 3 * e_bytes if resampled else h_bytes + 3 * e_bytes
        moved = 3 * h_bytes + 2 * x_bytes if resampled else 3 * h_bytes + 2 * y_bytes
        operations = 6 * rows * shape.hidden_size * shape.feature_size
        honest = times["all"].median + passes / copy_rate * 1e3
        weights = (4 + 2 + 4 + 4 + 4) * w.numel() / copy_rate * 1e3
        physical = max(operations / matrix_rate, moved / copy_rate) * 1e3
        parts = "2 h + dh + 2 x + 3 rows E" if resampled else "h + 3 rows E"
        each = ", ".join(f"{name} {time.median:.4f}" for name, time in times.items() if name != "all")
        formula = (
            f"honest = products {times['all'].median:.4f} ms in one graph (each in its own: {each}) + ({parts}) x 2 "
            f"bytes = {passes} B / copy rate; "
            f"physical = max(6 rows D E = {operations} / matrix rate, {moved} B / copy rate); "
            f"rows {rows}, D {shape.hidden_size}, E {shape.feature_size}"
        )
        return Floor(honest, weights, physical, operations, moved, formula)
