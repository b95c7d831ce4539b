"""How the loss behaves as a node of a graph: derivatives, types, determinism, autocast, compilation, host reads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import GRADIENTS, Case, draw, simple
from oracle import METRICS, truth
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from crepa_kernels import CrepaProjector, available_backends, crepa_loss

pytestmark = pytest.mark.usefixtures("one_thread")
both_backends = pytest.mark.parametrize("backend", ["reference", "torch"])
fast_backends = pytest.mark.parametrize("backend", [name for name in available_backends() if name != "reference"])
HOLES = torch.tensor([[True, True, False, True], [True, False, True, True]])
PADDING = torch.tensor([[True, True, True, True], [True, True, True, False]])
# One of each way through the backends: equal grids, either side resampled, pooled; both modes; masks; an index.
VARIED = {
    "equal": {"teacher_grid": (3, 4), "normalize_neighbour_sum": True},
    "teacher-resampled": {"cumulative": True, "distance": 2, "frame_mask": HOLES},
    "student-resampled": {"spatial_align": "teacher", "frame_mask": HOLES, "teacher_mask": PADDING},
    "student-growing": {"spatial_align": "teacher", "teacher_grid": (5, 4), "frame_mask": HOLES, "distance": 2},
    "plain-filter": {"spatial_align": "smaller", "antialias": False, "frame_index": [0, 2, 2, 3]},
    "pooled": {"spatial_align": "pool", "normalize_by_frames": False, "cumulative": True, "distance": 9},
}
varied = pytest.mark.parametrize("case", [pytest.param(simple(**v), id=k) for k, v in VARIED.items()])


def functional_loss(case: Case, tensors: dict[str, torch.Tensor], backend: str) -> Callable[..., torch.Tensor]:
    """(h, gamma, beta, weight, bias) -> loss, for derivatives with respect to the projector's tensors themselves."""

    def loss(h: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        projector = nn.Sequential(nn.LayerNorm(case.hidden_size), nn.Linear(case.hidden_size, case.feature_size))
        names = ((0, "weight"), (0, "bias"), (1, "weight"), (1, "bias"))
        for (layer, name), value in zip(names, weights, strict=True):
            delattr(projector[layer], name)
            setattr(projector[layer], name, value)
        return crepa_loss(h, tensors["y"], projector, backend=backend, **case.options).loss

    return loss


def small(case: Case) -> Case:
    teacher_grid = {(3, 4): (2, 3), (5, 4): (3, 3)}.get(case.teacher_grid, (2, 2))
    return replace(case, hidden_size=4, feature_size=3, student_grid=(2, 3), teacher_grid=teacher_grid)


@both_backends
@varied
def test_first_derivatives(case: Case, backend: str) -> None:
    case = small(case)
    tensors = case.tensors(torch.float64)
    leaves = [tensors[name].requires_grad_() for name in GRADIENTS]
    assert torch.autograd.gradcheck(functional_loss(case, tensors, backend), leaves, fast_mode=True)


@varied
def test_reference_is_differentiable_twice(case: Case) -> None:
    case = small(case)
    tensors = case.tensors(torch.float64)
    leaves = [tensors[name].requires_grad_() for name in GRADIENTS]
    assert torch.autograd.gradgradcheck(functional_loss(case, tensors, "reference"), leaves, fast_mode=True)


def test_torch_backend_has_no_second_derivative() -> None:
    case = simple()
    tensors = case.tensors(torch.float32)
    h = tensors["h"].requires_grad_()
    loss = crepa_loss(h, tensors["y"], case.projector(tensors), backend="torch", **case.options).loss
    (first,) = torch.autograd.grad(loss, [h], create_graph=True)
    with pytest.raises(RuntimeError, match=r"'torch' can be differentiated once"):
        first.sum().backward()


@fast_backends
def test_a_penalty_on_the_sum_of_two_losses_does_not_lose_one(backend: str) -> None:
    """Where another loss has a second derivative, one that stops at CREPA would be taken for 0."""
    case = simple()
    tensors = case.tensors(torch.float32)
    h, projector = tensors["h"].requires_grad_(), case.projector(tensors)
    loss = crepa_loss(h, tensors["y"], projector, backend=backend, **case.options).loss + h.pow(3).sum()
    first = torch.autograd.grad(loss, [h, projector[1].weight], create_graph=True)
    for leaf in (h, projector[1].weight):
        with pytest.raises(RuntimeError, match="can be differentiated once"):
            torch.autograd.grad(sum(one.square().sum() for one in first), leaf, retain_graph=True)


@fast_backends
@pytest.mark.parametrize("recompute", [False, True])
def test_a_graph_of_the_gradients_is_made_through_a_checkpoint(backend: str, recompute: bool) -> None:
    """As an optimizer that wants second derivatives of the rest of the model asks for one."""
    case = simple()
    tensors = case.tensors(torch.float32)
    h, projector = tensors["h"].requires_grad_(), case.projector(tensors)

    def loss(h: torch.Tensor) -> torch.Tensor:
        options = {**case.options, "recompute": recompute}
        return crepa_loss(h, tensors["y"], projector, backend=backend, **options).loss

    leaves = [h, *projector.parameters()]
    expected = torch.autograd.grad(loss(h), leaves)
    made = checkpoint(loss, h, use_reentrant=False) if not recompute else loss(h)
    for found, gradient in zip(torch.autograd.grad(made, leaves, create_graph=True), expected, strict=True):
        assert torch.equal(found, gradient)
        with pytest.raises(RuntimeError, match="can be differentiated once"):
            torch.autograd.grad(found.sum(), h, retain_graph=True)


def tangents(loss: Callable[[torch.Tensor], torch.Tensor], h: torch.Tensor) -> Any:
    return torch.func.jvp(loss, (h,), (torch.ones_like(h),))


def dual_numbers(loss: Callable[[torch.Tensor], torch.Tensor], h: torch.Tensor) -> Any:
    with forward_ad.dual_level():
        return loss(forward_ad.make_dual(h, torch.ones_like(h)))


def dual_numbers_alone(loss: Callable[[torch.Tensor], torch.Tensor], h: torch.Tensor) -> Any:
    with torch.no_grad():
        return dual_numbers(loss, h)


@fast_backends
@pytest.mark.parametrize("derive", [tangents, dual_numbers, dual_numbers_alone])
def test_no_forward_derivative_is_taken_for_zero(derive: Callable[..., Any], backend: str) -> None:
    case = simple(teacher_grid=(3, 4))
    tensors = case.tensors(torch.float32)
    projector = case.projector(tensors)

    def loss(h: torch.Tensor) -> torch.Tensor:
        return crepa_loss(h, tensors["y"], projector, backend=backend, **case.options).loss

    with pytest.raises((RuntimeError, NotImplementedError), match=r"autograd\.Function"):
        derive(loss, tensors["h"])


@both_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@varied
def test_two_runs_are_bitwise_equal(case: Case, dtype: torch.dtype, backend: str) -> None:
    tensors = case.tensors(dtype)
    runs = [case.run(tensors, backend) for _ in range(2)]
    for one, two in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(one, two)
    for name in GRADIENTS:
        assert torch.equal(runs[0][1][name], runs[1][1][name])


@both_backends
def test_uninitialized_memory_is_never_read(backend: str) -> None:
    """Deterministic mode fills ``torch.empty`` with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        for seed in range(40):
            case = draw(seed)
            output, gradients = case.run(case.tensors(torch.float32), backend)
            assert all(value.isfinite().all() for value in (*output, *gradients.values())), case
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.every(5)
@both_backends
@pytest.mark.parametrize("weights_type", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@varied
def test_types(case: Case, dtype: torch.dtype, weights_type: torch.dtype, backend: str) -> None:
    """Any types of h, y and weights: dh in h's, the rest in the weights', numbers in fp32 (fp64 for fp64 h)."""
    tensors = {name: t if name == "h" else t.to(weights_type) for name, t in case.tensors(dtype).items()}
    tensors["y"] = tensors["y"].to(torch.bfloat16)
    output, gradients = case.run(tensors, backend)
    wide = torch.promote_types(dtype, torch.float32)
    assert {value.dtype for value in output} == {wide}
    for name, gradient in gradients.items():
        assert gradient.dtype == tensors[name].dtype
        assert gradient.shape == tensors[name].shape
    exact = truth(case, tensors)
    # The larger rounding of the two types; 8 eps of it.
    eps = max(torch.finfo(dtype).eps, torch.finfo(weights_type).eps)
    for name in GRADIENTS:
        assert (gradients[name].double() - exact.results[name]).norm() <= 8 * eps * exact.size(name)
    eps = torch.finfo(dtype).eps
    for name in METRICS:
        assert (getattr(output, name).double() - exact.results[name]).norm() <= 8 * eps * exact.size(name)


@both_backends
def test_metrics_are_detached_and_the_teacher_gets_no_gradient(backend: str) -> None:
    case = simple(spatial_align="pool")
    tensors = case.tensors(torch.float32)
    projector, y = case.projector(tensors), tensors["y"].requires_grad_()
    output = crepa_loss(tensors["h"].requires_grad_(), y * 1, projector, backend=backend, **case.options)
    assert output.loss.requires_grad
    assert not any(getattr(output, name).requires_grad for name in METRICS[1:])
    output.loss.backward()
    assert y.grad is None
    frozen = crepa_loss(tensors["h"].detach(), y, projector.requires_grad_(False), backend=backend, **case.options)
    assert not frozen.loss.requires_grad


@both_backends
def test_gradients_scale_and_accumulate_as_the_loss_does(backend: str) -> None:
    """A weight outside, a retained graph and a clip used twice are the autograd engine's business, not ours."""
    case = simple(cumulative=True, distance=2)
    tensors = case.tensors(torch.float64)
    h, projector = tensors["h"].requires_grad_(), case.projector(tensors)
    output = crepa_loss(h, tensors["y"], projector, backend=backend, **case.options)
    leaves = [h, *projector.parameters()]
    once = torch.autograd.grad(output.loss, leaves, retain_graph=True)
    scaled = torch.autograd.grad(-2.5 * output.loss, leaves)
    for one, other in zip(once, scaled, strict=True):
        # Sums of a hundred terms in another order: 1e-14 of the largest.
        torch.testing.assert_close(other, -2.5 * one, rtol=1e-12, atol=1e-14)


@both_backends
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_under_activation_checkpointing(reentrant: bool, backend: str) -> None:
    case = simple(spatial_align="teacher", frame_mask=HOLES)
    tensors = case.tensors(torch.float32)
    h, projector = tensors["h"].requires_grad_(), case.projector(tensors)

    def loss(h: torch.Tensor) -> torch.Tensor:
        return crepa_loss(h, tensors["y"], projector, backend=backend, **case.options).loss

    leaves = [h, *projector.parameters()]
    plain = torch.autograd.grad(loss(h), leaves)
    loss_again = checkpoint(loss, h, use_reentrant=reentrant)
    loss_again.backward()
    for leaf, gradient in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, gradient)


