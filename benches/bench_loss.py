"""Forward + backward of the loss: the backends, torch.compile of the reference, and the transposed eager form.

    make bench

Each shape keeps its tokens, widths and grids; a CPU takes fewer frames of it (``Shape.cpu_frames``). pytest-benchmark
stores each call's own times; the ratios in ``extra_info`` come from interleaved rounds of all calls of the shape,
on a warm heap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benches.eager import eager_transposed
from benches.measure import interleaved_medians, keep_heap_warm, kept_bytes, peak_bytes
from benches.shapes import RESAMPLED, SAME_GRID, TARGETS, Shape

CALLS = ["transposed", "reference", "compiled", "torch"]

# Times faster than the transposed eager form that the TARGETS shapes must be: with a downsampled student, and on equal
# grids, where the target is "not slower". A miss fails the bench; its figures are stored and tabled all the same.
AT_LEAST_RESAMPLED, AT_LEAST_EQUAL = 2.5, 1.0


class Case:
    """The inputs of one shape and a loss function by the name of each call."""

    def __init__(self, shape: Shape):
        self.shape = shape
        torch.compiler.reset()  # each shape is compiled for itself
        self.hidden_states, self.teacher_features, self.projector = inputs = shape.inputs(shape.cpu_frames)
        self.losses: dict[str, Callable[[], torch.Tensor]] = {
            "transposed": lambda: eager_transposed(*inputs, shape.student_grid, shape.teacher_grid),
            "reference": lambda: shape.loss(*inputs, "reference"),
            "compiled": torch.compile(lambda: shape.loss(*inputs, "reference"), fullgraph=True),
            "torch": lambda: shape.loss(*inputs, "torch"),
        }

    def step(self, name: str) -> Callable[[], None]:
        """Forward + backward; the gradients are dropped at the end, so that each call makes all that it holds."""

        def run() -> None:
            self.losses[name]().backward()
            self.hidden_states.grad = None
            self.projector.zero_grad()

        return run


@pytest.fixture(scope="module", autouse=True)
def _warm_heap() -> None:
    keep_heap_warm()


@pytest.fixture(scope="module", params=TARGETS + SAME_GRID + RESAMPLED, ids=lambda shape: shape.id)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture(scope="module")
def medians(case: Case) -> dict[str, float]:
    rounds = 15 if case.shape in TARGETS else 3
    return interleaved_medians({name: case.step(name) for name in CALLS}, rounds, warmup=2 if rounds > 3 else 1)


@pytest.mark.parametrize("call", CALLS)
def bench_loss(benchmark: Any, case: Case, medians: dict[str, float], call: str) -> None:
    step = case.step(call)
    inputs = [case.hidden_states, case.teacher_features, *case.projector.parameters()]
    benchmark.group = case.shape.id
    benchmark.extra_info.update(
        call=call,
        frames=case.shape.cpu_frames,
        interleaved_median_s=medians[call],
        times_faster_than_transposed=medians["transposed"] / medians[call],
        peak_bytes=peak_bytes(step),
        kept_bytes=kept_bytes(case.losses[call], inputs),
    )
    benchmark.pedantic(step, rounds=1, warmup_rounds=0)
    if case.shape in TARGETS and call == "torch":
        equal = case.shape.student_grid == case.shape.teacher_grid
        assert medians["transposed"] / medians["torch"] >= (AT_LEAST_EQUAL if equal else AT_LEAST_RESAMPLED)
