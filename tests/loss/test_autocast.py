"""fp32 tokens under autocast: their products in its type, everything else in fp32.

CI draws every tenth configuration, ``make test-full`` all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from cases import Case, draw, simple
from devices import on_each_device
from oracle import truth
from test_loss import Results, Tensors, errors, results, yardstick
from test_triton import to, triton_results
from torch._subclasses.fake_tensor import FakeTensorMode

from crepa_kernels.backends.triton.launch import tf32_products
from crepa_kernels.inputs import product_type, warn_of_slow_products

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIGURATIONS = 120
IN_CI = CONFIGURATIONS // 10
LARGE = 11  # takes the interpreter as long as the others of CI together
HALF = (torch.bfloat16, torch.float16)
seeds = pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, id=f"seed{seed}", marks=[] if seed < IN_CI and seed != LARGE else pytest.mark.slow)
        for seed in range(CONFIGURATIONS)
    ],
)


def by(backend: str, case: Case, kind: torch.dtype, device: str = "cpu") -> Callable[[Tensors], Results]:
    """Loss, metrics and gradients of a backend under autocast in ``kind``, both passes of it."""

    def run(tensors: Tensors) -> Results:
        if backend == "oracle":
            return truth(case, tensors, wide=torch.float32, narrow=kind).results
        with torch.autocast(device, kind):
            if backend == "triton":
                return triton_results(case, to(device, tensors), recompute=case.seed % 2 == 1)
            return results(case, tensors, backend)

    return run


def check(case: Case, kind: torch.dtype, backend: str, yard: str, device: str = "cpu") -> None:
    """Asserts the bound for products in ``kind``: max(2 x eager's under the same autocast, 8 eps x the norm)."""
    tensors = case.tensors(torch.float32)
    exact = truth(case, tensors)
    eps = torch.finfo(kind).eps
    found = by(backend, case, kind, device)(tensors)
    for name, value in found.items():
        assert not value.isnan().any(), f"{name} is NaN in {case}"
    if exact.cancelled * eps > 0.1 or (case.tiny and kind == torch.float16):
        return  # nothing is left of a row of p in this type; fp16 has no such weights
    for floored in (False, True):
        if floored and kind == torch.float16:
            continue  # eager's gradient divided by 1e-12 overflows fp16
        eager = yardstick(exact, by(yard, case, kind), tensors, floored)
        for name, error in errors(exact, found, floored).items():
            bound = max(2 * eager[name], 8 * eps * exact.size(name, floored))
            assert error <= bound, f"{backend} {name}: {error:.3e} > {bound:.3e}, eager's {eager[name]:.3e}, in {case}"


@pytest.mark.parametrize("kind", HALF, ids=str)
@pytest.mark.parametrize(("backend", "yard"), [("reference", "oracle"), ("torch", "reference")])
@seeds
def test_errors_are_those_of_eager_arithmetic_under_autocast(
    seed: int, backend: str, yard: str, kind: torch.dtype
) -> None:
    check(draw(seed), kind, backend, yard)


@on_each_device
@pytest.mark.few_on_a_gpu("seed4-", "seed7-")
@seeds
def test_the_triton_backends_too(seed: int, device: str) -> None:
    check(draw(seed), HALF[seed // 2 % 2], "triton", "reference", device)


@on_each_device
@pytest.mark.parametrize("align", ["student", "teacher", "pool"])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_tokens_are_normalized_before_they_are_rounded(backend: str, align: str, device: str) -> None:
    """bf16 has 8 bits, of which a mean of 100 standard deviations would leave one."""
    device = device if backend == "triton" else "cpu"
    case = simple(mean=100.0, spatial_align=align, hidden_size=192, feature_size=96)
    tensors = case.tensors(torch.float32)
    exact = truth(case, tensors)
    found = errors(exact, by(backend, case, torch.bfloat16, device)(tensors), floored=False)
    for name in ("h", "gamma", "weight"):
        # Products of numbers rounded to 8 bits are 0.2 to 0.4 % off.
        assert found[name] <= 0.01 * exact.results[name].norm(), name


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_the_products_are_in_autocasts_type(backend: str) -> None:
    """With the digits of bf16, not of fp32: the slow way would pass every bound above."""
    case = simple(teacher_grid=(3, 4), hidden_size=192, feature_size=96)
    tensors = case.tensors(torch.float32)
    exact = truth(case, tensors)
    error = errors(exact, by(backend, case, torch.bfloat16)(tensors), floored=False)["h"]
    assert error >= 1e-4 * exact.results["h"].norm()


def test_only_fp32_tokens_take_autocasts_type() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert product_type(torch.empty(1)) == torch.bfloat16
        for other in (torch.float64, torch.float16):
            assert product_type(torch.empty(1, dtype=other)) == other
    assert product_type(torch.empty(1)) == torch.float32
    assert product_type(torch.empty(1, device="meta")) == torch.float32


def test_fp32_products_on_a_gpu_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_slow_products.cache_clear()
    with FakeTensorMode():
        tokens = torch.empty(1, device="cuda")
    with caplog.at_level(logging.WARNING):
        with tf32_products():
            product_type(tokens)
        assert not caplog.records
        for _ in range(2):
            product_type(tokens)
    (record,) = caplog.records
    assert "autocast is off" in record.getMessage()


@pytest.mark.parametrize("before", ["highest", "high"])
def test_tf32_is_for_the_products_inside_alone(before: str) -> None:
    matmul, initial = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(before)
        found = matmul.fp32_precision
        with tf32_products():
            assert matmul.fp32_precision == "tf32"
            assert matmul.allow_tf32  # both of PyTorch's switches: it stops where they disagree
        assert matmul.fp32_precision == found
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(initial)
