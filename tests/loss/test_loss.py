"""Loss, metrics and every gradient of both backends against float64, over drawn configurations.

CI draws every tenth configuration, ``make test-full`` all. One again: ``pytest tests/loss/test_loss.py -k seed17``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import GRADIENTS, Case, draw, simple
from oracle import METRICS, Truth, truth

from crepa_kernels import CrepaOutput

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIGURATIONS = 600
IN_CI = CONFIGURATIONS // 10
BACKENDS = ("reference", "torch")
NARROW = (torch.float32, torch.bfloat16, torch.float16)
# float64 has 1e-16; LayerNorm of tokens with mean / std = 100 and sums of some hundred terms leave 1e-13.
FP64_TOLERANCE = 1e-10

seeds = pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, id=f"seed{seed}", marks=[] if seed < IN_CI else pytest.mark.slow)
        for seed in range(CONFIGURATIONS)
    ],
)
Tensors = dict[str, torch.Tensor | None]
Results = dict[str, torch.Tensor]


def results(case: Case, tensors: Tensors, backend: str) -> Results:
    output, gradients = case.run(tensors, backend)
    return {**{name: getattr(output, name).detach() for name in METRICS}, **gradients}


def turned(values: dict[str, Any], order: int) -> dict[str, Any]:
    """The channels of h and of the features, or the tokens, of inputs or of results, in an order that undoes itself.

    ``order`` 0 leaves them alone, 1 mirrors both widths, 2 that of the features alone, 3 the grids on both axes, 4 all.
    """
    axes = {"h": (-1,), "gamma": (-1,), "beta": (-1,), "weight": (-2, -1), "bias": (-1,), "y": (-1,)}
    of_features = {"weight": (-2,), "bias": (-1,), "y": (-1,)}
    tokens = {"h": (-2,), "y": (-2,)}
    flips = ({}, axes, of_features, tokens, {**axes, "h": (-2, -1), "y": (-2, -1)})[order]
    return {name: t if t is None else t.flip(flips.get(name, ())) for name, t in values.items()}


def errors(exact: Truth, found: Results, floored: bool) -> dict[str, float]:
    """Norm of the error of each result; ``floored``: of dh where it passed a row below the norm's floor."""
    return {
        name: float((exact.part(name, value, floored).double() - exact.part(name, exact.results[name], floored)).norm())
        for name, value in found.items()
    }


def yardstick(exact: Truth, eager: Callable[[Tensors], Results], tensors: Tensors, floored: bool) -> dict[str, float]:
    """Errors of eager arithmetic in the same type.

    One error is a draw, of a single number often 0 by luck, so it is the largest over five orders of summation.
    """
    draws = [errors(exact, turned(eager(turned(tensors, order)), order), floored) for order in range(5)]
    return {name: max((e[name] for e in draws if e[name] == e[name]), default=0.0) for name in draws[0]}


def typical_error(exact: Truth, run: Callable[[Tensors], Results], tensors: Tensors, floored: bool, name: str) -> float:
    """The rms of a result's error over 16 orders in which the channels of h and of the features are summed."""
    squares = []
    for seed in range(16):
        generator = torch.Generator().manual_seed(seed)
        width, features = (torch.randperm(tensors["weight"].shape[axis], generator=generator) for axis in (1, 0))
        found = shuffled(run(shuffled(tensors, width, features)), width.argsort(), features.argsort())
        squares.append(errors(exact, found, floored)[name] ** 2)
    return (sum(squares) / len(squares)) ** 0.5


def shuffled(values: dict[str, Any], width: torch.Tensor, features: torch.Tensor) -> dict[str, Any]:
    """Inputs or results with the channels of h and of the features in these orders."""
    orders: dict[str, dict[int, torch.Tensor]] = {
        **{name: {-1: width} for name in ("h", "gamma", "beta")},
        **{name: {-1: features} for name in ("bias", "y")},
        "weight": {-2: features, -1: width},
    }

    def moved(value: torch.Tensor, axes: dict[int, torch.Tensor]) -> torch.Tensor:
        for axis, order in axes.items():
            value = value.index_select(axis, order)
        return value

    return {name: t if t is None else moved(t, orders.get(name, {})) for name, t in values.items()}


