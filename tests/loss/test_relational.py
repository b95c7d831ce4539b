"""The relational loss and every gradient of both backends against float64, over drawn configurations.

CI draws every tenth configuration, ``make test-full`` all.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import GRADIENTS
from oracle import Truth
from relational import PAIRS, Related, Tensors, draw_related, relational_truth
from test_loss import FP64_TOLERANCE, NARROW, Results, errors, yardstick

from crepa_kernels.ops import relation

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIGURATIONS = 400
IN_CI = CONFIGURATIONS // 10
BACKENDS = ("reference", "torch")
seeds = pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, id=f"seed{seed}", marks=[] if seed < IN_CI else pytest.mark.slow)
        for seed in range(CONFIGURATIONS)
    ],
)


def eager_results(related: Related, backend: str) -> Callable[[Tensors], Results]:
    """What a backend is measured by: ``reference`` by the oracle's code in fp32, the others by ``reference``."""
    if backend == "reference":
        return lambda tensors: relational_truth(related, tensors, wide=torch.float32).results
    return lambda tensors: related.run(tensors, "reference")


def check(related: Related, tensors: Tensors, exact: Truth, found: Results, backend: str, eps: float) -> None:
    for floored in (False, True):
        if floored and tensors["h"].dtype == torch.float16:
            continue  # a gradient divided by 1e-12 overflows fp16
        eager = yardstick(exact, eager_results(related, backend), tensors, floored)
        for name, error in errors(exact, found, floored).items():
            bound = max(2 * eager[name], 8 * eps * exact.size(name, floored))
            assert error <= bound, (
                f"{backend} {name} floored={floored}: error {error:.3e} > {bound:.3e}, eager's {eager[name]:.3e}, "
                f"in {related}"
            )


@seeds
def test_float64_results_are_exact(seed: int) -> None:
    related = draw_related(seed)
    tensors = related.case.tensors(torch.float64)
    exact = relational_truth(related, tensors)
    for backend in BACKENDS:
        found = related.run(tensors, backend)
        wanted = {name for name in GRADIENTS if name in related.case.required and tensors[name] is not None}
        assert found.keys() == {"loss", *wanted}
        for floored in (False, True):
            for name, error in errors(exact, found, floored).items():
                bound = FP64_TOLERANCE * exact.size(name, floored)
                assert error <= bound, f"{backend} {name} floored={floored}: {error:.3e} > {bound:.3e} in {related}"


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@seeds
def test_errors_are_those_of_eager_arithmetic_in_the_same_type(seed: int, dtype: torch.dtype) -> None:
    """At most max(2 x eager's, 8 eps x the norm without cancellation)"""
    related = draw_related(seed)
    tensors = related.case.tensors(dtype)
    exact = relational_truth(related, tensors)
    eps = torch.finfo(dtype).eps
    for backend in BACKENDS:
        found = related.run(tensors, backend)
        for name, value in found.items():
            assert not value.isnan().any(), f"{backend} {name} is NaN in {related}"
        if exact.cancelled * eps > 0.1:
            continue  # nothing is left of a row of p in this type, and its direction is anybody's
        if related.case.tiny and dtype == torch.float16:
            continue  # which has no such weights
        check(related, tensors, exact, found, backend, eps)


def test_the_drawn_configurations_hold_what_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the two tests above claim to cover is in CI's share of them already."""
    drawn = [draw_related(seed) for seed in range(IN_CI)]

    def some(condition: Callable[[Related], object], least: int = 2) -> None:
        assert sum(bool(condition(related)) for related in drawn) >= least

    for pairs in PAIRS:
        for squared in (True, False):
            some(lambda r, key=(pairs, squared): (r.pairs, r.margin is None) == key)
        for align in ("student", "teacher", "smaller", "pool"):
            some(lambda r, key=(pairs, align): (r.pairs, r.case.spatial_align) == key, 1)
    some(lambda r: r.margin == 0)
    some(lambda r: r.pairs == "neighbours" and 0 < r.case.distance < r.case.frames - 1)
    some(lambda r: r.case.frames == 1)
    some(lambda r: r.case.feature_size == 1)
    some(lambda r: r.case.tiny)
    some(lambda r: r.case.zero_rows)
    some(lambda r: not r.case.linear_bias)
    some(lambda r: r.case.affine == "none")
    some(lambda r: r.case.frame_mask is not None and r.case.teacher_mask is not None)
    some(lambda r: 0 < r.case.counted.sum() < r.case.counted.numel() and r.case.garbage)
    some(lambda r: not r.case.counted.any(), 1)
    for name in GRADIENTS:
        some(lambda r, name=name: name not in r.case.required)
    ways: list[str] = []
    for way in ("by_features", "by_tokens"):
        take = getattr(relation, way)
        monkeypatch.setattr(relation, way, lambda *given, way=way, take=take: ways.append(way) or take(*given))
    for related in drawn:
        if related.margin is None:
            related.run(related.case.tensors(torch.float32), "torch")
    assert min(ways.count("by_features"), ways.count("by_tokens")) >= 5