@both_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@varied
def test_autocast_changes_nothing_but_the_products_of_fp32_tokens(case: Case, dtype: torch.dtype, backend: str) -> None:
    tensors = case.tensors(dtype)
    output, gradients = case.run(tensors, backend)
    h, projector = tensors["h"].detach().requires_grad_(), case.projector(tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = crepa_loss(h, tensors["y"], projector, backend=backend, **case.options)
        inside.loss.backward()
    for one, other in zip(output, inside, strict=True):
        assert torch.equal(one, other)
    for gradient, leaf in zip(gradients.values(), (h, *projector.parameters()), strict=True):
        assert torch.equal(gradient, leaf.grad)


@pytest.mark.every(5)
@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@varied
def test_a_backward_pass_alone_inside_autocast_is_as_outside(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Where PyTorch casts the gradients of its own operators: the training loop's backward() in the with block."""
    tensors = case.tensors(dtype)
    h, projector = tensors["h"].requires_grad_(), case.projector(tensors)
    loss = crepa_loss(h, tensors["y"], projector, backend=backend, **case.options).loss
    leaves = [h, *projector.parameters()]
    outside = torch.autograd.grad(loss, leaves, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(loss, leaves)
    for one, other in zip(outside, inside, strict=True):
        assert torch.equal(one, other)


@varied
def test_second_derivatives_inside_autocast_are_as_outside(case: Case) -> None:
    tensors = case.tensors(torch.float32)
    h, projector = tensors["h"].requires_grad_(), case.projector(tensors)
    leaves = [h, *projector.parameters()]

    def second(autocast: bool) -> tuple[torch.Tensor, ...]:
        loss = crepa_loss(h, tensors["y"], projector, backend="reference", **case.options).loss
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            first = torch.autograd.grad(loss, leaves, create_graph=True)
            return torch.autograd.grad(sum(one.square().sum() for one in first), leaves)

    for one, other in zip(second(False), second(True), strict=True):
        assert torch.equal(one, other)


def test_reference_has_forward_derivatives_where_nothing_is_resampled() -> None:
    case = small(simple(teacher_grid=(3, 4)))
    case = replace(case, teacher_grid=case.student_grid)
    tensors = case.tensors(torch.float64)
    leaves = [tensors[name].requires_grad_() for name in GRADIENTS]
    loss = functional_loss(case, tensors, "reference")
    along = [torch.randn_like(leaf) for leaf in leaves]
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(*map(forward_ad.make_dual, leaves, along))).tangent
    gradients = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(tangent, sum((a * g).sum() for a, g in zip(along, gradients, strict=True)))


def check_compiled(case: Case, loss_backend: str, **how: Any) -> None:
    """``torch.compile(loss, **how)`` and its gradients against the loss as it is, masked frames holding NaN."""
    tensors = case.tensors(torch.float32)
    if case.frame_mask is not None:
        tensors["h"][~case.frame_mask] = torch.nan
    h, projector = tensors["h"].requires_grad_(), case.projector(tensors)

    def loss(h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return crepa_loss(h, y, projector, backend=loss_backend, **case.options).loss

    leaves = [h, *projector.parameters()]
    plain = loss(h, tensors["y"])
    expected = torch.autograd.grad(plain, leaves)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, **how)(h, tensors["y"])
    # The same operators in fp32, in chunks of another size.
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)
    for gradient, other in zip(expected, torch.autograd.grad(compiled, leaves), strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.every(5)
@both_backends
@varied
def test_compiled_without_a_graph_break(case: Case, backend: str) -> None:
    """Also where masked frames hold NaN, which the compiled backend cannot skip."""
    check_compiled(case, backend, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["equal", "student-resampled"])
def test_compiled_by_inductor_with_dynamic_shapes(name: str) -> None:
    """Two grids that the trace finds equal must stay two numbers, not one symbol that Inductor loses."""
    check_compiled(simple(**VARIED[name]), "torch", dynamic=True)


READS = (
    "_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "unique", "masked_select", "bincount",
)  # fmt: skip


class NoHostReads(TorchDispatchMode):
    """Fails where the host waits for a value of a tensor, boolean indexing included."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and isinstance(args[1], (list, tuple)) else ()
        boolean = any(index is not None and index.dtype == torch.bool for index in indices)
        if name.startswith(READS) or boolean:
            raise AssertionError(f"{func} reads a tensor's values on the host")
        return func(*args, **(kwargs or {}))


@both_backends
@varied
def test_no_value_is_read_on_the_host(case: Case, backend: str) -> None:
    tensors = case.tensors(torch.float32)
    with NoHostReads():
        output, _ = case.run(tensors, backend)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostReads():
        output.similarity.item()
    with pytest.raises(AssertionError, match="reads a tensor"), NoHostReads():
        tensors["h"][tensors["h"] > 0]


@contextlib.contextmanager
def no_autocast(*_: Any, **__: Any) -> Iterator[None]:
    yield


@both_backends
@varied
def test_tensors_without_values_are_enough(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device every host read fails, ``.numpy()`` and ``.tolist()`` too: as a GPU would synchronise."""
    monkeypatch.setattr(torch, "autocast", no_autocast)  # meta has none to switch off
    h, y = (tensor.to("meta") for name, tensor in case.tensors(torch.float32).items() if name in ("h", "y"))
    projector = CrepaProjector(case.hidden_size, case.feature_size).to("meta")
    options = case.options
    for name in ("frame_mask", "teacher_mask", "frame_index"):
        if options[name] is not None:
            options[name] = torch.as_tensor(options[name]).to("meta")
    output = crepa_loss(h.requires_grad_(), y, projector, backend=backend, **options)
    output.loss.backward()
    assert h.grad.shape == h.shape
    assert output.frame_similarity.shape == (case.batch, case.frames)