def eager_results(case: Case, backend: str) -> Callable[[Tensors], Results]:
    """What a backend is measured by: ``torch`` by ``reference``, ``reference`` by the oracle's code in fp32."""
    if backend == "torch":
        return lambda tensors: results(case, tensors, "reference")
    return lambda tensors: truth(case, tensors, wide=torch.float32).results


@seeds
def test_float64_results_are_exact(seed: int) -> None:
    case = draw(seed)
    tensors = case.tensors(torch.float64)
    exact = truth(case, tensors)
    for backend in BACKENDS:
        found = results(case, tensors, backend)
        assert set(found) - set(METRICS) == {n for n in GRADIENTS if n in case.required and tensors[n] is not None}
        for floored in (False, True):
            for name, error in errors(exact, found, floored).items():
                bound = FP64_TOLERANCE * exact.size(name, floored)
                assert error <= bound, f"{backend} {name} floored={floored}: {error:.3e} > {bound:.3e} in {case}"


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@seeds
def test_errors_are_those_of_eager_arithmetic_in_the_same_type(seed: int, dtype: torch.dtype) -> None:
    """At most max(2 x eager's, 8 eps x the norm without cancellation)."""
    case = draw(seed)
    tensors = case.tensors(dtype)
    exact = truth(case, tensors)
    eps = torch.finfo(dtype).eps
    for backend in BACKENDS:
        found = results(case, tensors, backend)
        for name, value in found.items():
            assert not value.isnan().any(), f"{backend} {name} is NaN in {case}"
        if exact.cancelled * eps > 0.1:
            continue  # nothing is left of a row of p in this type, and its direction is anybody's
        if case.tiny and dtype == torch.float16:
            continue  # which has no such weights
        for floored in (False, True):
            if floored and dtype == torch.float16:
                continue  # a gradient divided by 1e-12 overflows fp16
            eager = yardstick(exact, eager_results(case, backend), tensors, floored)
            for name, error in errors(exact, found, floored).items():
                yard, least = eager[name], 8 * eps * exact.size(name, floored)
                if error > max(2 * yard, least):  # one draw against five, which may be small by luck: 16 of each
                    error, yard = (
                        typical_error(exact, run, tensors, floored, name)
                        for run in (lambda given, by=backend: results(case, given, by), eager_results(case, backend))
                    )
                assert error <= max(2 * yard, least), (
                    f"{backend} {name} floored={floored}: error {error:.3e}, eager's {yard:.3e}, least {least:.3e}, "
                    f"in {case}"
                )


