"""Steps whose sequence is cut over two and three ranks, in the middle of a frame, against one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import context_steps
import processes
import pytest
import torch
import torch.distributed as dist
from tiny import tiny_wan

from crepa_kernels import CrepaRegularizer, TokenLayout

pytestmark = pytest.mark.usefixtures("one_thread")

# fp32 sums in another order: of numbers of about 1, and of the model's gradients beside their largest.
CLOSE, GRADIENTS = 1e-6, 2e-6


Found = Callable[[int], list[dict[str, Any]]]
CASES = [(ranks, name) for ranks in (2, 3) for name in context_steps.steps(ranks)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each of so many ranks had of every step."""

    @cache
    def of(ranks: int) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("context")
        done = processes.run(context_steps.main, folder, ranks=ranks)
        assert done.returncode == 0, done.stderr[-4000:]
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]

    return of


@cache
def one_process(ranks: int, name: str) -> dict[str, Any]:
    return context_steps.run(context_steps.steps(ranks)[name], ranks, parallel=False)


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_shares_and_gradients_of_ranks_add_up_to_one_process(found: Found, ranks: int, name: str) -> None:
    whole, shares = one_process(ranks, name), [own[name] for own in found(ranks)]
    torch.testing.assert_close(sum(own["loss"] for own in shares), whole["loss"], rtol=0, atol=CLOSE)
    for parameter, gradient in whole["gradients"].items():
        parts = [own["gradients"][parameter] for own in shares]
        if gradient is None:
            assert parts == [None] * ranks, parameter
            continue
        summed = sum(torch.zeros_like(gradient) if part is None else part for part in parts)
        bound = GRADIENTS * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(summed, gradient, rtol=0, atol=bound, msg=lambda m, p=parameter: f"{p}: {m}")


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_every_rank_logs_and_sees_the_whole_clips(found: Found, ranks: int, name: str) -> None:
    whole = one_process(ranks, name)
    for own in (each[name] for each in found(ranks)):
        assert own["logs"] == pytest.approx(whole["logs"], abs=CLOSE, nan_ok=True)
        torch.testing.assert_close(own["matrix"], whole["matrix"], rtol=0, atol=CLOSE)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_threshold_is_compared_with_the_whole_clips_similarity(found: Found, ranks: int) -> None:
    (whole,) = one_process(ranks, "adjacent")["schedule"]["under_way"]
    for own in (each["adjacent"] for each in found(ranks)):
        assert own["schedule"]["under_way"] == [whole | {"sum": pytest.approx(whole["sum"], abs=CLOSE)}]


def test_each_rank_encodes_the_frames_alone_that_teach_its_tokens(found: Found) -> None:
    """Of two clips; without neighbours, two of three frames have tokens of a rank, and of four two, two and two."""
    assert one_process(2, "pixels")["encoded"] == 2 * 3
    assert [own["pixels"]["encoded"] for own in found(2)] == [2 * 2, 2 * 2]
    assert one_process(3, "pixels")["encoded"] == 2 * 4
    assert [own["pixels"]["encoded"] for own in found(3)] == [2 * 2, 2 * 2, 2 * 2]


def test_a_model_that_is_not_cut_over_the_group_is_an_error(found: Found) -> None:
    for own, held in zip(found(2), ((0, 9), (9, 18)), strict=True):
        assert "block 1 returned (2, 18, 48), expected (B, 9, D)" in own["uncut"]
        assert f"of which this rank has {held}" in own["uncut"]


def test_a_group_must_be_one_of_this_rank() -> None:
    for wrong in (2, "world"):
        with pytest.raises(ValueError, match=r"context_group must be a torch\.distributed process group of this rank"):
            CrepaRegularizer(context_steps.CONFIG, tiny_wan(), feature_size=8, context_group=wrong)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (TokenLayout(2, (8, 8), 1, (2, 16, 16), tile=8), "context parallelism .* tokens come by tiles"),
        (TokenLayout(1, (2, 3), 1, (1, 4, 6), sequence=12), "context parallelism .* reference images"),
    ],
)
def test_sequences_of_which_a_run_is_none_of_the_clip(layout: TokenLayout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.over(dist.group.WORLD)
