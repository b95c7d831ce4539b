"""Loss, metrics and every gradient of the Triton backend against float64, over drawn configurations.

CI draws every tenth configuration, ``make test-full`` all of them. One again:
``pytest tests/loss/test_triton.py -k seed17``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from cases import Case, draw, simple
from devices import on_each_device
from oracle import METRICS, truth
from test_loss import Results, Tensors, errors, results, yardstick

from crepa_kernels.backends.triton import chunks, tiles
from crepa_kernels.backends.triton.rows import add_seven

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIGURATIONS = 200
IN_CI = CONFIGURATIONS // 10
# Seed 11 takes the interpreter as long as the others of CI together; 21 resamples a teacher of which frames are chosen.
DRAWN_BY_CI = {*range(IN_CI), 21} - {11}
NARROW = (torch.float32, torch.bfloat16, torch.float16)

seeds = pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, id=f"seed{seed}", marks=[] if seed in DRAWN_BY_CI else pytest.mark.slow)
        for seed in range(CONFIGURATIONS)
    ],
)


def to(device: str, tensors: Tensors) -> Tensors:
    return {name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()}


@contextmanager
def chunks_of(tokens: int) -> Iterator[None]:
    """Inside, what is made chunk by chunk is made for about so many tokens at a time."""
    before, chunks.CHUNK_TOKENS = chunks.CHUNK_TOKENS, tokens
    try:
        yield
    finally:
        chunks.CHUNK_TOKENS = before


def triton_results(case: Case, tensors: Tensors, recompute: bool = False, path: str = "split") -> Results:
    """By ``path`` where nothing is kept for a backward pass; ``recompute`` makes that so with gradients as well."""
    dtype = tensors["h"].dtype
    choice = tiles.choose(tensors["h"].device, case.hidden_size, case.feature_size, dtype)
    with (
        tiles.forced(replace(choice, inference=path)),
        chunks_of(min(40, chunks.CHUNK_TOKENS) if recompute else chunks.CHUNK_TOKENS),
    ):
        output, gradients = case.run(tensors, "triton", recompute=recompute)
    made = {name: getattr(output, name).detach() for name in METRICS} | gradients
    return {name: value.cpu() for name, value in made.items()}


def check(case: Case, dtype: torch.dtype, device: str, recompute: bool, path: str) -> dict[str, float]:
    """Asserts the bound, max(2 x eager's, 8 eps x the norm without cancellation)."""
    tensors = case.tensors(dtype)
    found = triton_results(case, to(device, tensors), recompute, path)
    for name, value in found.items():
        assert not value.isnan().any(), f"{name} is NaN in {case}"
    exact = truth(case, tensors)
    eps = torch.finfo(dtype).eps
    worst: dict[str, float] = {}
    if exact.cancelled * eps > 0.1:
        return worst  # nothing is left of a row of p in this type, and its direction is anybody's
    for floored in (False, True):
        if floored and dtype == torch.float16:
            continue  # a gradient divided by 1e-12 overflows fp16
        eager = yardstick(exact, lambda inputs: results(case, inputs, "reference"), tensors, floored)
        for name, error in errors(exact, found, floored).items():
            bound = max(2 * eager[name], 8 * eps * exact.size(name, floored))
            assert error <= bound, (
                f"{name} floored={floored}: error {error:.3e} > {bound:.3e}, eager's {eager[name]:.3e}, in {case}"
            )
            if bound > 0:
                worst[name] = max(worst.get(name, 0.0), error / bound)
    return worst


@on_each_device
@seeds
def test_errors_are_those_of_eager_arithmetic_in_the_same_type(seed: int, device: str) -> None:
    """Each seed takes one way through the kernels and one type; all of them come round, CI's share included."""
    recompute, path = [(False, "split"), (True, "one_pass"), (True, "split")][seed % 3]
    check(draw(seed), NARROW[seed // 3 % 3], device, recompute, path)


@on_each_device
@pytest.mark.parametrize("path", ["split", "one_pass"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_without_gradients(dtype: torch.dtype, path: str, device: str) -> None:
    """fp16 tokens fold LayerNorm into the product only here."""
    check(simple(teacher_grid=(3, 4), mean=10.0, std=3.0, required=()), dtype, device, False, path)


def test_the_sums_of_a_row_are_added_each_to_its_own() -> None:
    """The interpreter takes them one by one: what adds them together on a GPU is checked by itself."""
    assert add_seven.fn(*range(14)) == tuple(range(7, 21, 2))
