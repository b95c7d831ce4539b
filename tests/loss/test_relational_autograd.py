"""How the relational loss behaves as a node of a graph: derivatives, types, determinism, autocast, compilation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import GRADIENTS
from devices import on_a_gpu
from memory import Storages, held_bytes
from relational import PAIRS, Related, Tensors, draw_related, relational_truth, simply_related
from test_loss import Results, errors, yardstick
from test_loss_autograd import HOLES, PADDING, NoHostReads, dual_numbers, no_autocast, small, tangents
from test_relational_modes import OFFSETS, rows_of_a_clip
from test_triton import to
from torch import nn
from torch.utils.checkpoint import checkpoint

from crepa_kernels import CrepaProjector, relational_loss
from crepa_kernels.backends.torch import relational, student
from crepa_kernels.ops.relation import relate_frames_op

pytestmark = pytest.mark.usefixtures("one_thread")
both_backends = pytest.mark.parametrize("backend", ["reference", "torch"])
# One of each way of aligning the grids, with masks and an index; by features and by tokens; each choice of pairs.
VARIED: dict[str, tuple[str, float | None, dict[str, Any]]] = {
    "equal": ("all", None, {"teacher_grid": (3, 4)}),
    "margin": ("all", 0.1, {"frame_mask": HOLES}),
    "teacher-resampled": ("neighbours", None, {"distance": 2, "frame_mask": HOLES}),
    "student-resampled": ("cross", None, {"spatial_align": "teacher", "frame_mask": HOLES, "teacher_mask": PADDING}),
    "student-growing": ("neighbours", None, {"spatial_align": "teacher", "teacher_grid": (5, 4), "frame_mask": HOLES}),
    "plain-filter": ("frame", None, {"spatial_align": "smaller", "antialias": False, "frame_index": [0, 2, 2, 3]}),
    "pooled": ("neighbours", 0.05, {"spatial_align": "pool", "distance": 9}),
}
varied = pytest.mark.parametrize(
    "related", [pytest.param(simply_related(p, m, **v), id=k) for k, (p, m, v) in VARIED.items()]
)


def functional_loss(related: Related, tensors: Tensors, backend: str) -> Callable[..., torch.Tensor]:
    """(h, gamma, beta, weight, bias) -> loss, for derivatives with respect to the projector's tensors themselves."""
    case = related.case

    def loss(h: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        projector = nn.Sequential(nn.LayerNorm(case.hidden_size), nn.Linear(case.hidden_size, case.feature_size))
        names = ((0, "weight"), (0, "bias"), (1, "weight"), (1, "bias"))
        for (layer, name), value in zip(names, weights, strict=True):
            delattr(projector[layer], name)
            setattr(projector[layer], name, value)
        return relational_loss(h, tensors["y"], projector, backend=backend, **related.options)

    return loss


@both_backends
@varied
def test_first_derivatives(related: Related, backend: str) -> None:
    related = replace(related, case=small(related.case))
    tensors = related.case.tensors(torch.float64)
    leaves = [tensors[name].requires_grad_() for name in GRADIENTS]
    assert torch.autograd.gradcheck(functional_loss(related, tensors, backend), leaves, fast_mode=True)


@varied
def test_reference_is_differentiable_twice(related: Related) -> None:
    related = replace(related, case=small(related.case))
    tensors = related.case.tensors(torch.float64)
    leaves = [tensors[name].requires_grad_() for name in GRADIENTS]
    assert torch.autograd.gradgradcheck(functional_loss(related, tensors, "reference"), leaves, fast_mode=True)


def test_the_fast_way_has_no_second_derivative() -> None:
    related = simply_related()
    tensors = related.case.tensors(torch.float32)
    h, projector = tensors["h"].requires_grad_(), related.case.projector(tensors)
    loss = relational_loss(h, tensors["y"], projector, **related.options) + h.pow(3).sum()
    first = torch.autograd.grad(loss, [h, projector[1].weight], create_graph=True)
    for leaf in (h, projector[1].weight):
        with pytest.raises(RuntimeError, match=r"can be differentiated once; backend 'reference' can be twice"):
            torch.autograd.grad(sum(one.square().sum() for one in first), leaf, retain_graph=True)


def test_a_graph_of_the_gradients_is_made_through_a_checkpoint() -> None:
    related = simply_related()
    tensors = related.case.tensors(torch.float32)
    h, projector = tensors["h"].requires_grad_(), related.case.projector(tensors)

    def loss(h: torch.Tensor) -> torch.Tensor:
        return relational_loss(h, tensors["y"], projector, **related.options)

    (expected,) = torch.autograd.grad(loss(h), h)
    (found,) = torch.autograd.grad(checkpoint(loss, h, use_reentrant=False), h, create_graph=True)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("derive", [tangents, dual_numbers])
def test_no_forward_derivative_is_taken_for_zero(derive: Callable[..., Any]) -> None:
    related = simply_related(teacher_grid=(3, 4))
    tensors = related.case.tensors(torch.float32)
    projector = related.case.projector(tensors)

    def loss(h: torch.Tensor) -> torch.Tensor:
        return relational_loss(h, tensors["y"], projector, **related.options)

    with pytest.raises((RuntimeError, NotImplementedError), match=r"autograd\.Function"):
        derive(loss, tensors["h"])


@both_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@varied
def test_two_runs_are_bitwise_equal(related: Related, dtype: torch.dtype, backend: str) -> None:
    tensors = related.case.tensors(dtype)
    one, two = (related.run(tensors, backend) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in ("loss", *GRADIENTS))


@pytest.mark.usefixtures("nan_in_new_memory")
@both_backends
def test_uninitialized_memory_is_never_read(backend: str) -> None:
    for seed in range(40):
        related = draw_related(seed)
        found = related.run(related.case.tensors(torch.float32), backend)
        assert all(value.isfinite().all() for value in found.values()), related


@pytest.mark.every(5)
@both_backends
@pytest.mark.parametrize("weights_type", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pairs", PAIRS)
def test_types(pairs: str, dtype: torch.dtype, weights_type: torch.dtype, backend: str) -> None:
    """Any types of h, y and weights: dh in h's, the rest in the weights', the loss in fp32 (fp64 for fp64 h)."""
    related = simply_related(pairs)
    tensors = {name: t if name == "h" else t.to(weights_type) for name, t in related.case.tensors(dtype).items()}
    tensors["y"] = tensors["y"].to(torch.bfloat16)
    found = related.run(tensors, backend)
    assert found["loss"].dtype == torch.promote_types(dtype, torch.float32)
    exact = relational_truth(related, tensors)
    # The larger rounding of the two types; 8 eps of it.
    eps = max(torch.finfo(dtype).eps, torch.finfo(weights_type).eps)
    for name in GRADIENTS:
        assert found[name].dtype == tensors[name].dtype
        assert found[name].shape == tensors[name].shape
    for name, error in errors(exact, found, floored=False).items():
        assert error <= 8 * eps * exact.size(name), name


@both_backends
def test_the_teacher_gets_no_gradient_and_nobody_one_unasked(backend: str) -> None:
    related = simply_related(spatial_align="pool")
    tensors = related.case.tensors(torch.float32)
    projector, y = related.case.projector(tensors), tensors["y"].requires_grad_()
    loss = relational_loss(tensors["h"].requires_grad_(), y * 1, projector, backend=backend, **related.options)
    loss.backward()
    assert y.grad is None
    projector.requires_grad_(False)
    frozen = relational_loss(tensors["h"].detach(), y, projector, backend=backend, **related.options)
    assert not frozen.requires_grad


@both_backends
def test_gradients_scale_and_accumulate_as_the_loss_does(backend: str) -> None:
    related = simply_related("neighbours", distance=2)
    tensors = related.case.tensors(torch.float64)
    h, projector = tensors["h"].requires_grad_(), related.case.projector(tensors)
    loss = relational_loss(h, tensors["y"], projector, backend=backend, **related.options)
    leaves = [h, *projector.parameters()]
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    for one, other in zip(once, torch.autograd.grad(-2.5 * loss, leaves), strict=True):
        # Sums of a hundred terms in another order: 1e-14 of the largest.
        torch.testing.assert_close(other, -2.5 * one, rtol=1e-12, atol=1e-14)


@both_backends
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_under_activation_checkpointing(reentrant: bool, backend: str) -> None:
    related = simply_related("cross", spatial_align="teacher", frame_mask=HOLES)
    tensors = related.case.tensors(torch.float32)
    h, projector = tensors["h"].requires_grad_(), related.case.projector(tensors)

    def loss(h: torch.Tensor) -> torch.Tensor:
        return relational_loss(h, tensors["y"], projector, backend=backend, **related.options)

    leaves = [h, *projector.parameters()]
    plain = torch.autograd.grad(loss(h), leaves)
    checkpoint(loss, h, use_reentrant=reentrant).backward()
    assert all(torch.equal(leaf.grad, gradient) for leaf, gradient in zip(leaves, plain, strict=True))


@both_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@varied
def test_autocast_changes_nothing_but_the_products_of_fp32_tokens(
    related: Related, dtype: torch.dtype, backend: str
) -> None:
    tensors = related.case.tensors(dtype)
    outside = related.run(tensors, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = related.run(tensors, backend)
    assert all(torch.equal(inside[name], value) for name, value in outside.items())


@both_backends
@varied
def test_a_backward_pass_alone_inside_autocast_is_as_outside(related: Related, backend: str) -> None:
    tensors = related.case.tensors(torch.float32)
    h, projector = tensors["h"].requires_grad_(), related.case.projector(tensors)
    loss = relational_loss(h, tensors["y"], projector, backend=backend, **related.options)
    leaves = [h, *projector.parameters()]
    outside = torch.autograd.grad(loss, leaves, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(one, other) for one, other in zip(outside, inside, strict=True))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_errors_are_those_of_eager_arithmetic_under_autocast(seed: int, kind: torch.dtype) -> None:
    """fp32 tokens, products in autocast's type: max(2 x eager's under the same autocast, 8 eps x the norm)."""
    related = draw_related(seed)
    tensors = related.case.tensors(torch.float32)
    exact = relational_truth(related, tensors, narrow=kind)
    if exact.cancelled * torch.finfo(kind).eps > 0.1 or (related.case.tiny and kind == torch.float16):
        pytest.skip("nothing is left of a row of p in this type")

    def run(backend: str) -> Callable[[Tensors], Results]:
        def under_autocast(tensors: Tensors) -> Results:
            with torch.autocast("cpu", kind):
                return related.run(tensors, backend)

        return under_autocast

    found, eager = run("torch")(tensors), yardstick(exact, run("reference"), tensors, floored=False)
    for name, error in errors(exact, found, floored=False).items():
        bound = max(2 * eager[name], 8 * torch.finfo(kind).eps * exact.size(name))
        assert error <= bound, f"{name}: {error:.3e} > {bound:.3e}, eager's {eager[name]:.3e}, in {related}"


@pytest.mark.parametrize("margin", [None, 0.1])
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("masked", [False, True])
def test_rows_that_are_held_in_16_bits(
    masked: bool, pairs: str, margin: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU holds them, whose library multiplies them into fp32: the same bound."""
    monkeypatch.setattr(relational, "operand_type", lambda compute_dtype, *_: compute_dtype)
    monkeypatch.setattr(student, "product_type", lambda compute_dtype, *_: compute_dtype)
    related = simply_related(pairs, margin, distance=2, frame_mask=HOLES if masked else None)
    tensors = related.case.tensors(torch.bfloat16)
    exact = relational_truth(related, tensors)
    for name, error in errors(exact, related.run(tensors, "torch"), floored=False).items():
        assert error <= 8 * torch.finfo(torch.bfloat16).eps * exact.size(name), name


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("margin", [None, 0.1])
@pytest.mark.parametrize("pairs", PAIRS)
def test_errors_on_a_gpu(pairs: str, margin: float | None, dtype: torch.dtype, device: str) -> None:
    """At most max(2 x eager's on a CPU, 8 eps x the norm without cancellation)"""
    related = simply_related(pairs, margin, distance=2, frame_mask=HOLES)
    tensors = related.case.tensors(dtype)
    exact = relational_truth(related, tensors)
    found = to("cpu", related.run(to(device, tensors), "auto"))
    eager = yardstick(exact, lambda given: related.run(given, "reference"), tensors, floored=False)
    for name, error in errors(exact, found, floored=False).items():
        assert error <= max(2 * eager[name], 8 * torch.finfo(dtype).eps * exact.size(name)), name


def check_compiled(related: Related, loss_backend: str, **how: Any) -> None:
    """``torch.compile(loss, **how)`` and its gradients against the loss as it is, masked frames holding NaN."""
    case = related.case
    tensors = case.tensors(torch.float32)
    if case.frame_mask is not None:
        tensors["h"][~case.frame_mask] = torch.nan
    h, projector = tensors["h"].requires_grad_(), case.projector(tensors)

    def loss(h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return relational_loss(h, y, projector, backend=loss_backend, **related.options)

    leaves = [h, *projector.parameters()]
    plain = loss(h, tensors["y"])
    expected = torch.autograd.grad(plain, leaves)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, **how)(h, tensors["y"])
    # The same operators in fp32, of clips with their masked frames.
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)
    for gradient, other in zip(expected, torch.autograd.grad(compiled, leaves), strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.every(3)
@varied
def test_compiled_without_a_graph_break(related: Related) -> None:
    """Also where masked frames hold NaN, which the compiled loss cannot skip."""
    check_compiled(related, "torch", backend="aot_eager")


@pytest.mark.parametrize("name", ["equal", pytest.param("margin", marks=pytest.mark.slow)])
def test_the_definition_compiles_without_a_graph_break(name: str) -> None:
    pairs, margin, changes = VARIED[name]
    check_compiled(simply_related(pairs, margin, **changes), "reference", backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["equal", "student-resampled"])
def test_compiled_by_inductor_with_dynamic_shapes(name: str) -> None:
    pairs, margin, changes = VARIED[name]
    check_compiled(simply_related(pairs, margin, **changes), "torch", dynamic=True)


@both_backends
@varied
def test_no_value_is_read_on_the_host(related: Related, backend: str) -> None:
    tensors = related.case.tensors(torch.float32)
    with NoHostReads():
        related.run(tensors, backend)


@both_backends
@varied
def test_tensors_without_values_are_enough(related: Related, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device every host read fails, as a GPU would synchronise."""
    monkeypatch.setattr(torch, "autocast", no_autocast)  # meta has none to switch off
    case, options = related.case, related.options
    h, y = (tensor.to("meta") for name, tensor in case.tensors(torch.float32).items() if name in ("h", "y"))
    projector = CrepaProjector(case.hidden_size, case.feature_size).to("meta")
    for name in ("frame_mask", "teacher_mask", "frame_index"):
        if options[name] is not None:
            options[name] = torch.as_tensor(options[name]).to("meta")
    relational_loss(h.requires_grad_(), y, projector, backend=backend, **options).backward()
    assert h.grad.shape == h.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("margin", [None, 0.1])
@pytest.mark.parametrize("pairs", ["all", "neighbours"])
def test_opcheck(pairs: str, margin: float | None, dtype: torch.dtype) -> None:
    z, d = rows_of_a_clip(dtype)
    offsets = OFFSETS[pairs]
    for gradient in (torch.empty(z.shape, dtype=torch.promote_types(dtype, torch.float32)), torch.empty(0)):
        arguments = (z, d, list(offsets), list(offsets.values()), margin, gradient)
        torch.library.opcheck(relate_frames_op, arguments)


@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_is_kept_without_gradients(frozen: bool) -> None:
    """Under ``no_grad``, and where neither h nor the projector asks for one."""
    related = simply_related(spatial_align="teacher")
    tensors = related.case.tensors(torch.float32)
    projector = related.case.projector(tensors).requires_grad_(not frozen)
    h = tensors["h"].detach().requires_grad_(not frozen)
    with torch.set_grad_enabled(frozen), Storages() as storages:
        loss = relational_loss(h, tensors["y"], projector, **related.options)
    assert not loss.requires_grad
    assert storages.alive([h, *projector.parameters(), tensors["y"], loss]) == 0


def test_rows_and_a_few_numbers_are_kept() -> None:
    """One row of E and five numbers of each token, and the projector's offset."""
    related = simply_related(teacher_grid=(3, 4))
    tensors = related.case.tensors(torch.float32)
    h, projector = tensors["h"].requires_grad_(), related.case.projector(tensors)
    inputs = [h, tensors["y"], *projector.parameters()]
    held = held_bytes(lambda: relational_loss(h, tensors["y"], projector, **related.options), inputs)
    rows, features = h.shape[:3].numel(), related.case.feature_size
    assert 4 * rows * (features + 5) <= held <= 4 * rows * (features + 5) + 4 * features + 64
