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
    """What a backend is measured by: ``torch`` by ``reference``, ``reference`` by the oracle's code in fp32."""
    if backend == "torch":
        return lambda tensors: related.run(tensors, "reference")
    return lambda tensors: relational_truth(related, tensors, wide=torch.float32).results


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
