"""Resampling of token-major features: against explicit weights, F.interpolate, and itself as an operator."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import grid_weights

from crepa_kernels import CrepaProjector, crepa_loss, relational_loss, resample_tokens, similarity_matrix
from crepa_kernels.grid import plan_alignment
from crepa_kernels.ops.resample import resample_tokens_adjoint_op, resample_tokens_op

pytestmark = pytest.mark.usefixtures("one_thread")
Grid = tuple[int, int]

# The grids that people train against DINOv2's at 518 and at 224 pixels, both ways.
STUDENTS: list[Grid] = [(30, 52), (45, 80), (22, 40), (16, 24), (22, 38), (32, 48), (30, 45), (30, 53)]
TEACHERS: list[Grid] = [(37, 37), (16, 16)]
TRAINED = [pair for s, t in itertools.product(STUDENTS, TEACHERS) for pair in ((s, t), (t, s))]
SIDES = (1, 2, 3, 5, 8)
ODD = [(s, t) for s in itertools.product(SIDES, SIDES) for t in itertools.product((1, 2, 7), (1, 3, 6))]
# The type's own roundings of a sum of a few hundred taps: 8 eps.
TYPES = {t: 8 * torch.finfo(t).eps for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}

types = pytest.mark.parametrize("dtype", list(TYPES), ids=str)
filters = pytest.mark.parametrize("antialias", [True, False], ids=["widened", "plain"])


def ids(pairs: list[tuple[Grid, Grid]]) -> list[str]:
    return ["{}x{}-to-{}x{}".format(*source, *target) for source, target in pairs]


def tolerance(dtype: torch.dtype, source: Grid) -> float:
    """Error of a resampled token, as a part of the largest one: weights are positive and sum to 1.

    Beside its own roundings there are those of the positions, numbers up to the grid's sides in fp32 (fp64), to which
    the weights of both axes are as far off.
    """
    positions = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps * sum(source)
    return TYPES[dtype] + 2 * positions


def close(found: torch.Tensor, expected: torch.Tensor, tokens: torch.Tensor, tolerance: float) -> None:
    error = (found.double() - expected).abs().max()
    assert error <= tolerance * tokens.double().abs().max(), f"{error:.2e}"


@pytest.mark.every(5)
@types
@filters
@pytest.mark.parametrize(("source", "target"), TRAINED, ids=ids(TRAINED))
def test_trained_grids(source: Grid, target: Grid, antialias: bool, dtype: torch.dtype) -> None:
    tokens = torch.randn(2, source[0] * source[1], 3, dtype=torch.float64).to(dtype)
    expected = grid_weights(source, target, antialias) @ tokens.double()
    found = resample_tokens(tokens, source, target, antialias)
    assert found.dtype == dtype
    assert found.shape == (2, target[0] * target[1], 3)
    assert found.is_contiguous()
    close(found, expected, tokens, tolerance(dtype, source))
    images = tokens.double().unflatten(1, source).permute(0, 3, 1, 2).contiguous()
    images = F.interpolate(images, size=target, mode="bilinear", align_corners=False, antialias=antialias)
    close(found, images.flatten(2).mT, tokens, tolerance(dtype, source))


@filters
def test_odd_and_one_sized_grids(antialias: bool) -> None:
    """Against the weights alone: with one target column F.interpolate(antialias=True) itself reads wrong rows."""
    generator = torch.Generator().manual_seed(0)
    for (source, target), channels in itertools.product(ODD, (1, 4)):
        tokens = torch.randn(3, source[0] * source[1], channels, generator=generator, dtype=torch.float64)
        weights = grid_weights(source, target, antialias)
        layouts = {
            "contiguous": tokens,
            "channels first": tokens.mT.contiguous().mT,
            "batch inside": tokens.transpose(0, 1).contiguous().transpose(0, 1),
            "one image": tokens[:1],
            "expanded": tokens[:1].expand(3, -1, -1),
            "every other channel": tokens.repeat_interleave(2, dim=-1)[..., ::2],
        }
        for name, laid in layouts.items():
            found = resample_tokens(laid, source, target, antialias)
            assert (found - weights @ laid).abs().max() < 1e-13 * 5, f"{name} {source} {target} {channels}"
            grown = weights @ laid  # an adjoint's input in the same layout
            back = resample_tokens_adjoint_op(grown, source, target, antialias)
            assert (back - weights.T @ grown).abs().max() < 1e-13 * 50, f"adjoint {name} {source} {target} {channels}"


@pytest.mark.parametrize(("source", "target"), TRAINED, ids=ids(TRAINED))
@pytest.mark.parametrize("value", [1.0, -3.0])
def test_a_constant_stays_what_it_is(source: Grid, target: Grid, value: float) -> None:
    """Rows of the weights sum to 1, so that Linear and resampling commute."""
    for antialias in (True, False):
        found = resample_tokens(torch.full((source[0] * source[1], 2), value), source, target, antialias)
        assert (found - value).abs().max() < 1e-5  # fp32 weights, summed


@pytest.mark.parametrize("source", STUDENTS)
def test_where_nothing_shrinks_the_filters_are_one(source: Grid) -> None:
    tokens = torch.randn(1, source[0] * source[1], 4)
    target = (source[0] + 3, source[1])
    assert torch.equal(resample_tokens(tokens, source, target, True), resample_tokens(tokens, source, target, False))
    smaller = (source[0] - 3, source[1])
    plain = resample_tokens(tokens, source, smaller, False)
    assert not torch.allclose(resample_tokens(tokens, source, smaller, True), plain, atol=1e-2)
    assert torch.equal(resample_tokens(tokens, source, source), tokens)


@pytest.mark.every(5)
@types
@filters
@pytest.mark.parametrize(("source", "target"), TRAINED, ids=ids(TRAINED))
def test_adjoint_identity(source: Grid, target: Grid, antialias: bool, dtype: torch.dtype) -> None:
    """<R x, g> = <x, R' g>, and R' is what autograd takes."""
    x = torch.randn(source[0] * source[1], 4, dtype=torch.float64).to(dtype).requires_grad_()
    g = torch.randn(target[0] * target[1], 4, dtype=torch.float64).to(dtype)
    forward = resample_tokens(x, source, target, antialias)
    (back,) = torch.autograd.grad(forward, x, g)
    assert torch.equal(back, resample_tokens_adjoint_op(g, source, target, antialias))
    assert back.dtype == dtype
    assert back.is_contiguous()
    left, right = (forward.double() * g.double()).sum(), (x.double() * back.double()).sum()
    # Each product is rounded in proportion to its norms' product, which is what Cauchy-Schwarz bounds it by.
    size = forward.double().norm() * g.double().norm() + x.double().norm() * back.double().norm()
    assert (left - right).abs() <= TYPES[dtype] / 8 * size


SMALL = [((2, 3), (3, 4)), ((4, 5), (2, 2)), ((3, 2), (2, 4)), ((3, 3), (1, 1)), ((1, 4), (3, 1)), ((4, 3), (3, 1))]


@filters
@pytest.mark.parametrize(("source", "target"), SMALL, ids=ids(SMALL))
def test_derivatives(source: Grid, target: Grid, antialias: bool) -> None:
    tokens = torch.randn(2, source[0] * source[1], 2, dtype=torch.float64, requires_grad=True)

    def resample(tokens: torch.Tensor) -> torch.Tensor:
        return resample_tokens(tokens, source, target, antialias)

    assert torch.autograd.gradcheck(resample, tokens)
    assert torch.autograd.gradgradcheck(resample, tokens)
    assert torch.autograd.gradgradcheck(lambda t: resample(t).square(), tokens)


@pytest.mark.every(5)
@filters
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("source", "target"), SMALL, ids=ids(SMALL))
def test_operators_keep_the_rules_of_torch_library(
    source: Grid, target: Grid, dtype: torch.dtype, antialias: bool
) -> None:
    tokens = torch.randn(2, source[0] * source[1], 3, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, target[0] * target[1], 3, dtype=dtype, requires_grad=True)
    for laid in (tokens, tokens.detach().transpose(0, 1).contiguous().transpose(0, 1)):
        torch.library.opcheck(resample_tokens_op, (laid, list(source), list(target), antialias))
    torch.library.opcheck(resample_tokens_adjoint_op, (grad, list(source), list(target), antialias))


def test_operators_are_registered_by_the_import() -> None:
    tokens = torch.randn(1, 6, 2)
    found = torch.ops.crepa_kernels.resample_tokens(tokens, [2, 3], [4, 1], True)
    assert torch.equal(found, resample_tokens(tokens, (2, 3), (4, 1)))
    assert torch.ops.crepa_kernels.resample_tokens_adjoint(found, [2, 3], [4, 1], True).shape == tokens.shape


@filters
def test_compiled_without_a_graph_break(antialias: bool) -> None:
    def loss(tokens: torch.Tensor) -> torch.Tensor:
        return resample_tokens(tokens * 2, (5, 7), (3, 4), antialias).square().sum()

    tokens = torch.randn(2, 35, 3, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, found = torch.autograd.grad(loss(tokens), tokens)[0], torch.autograd.grad(compiled(tokens), tokens)[0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(compiled(tokens), loss(tokens))


@pytest.mark.parametrize("shape", [(12, 3), (2, 12, 3), (2, 3, 12, 3), (0, 12, 3), (2, 12, 0), (2, 0, 5, 12, 3)])
def test_leading_axes(shape: tuple[int, ...]) -> None:
    tokens = torch.randn(shape, requires_grad=True)
    found = resample_tokens(tokens, (3, 4), (2, 5))
    assert found.shape == (*shape[:-2], 10, shape[-1])
    (back,) = torch.autograd.grad(found.sum(), tokens)
    assert back.shape == shape


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    source=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    target=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    antialias=st.booleans(),
    channels=st.integers(1, 3),
    transposed=st.booleans(),
)
def test_any_grids(source: Grid, target: Grid, antialias: bool, channels: int, transposed: bool) -> None:
    tokens = torch.randn(2, source[0] * source[1], channels, dtype=torch.float64)
    if transposed:
        tokens = tokens.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    weights = grid_weights(source, target, antialias)
    found = resample_tokens(tokens, source, target, antialias)
    close(found, weights @ tokens, tokens, tolerance(torch.float64, source))


@pytest.mark.parametrize(
    ("align", "student", "teacher", "grid", "changes"),
    [
        ("student", (30, 52), (37, 37), (30, 52), ("keep", "resample")),
        ("teacher", (30, 52), (37, 37), (37, 37), ("resample", "keep")),
        ("smaller", (30, 52), (37, 37), (37, 37), ("resample", "keep")),
        ("smaller", (16, 24), (37, 37), (16, 24), ("keep", "resample")),
        ("smaller", (4, 6), (3, 8), (4, 6), ("keep", "resample")),  # equal counts: to the student's
        ("pool", (4, 6), (3, 8), (1, 1), ("pool", "pool")),
        *((align, (4, 6), (4, 6), (4, 6), ("keep", "keep")) for align in ("student", "teacher", "smaller", "pool")),
    ],
)
def test_which_side_moves(align: str, student: Grid, teacher: Grid, grid: Grid, changes: tuple[str, str]) -> None:
    plan = plan_alignment(align, student, teacher)
    assert (plan.grid, plan.tokens) == (grid, grid[0] * grid[1])
    assert (plan.student, plan.teacher) == changes


@pytest.mark.every(5)
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("align", ["student", "teacher", "smaller", "pool"])
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("student", STUDENTS)
def test_every_token_of_every_frame_has_a_gradient(student: Grid, teacher: Grid, align: str, backend: str) -> None:
    torch.manual_seed(0)
    h = torch.randn(1, 2, student[0] * student[1], 8, requires_grad=True)
    y = torch.randn(1, 2, teacher[0] * teacher[1], 5)
    projector = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 5))
    crepa_loss(
        h, y, projector, student_grid=student, teacher_grid=teacher, spatial_align=align, backend=backend
    ).loss.backward()
    norms = h.grad.norm(dim=-1)
    # A token of a few taps has, by luck, a small gradient now and then; one left out has none at all.
    assert (norms > 1e-3 * norms.mean()).all()


def test_the_plain_filter_leaves_most_tokens_out() -> None:
    """What ``antialias=False`` is for: 86 % of the tokens have no gradient at 45x80 -> 16x16."""
    tokens = torch.randn(45 * 80, 1, requires_grad=True)
    resample_tokens(tokens, (45, 80), (16, 16), antialias=False).sum().backward()
    ignored = (tokens.grad == 0).double().mean()
    assert ignored.item() == pytest.approx(0.86, abs=0.005)


@pytest.mark.parametrize("call", [crepa_loss, relational_loss, similarity_matrix])
def test_the_students_grid_is_that_of_the_latents(call: Any) -> None:
    torch.manual_seed(0)
    hidden, teacher = torch.randn(1, 2, 15, 8), torch.randn(1, 2, 4, 6)
    sides = (hidden, teacher, CrepaProjector(8, 6))
    found = call(*sides, latent_shape=(2, 6, 10), patch=(1, 2, 2), teacher_grid=(2, 2))
    expected = call(*sides, student_grid=(3, 5), teacher_grid=(2, 2))
    for one, other in [(found, expected)] if isinstance(found, torch.Tensor) else zip(found, expected, strict=True):
        assert one.equal(other)


@pytest.mark.parametrize(
    ("grids", "said"),
    [
        ({}, "student_grid= is missing, or latent_shape="),
        ({"latent_shape": (2, 6, 10)}, "student_grid= is missing"),
        ({"student_grid": (3, 5), "patch": (1, 2, 2)}, "and not both"),
        (
            {"latent_shape": (3, 6, 10), "patch": (1, 2, 2)},
            "hidden_states have 2 frames of tokens, latents of 3 frames",
        ),
        ({"latent_shape": (2, 6, 9), "patch": (1, 2, 2)}, "latents of 6 x 9 are no whole patches of 2 x 2"),
        ({"latent_shape": (6, 10), "patch": (1, 2, 2)}, r"latent_shape must be \(frames, height, width\).*\(6, 10\)"),
        ({"latent_shape": (2, 6, 10), "patch": (1, 2.0, 2)}, "patch must be"),
        ({"latent_shape": (2, 6, 10), "patch": (0, 2, 2)}, "patch must be"),
    ],
)
def test_a_grid_that_is_not_said_is_asked_for(grids: dict[str, Any], said: str) -> None:
    hidden, teacher = torch.randn(1, 2, 15, 8), torch.randn(1, 2, 4, 6)
    with pytest.raises(ValueError, match=said):
        crepa_loss(hidden, teacher, CrepaProjector(8, 6), teacher_grid=(2, 2), **grids)
