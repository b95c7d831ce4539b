"""Steps whose sequence is cut over two and three ranks, in the middle of a frame, against one process."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import context_steps
import processes
import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")

# fp32 sums in another order: of numbers of about 1, and of the model's gradients beside their largest.
CLOSE, GRADIENTS = 1e-6, 2e-6


@pytest.fixture(scope="module", params=[2, 3])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("context")
    done = processes.run(context_steps.main, folder, ranks=request.param)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


@cache
def one_process(name: str, ranks: int) -> dict[str, Any]:
    return context_steps.run(context_steps.steps(ranks)[name], ranks, parallel=False)


def of_step(found: list[dict[str, Any]], name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if name not in found[0]:
        pytest.skip("its attention has two heads")
    return one_process(name, len(found)), [own[name] for own in found]


@pytest.mark.parametrize("name", context_steps.steps(2))
def test_shares_and_gradients_of_ranks_add_up_to_one_process(found: list[dict[str, Any]], name: str) -> None:
    whole, ranks = of_step(found, name)
    torch.testing.assert_close(sum(own["loss"] for own in ranks), whole["loss"], rtol=0, atol=CLOSE)
    for parameter, gradient in whole["gradients"].items():
        parts = [own["gradients"][parameter] for own in ranks]
        if gradient is None:
            assert parts == [None] * len(ranks), parameter
            continue
        summed = sum(torch.zeros_like(gradient) if part is None else part for part in parts)
        bound = GRADIENTS * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(summed, gradient, rtol=0, atol=bound, msg=lambda m, p=parameter: f"{p}: {m}")


@pytest.mark.parametrize("name", context_steps.steps(2))
def test_every_rank_logs_and_sees_the_whole_clips(found: list[dict[str, Any]], name: str) -> None:
    whole, ranks = of_step(found, name)
    for own in ranks:
        assert own["logs"] == pytest.approx(whole["logs"], abs=CLOSE, nan_ok=True)
        torch.testing.assert_close(own["matrix"], whole["matrix"], rtol=0, atol=CLOSE)
