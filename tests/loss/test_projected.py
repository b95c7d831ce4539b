"""Hidden states that are projected already, ``projector=None``, and such as have frames and tokens on one axis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, simple
from oracle import METRICS, truth
from test_loss import errors, results
from test_loss_autograd import HOLES, PADDING, NoHostReads, no_autocast
from torch import nn

from crepa_kernels import CrepaProjector, available_backends, crepa_loss, relational_loss, similarity_matrix
from crepa_kernels.grid import plan_alignment
from crepa_kernels.inputs import check_inputs
from crepa_kernels.neighbours import Neighbours

pytestmark = pytest.mark.usefixtures("one_thread")
anywhere = pytest.mark.parametrize("backend", available_backends())
both_backends = pytest.mark.parametrize("backend", ["reference", "torch"])
GIVEN: dict[str, Any] = {"absent": True, "hidden_size": 8, "affine": "none", "linear_bias": False, "required": ("h",)}
# Each way of aligning the grids; the student's shrinks, grows, and keeps its count of tokens on another grid.
VARIED: dict[str, dict[str, Any]] = {
    "equal": {"teacher_grid": (3, 4), "frame_mask": HOLES},
    "teacher-resampled": {"cumulative": True, "distance": 2, "frame_mask": HOLES},
    "shrinking": {"spatial_align": "teacher", "frame_mask": HOLES, "teacher_mask": PADDING},
    "growing": {"spatial_align": "teacher", "teacher_grid": (5, 4), "frame_mask": HOLES, "cumulative": True},
    "turned": {"spatial_align": "teacher", "teacher_grid": (4, 3), "frame_index": [0, 2, 2, 3]},
    "pooled": {"spatial_align": "pool", "normalize_by_frames": False},
}
CASES = {name: simple(**GIVEN | changes) for name, changes in VARIED.items()}
varied = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "crepa": lambda case, h, y, **options: crepa_loss(h, y, None, **case.options, **options).loss,
    "relational": lambda case, h, y, **options: relational_loss(h, y, None, **_relational(case), **options),
}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def _relational(case: Case) -> dict[str, Any]:
    others = ("cumulative", "normalize_neighbour_sum", "normalize_by_frames")
    return {name: value for name, value in case.options.items() if name not in others}


def smaller(case: Case) -> Case:
    grids = {(3, 4): (2, 3), (5, 4): (3, 3), (4, 3): (3, 2), (2, 3): (2, 2)}
    return replace(case, hidden_size=3, feature_size=3, student_grid=(2, 3), teacher_grid=grids[case.teacher_grid])


@both_backends
@losses
@varied
def test_first_derivatives(case: Case, loss: Callable[..., torch.Tensor], backend: str) -> None:
    case = smaller(case)
    tensors = case.tensors(torch.float64)
    h = tensors["h"].requires_grad_()
    assert torch.autograd.gradcheck(lambda h: loss(case, h, tensors["y"], backend=backend), h, fast_mode=True)


@losses
@varied
def test_reference_is_differentiable_twice(case: Case, loss: Callable[..., torch.Tensor]) -> None:
    case = smaller(case)
    tensors = case.tensors(torch.float64)
    h = tensors["h"].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda h: loss(case, h, tensors["y"], backend="reference"), h, fast_mode=True)


@anywhere
@losses
def test_it_is_what_comes_behind_a_projector(loss: Callable[..., torch.Tensor], backend: str) -> None:
    """Any module's p, whose own gradients it makes: here those that the loss knows."""
    case = simple(spatial_align="teacher", teacher_grid=(5, 4), frame_mask=HOLES)
    tensors = case.tensors(torch.float32)
    h, projector = tensors["h"].requires_grad_(), case.projector(tensors)
    options = case.options | {"backend": backend}
    if loss is LOSSES["crepa"]:
        whole = crepa_loss(h, tensors["y"], projector, **options).loss
    else:
        whole = relational_loss(h, tensors["y"], projector, **_relational(case), backend=backend)
    leaves = [h, *projector.parameters()]
    expected = torch.autograd.grad(whole, leaves)
    found = loss(case, projector(h), tensors["y"], backend=backend)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
    for one, other in zip(torch.autograd.grad(found, leaves), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@both_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@varied
def test_types(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Whatever the teacher's: the gradient in p's, numbers in fp32 (fp64 for fp64), inside autocast as outside."""
    tensors = case.tensors(dtype)
    tensors["y"] = tensors["y"].to(torch.bfloat16)
    found = results(case, tensors, backend)
    wide = torch.promote_types(dtype, torch.float32)
    assert {found[name].dtype for name in METRICS} == {wide}
    assert found["h"].dtype == dtype
    exact = truth(case, tensors)
    eps = torch.finfo(dtype).eps
    for name, error in errors(exact, found, floored=False).items():
        assert error <= 8 * eps * exact.size(name), name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = results(case, tensors, backend)
    assert all(torch.equal(inside[name], value) for name, value in found.items())


@anywhere
@varied
def test_recomputed_it_is_the_same(case: Case, backend: str) -> None:
    tensors = case.tensors(torch.float32)
    plain, (output, gradients) = results(case, tensors, backend), case.run(tensors, backend, recompute=True)
    assert torch.equal(output.loss, plain["loss"])
    torch.testing.assert_close(gradients["h"], plain["h"], rtol=1e-6, atol=1e-9)


@anywhere
@pytest.mark.parametrize("distance", [1, 3])
def test_shards_of_a_sequence_add_up(distance: int, backend: str) -> None:
    case = replace(CASES["teacher-resampled"], distance=distance)
    tensors = case.tensors(torch.float32)
    h = tensors["h"].requires_grad_()
    options = case.options | {"backend": backend}
    whole = crepa_loss(h, tensors["y"], None, **options).loss
    (expected,) = torch.autograd.grad(whole, h)
    flat, cut = h.flatten(1, 2), 17
    total = sum(
        crepa_loss(flat[:, start:stop], tensors["y"], None, token_range=(start, stop), **options).loss
        for start, stop in ((0, cut), (cut, flat.shape[1]))
    )
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(total, h)[0], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.every(5)
@losses
@varied
def test_compiled_without_a_graph_break(case: Case, loss: Callable[..., torch.Tensor]) -> None:
    """Also where masked frames hold NaN, which the compiled backend cannot skip."""
    tensors = case.tensors(torch.float32)
    if case.frame_mask is not None:
        tensors["h"][~case.frame_mask] = torch.nan
    h = tensors["h"].flatten(1, 2).requires_grad_()
    plain = loss(case, h, tensors["y"], backend="torch")
    torch._dynamo.reset()
    compiled = torch.compile(lambda h, y: loss(case, h, y, backend="torch"), fullgraph=True, backend="aot_eager")
    again = compiled(h, tensors["y"])
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-6)
    grads = (torch.autograd.grad(each, h)[0] for each in (again, plain))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@both_backends
@losses
@varied
def test_tensors_without_values_are_enough(
    case: Case, loss: Callable[..., torch.Tensor], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device every host read fails, as a GPU would synchronise."""
    tensors = case.tensors(torch.float32)
    with NoHostReads():
        loss(case, tensors["h"].requires_grad_(), tensors["y"], backend=backend).backward()
    monkeypatch.setattr(torch, "autocast", no_autocast)  # meta has none to switch off
    masks = {name: getattr(case, name) for name in ("frame_mask", "teacher_mask", "frame_index")}
    there = {name: None if value is None else torch.as_tensor(value).to("meta") for name, value in masks.items()}
    h, y = (tensors[name].detach().to("meta").requires_grad_() for name in ("h", "y"))
    loss(replace(case, **there), h, y, backend=backend).backward()
    assert h.grad.shape == h.shape
    assert y.grad is None


@varied
def test_the_similarity_matrix(case: Case) -> None:
    """Its diagonal is what the loss calls similar, of the frames in the loss."""
    tensors = case.tensors(torch.float64)
    matrix = similarity_matrix(tensors["h"].flatten(1, 2), tensors["y"], None, **case.options)
    index = torch.arange(case.frames) if case.frame_index is None else torch.as_tensor(case.frame_index)
    own = matrix.gather(2, index.expand(case.batch, case.frames)[..., None])[..., 0]
    exact = truth(case, tensors).results["frame_similarity"]
    torch.testing.assert_close(own, exact, rtol=0, atol=1e-12)


def test_frames_and_tokens_on_one_axis_are_not_copied() -> None:
    """What the backends see is a view of what was given."""
    h, y, plan = torch.randn(2, 36, 16), torch.randn(2, 3, 6, 8), plan_alignment("student", (3, 4), (2, 3))
    inputs = check_inputs(h, y, CrepaProjector(16, 8), plan, Neighbours())
    assert inputs.hidden_states.shape == (2, 3, 12, 16)
    assert inputs.hidden_states.data_ptr() == h.data_ptr()


def test_the_gradient_of_a_projector_of_ones_own() -> None:
    """A convolution on the token grid, in bf16 autocast, as a training step has it."""
    convolution = nn.Conv2d(16, 8, 3, padding=1)
    h, y = torch.randn(2, 3, 12, 16, requires_grad=True), torch.randn(2, 3, 6, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = h.flatten(0, 1).mT.unflatten(2, (3, 4))
        p = convolution(images).flatten(2).mT.unflatten(0, (2, 3))
        output = crepa_loss(p, y, None, student_grid=(3, 4), teacher_grid=(2, 3), spatial_align="teacher")
    assert p.dtype == torch.bfloat16
    output.loss.backward()
    assert all(leaf.grad.isfinite().all() and leaf.grad.any() for leaf in (h, *convolution.parameters()))
