"""What the loss keeps between forward and backward, and that it lets go of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import simple
from memory import Storages, held_bytes, saved_bytes
from oracle import truth
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from benches.eager import eager_transposed
from crepa_kernels import CrepaProjector, crepa_loss
from crepa_kernels.grid import plan_alignment
from crepa_kernels.loss import KEPT_BYTES

pytestmark = pytest.mark.usefixtures("one_thread")
both_backends = pytest.mark.parametrize("backend", ["reference", "torch"])
# The shapes with a bound on kept bytes: student resampled, and equal grids.
GRIDS = {"30x52-to-16x16": ((30, 52), (16, 16)), "16x26": ((16, 26), (16, 26))}


class Shape:
    """(1, 5, grid, D 1536) -> grid, E 384 with ``spatial_align="smaller", antialias=False``."""

    def __init__(self, grids: str, dtype: torch.dtype):
        self.student_grid, self.teacher_grid = GRIDS[grids]
        generator = torch.Generator().manual_seed(0)
        students, teachers = (grid[0] * grid[1] for grid in GRIDS[grids])
        self.h = torch.randn(1, 5, students, 1536, generator=generator).to(dtype).requires_grad_()
        self.y = torch.randn(1, 5, teachers, 384, generator=generator).to(dtype)
        torch.manual_seed(0)
        self.projector = CrepaProjector(1536, 384)
        self.inputs = [self.h, self.y, *self.projector.parameters()]

    def backend(self, name: str) -> torch.Tensor:
        return crepa_loss(
            self.h, self.y, self.projector, student_grid=self.student_grid, teacher_grid=self.teacher_grid,
            spatial_align="smaller", antialias=False, backend=name,
        ).loss  # fmt: skip

    def transposed(self) -> torch.Tensor:
        return eager_transposed(self.h, self.y, self.projector, self.student_grid, self.teacher_grid)


@pytest.mark.parametrize("measure", [saved_bytes, held_bytes])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grids", list(GRIDS))
def test_torch_keeps_at_most_35_percent_of_the_transposed_eager_loss(
    grids: str, dtype: torch.dtype, measure: Callable[..., int]
) -> None:
    shape = Shape(grids, dtype)
    ours = measure(lambda: shape.backend("torch"), shape.inputs)
    theirs = measure(shape.transposed, shape.inputs)
    assert 0 < ours <= 0.35 * theirs, f"{ours} bytes of {theirs}"


@pytest.mark.parametrize("backend", list(KEPT_BYTES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("align", "teacher_grid"),
    [
        ("student", (9, 10)), ("student", (12, 16)), ("teacher", (9, 10)), ("teacher", (6, 8)), ("teacher", (15, 16)),
        ("pool", (9, 10)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("given", [False, True], ids=["projector", "given"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_backend_keeps_what_its_formula_says(
    align: Any, teacher_grid: tuple[int, int], dtype: torch.dtype, backend: str, recompute: bool, given: bool
) -> None:
    """To the byte, but for at most 64 a frame, whose numbers no formula counts."""
    allocating: AbstractContextManager[Any] = nullcontext()
    if backend == "triton":
        pytest.importorskip("triton")
        from crepa_kernels.backends.triton.launch import recorded

        allocating = recorded()  # nothing is computed
    student_grid, width, features = (12, 16), 80 if given else 64, 80
    h = torch.randn(2, 5, 12 * 16, width).to(dtype).requires_grad_()
    y = torch.randn(2, 5, teacher_grid[0] * teacher_grid[1], features)
    projector = None if given else CrepaProjector(width, features)
    plan = plan_alignment(align, student_grid, teacher_grid)

    def forward() -> torch.Tensor:
        with allocating:
            return crepa_loss(
                h, y, projector, student_grid=student_grid, teacher_grid=teacher_grid, spatial_align=align,
                backend=backend, recompute=recompute,
            ).loss  # fmt: skip

    measured = saved_bytes(forward, [h, y, *(projector.parameters() if projector else ())])
    # On a common grid of its own, the teacher's rows are the caller's.
    measured += y.nbytes if backend == "triton" and plan.teacher == "keep" else 0
    said = KEPT_BYTES[backend](plan, 2 * 5, width, features, dtype, y.dtype, "cpu", recompute, given)
    assert 0 <= measured - said <= 64 * 2 * 5


def test_the_transposed_eager_loss_is_the_same_loss() -> None:
    """What the bounds of time and memory compare with computes what they think it does."""
    for teacher_grid, distance in (((3, 4), 1), ((2, 3), 2), ((5, 4), 0)):
        case = simple(spatial_align="smaller", antialias=False, teacher_grid=teacher_grid, distance=distance)
        tensors = case.tensors(torch.float64)
        h, projector = tensors["h"].requires_grad_(), case.projector(tensors)
        exact = truth(case, tensors).results
        loss = eager_transposed(h, tensors["y"], projector, case.student_grid, case.teacher_grid, distance, case.tau)
        torch.testing.assert_close(loss.detach(), exact["loss"], rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.autograd.grad(loss, h)[0], exact["h"], rtol=1e-10, atol=1e-14)


@both_backends
@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_is_kept_without_gradients(backend: str, frozen: bool) -> None:
    """Under ``no_grad``, and where neither h nor the projector asks for one."""
    case = simple(spatial_align="teacher")
    tensors = case.tensors(torch.float32)
    projector = case.projector(tensors).requires_grad_(not frozen)
    h = tensors["h"].detach().requires_grad_(not frozen)
    with torch.set_grad_enabled(frozen), Storages() as storages:
        output = crepa_loss(h, tensors["y"], projector, backend=backend, **case.options)
    assert not output.loss.requires_grad
    assert storages.alive([h, *projector.parameters(), tensors["y"], *output]) == 0
    if backend == "torch":  # nor is what would be kept made at all
        with Storages() as trained:
            kept = crepa_loss(h.detach().requires_grad_(), tensors["y"], projector, backend=backend, **case.options)
        rows = case.batch * case.frames * 6  # tokens of the teacher's grid
        assert trained.made - storages.made >= 4 * rows * case.feature_size
        assert kept.loss.requires_grad


@both_backends
def test_a_loss_that_is_kept_for_logging_holds_nothing_after_backward(backend: str) -> None:
    case = simple(spatial_align="teacher")
    tensors = case.tensors(torch.float32)
    leaf, projector = tensors["h"].requires_grad_(), case.projector(tensors)
    h, y = leaf * 1, tensors["y"] * 1
    with Storages() as storages:
        output = crepa_loss(h, y, projector, backend=backend, **case.options)
        output.loss.backward()
    inputs = [StorageWeakRef(tensor.untyped_storage()) for tensor in (h, y)]
    del h, y
    gradients = [leaf.grad, *(parameter.grad for parameter in projector.parameters())]
    assert storages.alive([leaf, *projector.parameters(), *gradients, *output]) == 0
    assert all(ref.expired() for ref in inputs)


@both_backends
def test_metrics_that_are_kept_for_logging_hold_no_graph(backend: str) -> None:
    case = simple(spatial_align="teacher")
    tensors = case.tensors(torch.float32)
    leaf, projector = tensors["h"].requires_grad_(), case.projector(tensors)
    h = leaf * 1
    with Storages() as storages:
        metrics = crepa_loss(h, tensors["y"], projector, backend=backend, **case.options)[1:]
    ref = StorageWeakRef(h.untyped_storage())
    del h
    assert storages.alive([leaf, *projector.parameters(), tensors["y"], *metrics]) == 0
    assert ref.expired()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_resampled_tokens_are_kept_for_the_projectors_gradients_alone(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    case = simple(spatial_align="teacher", student_grid=(4, 6))  # to 2x3
    tensors = case.tensors(torch.float32)

    def saved(*names: str) -> int:
        projector = replace(case, required=names).projector(tensors)
        h = tensors["h"].detach().requires_grad_("h" in names)
        inputs = [h, tensors["y"], *projector.parameters()]
        return saved_bytes(lambda: crepa_loss(h, tensors["y"], projector, backend=backend, **case.options).loss, inputs)

    x = 4 * case.batch * case.frames * 6 * case.hidden_size
    assert saved("h", "weight") - saved("h") == saved("gamma") - saved("bias") == x


@pytest.mark.parametrize("names", [("weight",), ("bias",), ("h",), ("gamma", "beta")], ids="-".join)
def test_only_what_is_asked_for_is_computed(names: tuple[str, ...]) -> None:
    """A backward pass for the bias alone makes no matrix product, one for h alone no (E, D) gradient."""
    case = simple(required=names, teacher_grid=(3, 4))
    tensors = case.tensors(torch.float32)
    projector: nn.Module = case.projector(tensors)
    h = tensors["h"].requires_grad_("h" in names)
    loss = crepa_loss(h, tensors["y"], projector, backend="torch", **case.options).loss
    products: list[tuple[int, ...]] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "linear"):
                products.append(tuple(result.shape))
            return result

    with Products():
        loss.backward()
    wide = (case.feature_size, case.hidden_size)
    tokens = {(rows, case.hidden_size) for rows in range(1, 1000)}
    assert any(shape == wide for shape in products) == bool({"weight", "gamma"} & set(names))
    assert any(shape in tokens and shape != wide for shape in products) == ("h" in names)