def test_the_drawn_configurations_hold_what_they_should() -> None:
    """What the two tests above claim to cover is in CI's share of them already."""
    cases = [draw(seed) for seed in range(IN_CI)]

    def some(condition: Callable[[Case], object], least: int = 2) -> None:
        assert sum(bool(condition(case)) for case in cases) >= least

    for align in ("student", "teacher", "smaller", "pool"):
        for antialias in (True, False):
            for cumulative in (True, False):
                some(lambda c, key=(align, antialias, cumulative): (c.spatial_align, c.antialias, c.cumulative) == key)
    some(lambda c: c.student_grid == c.teacher_grid)
    some(lambda c: c.distance == 0)
    some(lambda c: c.distance >= c.frames)
    some(lambda c: c.frames == 1)
    some(lambda c: c.teacher_frames != c.frames)
    some(lambda c: isinstance(c.frame_index, torch.Tensor) and c.frame_index.dim() == 2)
    some(lambda c: c.frame_mask is not None and c.teacher_mask is not None)
    some(lambda c: c.frame_mask is not None and c.batch > 1 and (~c.frame_mask.any(dim=1)).any(), 1)
    some(lambda c: c.frame_mask is not None and not c.frame_mask.any(), 1)
    for mean in (0.0, 1.0, 10.0, 100.0):
        some(lambda c, mean=mean: c.mean == mean)
    some(lambda c: c.hidden_size == 1)
    some(lambda c: c.feature_size == 1)
    some(lambda c: 1 in c.student_grid)
    some(lambda c: c.resampled is None and c.spatial_align == "pool" and c.student_grid != c.teacher_grid)
    some(lambda c: c.zero_rows)
    some(lambda c: c.tiny)
    some(lambda c: c.garbage and not c.counted.all() and c.layout == c.teacher_layout == "contiguous")
    for affine in ("both", "scale", "none"):
        some(lambda c, affine=affine: c.affine == affine)
    some(lambda c: not c.linear_bias)
    for name in ("contiguous", "transposed", "sliced", "expanded"):
        some(lambda c, name=name: c.layout == name)
        some(lambda c, name=name: c.teacher_layout == name)
    for name in GRADIENTS:
        some(lambda c, name=name: name not in c.required)
    some(lambda c: c.normalize_neighbour_sum and not c.normalize_by_frames)
    some(lambda c: c.flattened)
    for absent in (False, True):
        some(lambda c, absent=absent: c.absent == absent and c.grows)
        some(lambda c, absent=absent: c.absent == absent and c.resampled == "student" and not c.grows)
    some(lambda c: c.absent and c.resampled == "teacher")
    some(lambda c: c.absent and c.spatial_align == "pool")
    some(lambda c: c.absent and c.tiny, 1)


WIDE = simple(
    batch=1,
    frames=3,
    teacher_frames=3,
    student_grid=(6, 8),
    teacher_grid=(5, 5),
    hidden_size=192,
    feature_size=96,
    distance=2,
)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("mean", [0.0, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("align", ["student", "teacher"])
def test_errors_at_training_like_widths_are_at_most_twice_eagers(dtype: torch.dtype, mean: float, align: str) -> None:
    """No floor of 8 eps here: with thousands of numbers in each gradient no error is small by luck.

    Measured are 0.6 to 1.4 times eager's at every mean; LayerNorm folded into an fp32 product would be 5 to 8. What is
    kept for the backward pass is one number of the type of h for each of p: a third of an eps where it is rounded
    (root mean square of a uniform rounding), which eager in fp16 does not do.
    """
    case = replace(WIDE, mean=mean, spatial_align=align, full_precision_weights=True)
    tensors = case.tensors(dtype)
    exact = truth(case, tensors)
    eager = yardstick(exact, eager_results(case, "torch"), tensors, floored=False)
    found = errors(exact, results(case, tensors, "torch"), floored=False)
    for name in GRADIENTS:
        bound = max(2 * eager[name], torch.finfo(dtype).eps / 3 * exact.size(name))
        assert found[name] <= bound, f"{name}: {found[name]:.3e} > {bound:.3e}, eager's {eager[name]:.3e}"


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("align", ["student", "teacher"])
def test_statistics_are_wide_whatever_the_type_of_the_tokens(dtype: torch.dtype, align: str) -> None:
    """Few channels, where LayerNorm's row sums are most of its gradient: a mean of 100 in bf16 is 20 times eager's."""
    case = replace(WIDE, mean=100.0, spatial_align=align, full_precision_weights=True, hidden_size=4)
    tensors = case.tensors(dtype)
    exact = truth(case, tensors)
    eager = yardstick(exact, eager_results(case, "torch"), tensors, floored=False)
    assert errors(exact, results(case, tensors, "torch"), floored=False)["h"] <= 2 * eager["h"]


def test_outputs_are_named() -> None:
    assert CrepaOutput._fields == METRICS
