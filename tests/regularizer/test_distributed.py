"""Two gloo processes with CREPA against one process that sees the same samples."""

from __future__ import annotations

from functools import cache
from typing import Any

import processes
import pytest
import ranks
import torch

pytestmark = pytest.mark.usefixtures("one_thread")

# One fp32 rounding of numbers of size 1 in the sum over ranks, and what 20 AdamW steps make of it: 1.2e-7 was measured.
CLOSE = 1e-6


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each rank had of each run."""
    folder = tmp_path_factory.mktemp("ranks")
    done = processes.run(ranks.main, folder, ranks=ranks.RANKS)
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        run: [torch.load(folder / f"{run}-{rank}.pt", weights_only=False) for rank in range(ranks.RANKS)]
        for run in ranks.RUNS
    }


@cache
def one_process() -> dict[str, Any]:
    return ranks.one_process()


def series(result: dict[str, Any], key: str) -> list[Any]:
    return [step[key] for step in result["history"]]


def assert_alike(one: dict[str, Any], both: list[dict[str, Any]]) -> None:
    for rank, own in enumerate(both):
        assert series(own, "weight") == series(one, "weight")
        assert series(own, "cutoff") == series(one, "cutoff")
        torch.testing.assert_close(series(own, "ema"), series(one, "ema"), rtol=0, atol=CLOSE, equal_nan=True)
        for step, losses in enumerate(series(own, "losses")):
            expected = series(one, "losses")[step][rank :: ranks.RANKS]
            torch.testing.assert_close(losses, expected, rtol=0, atol=CLOSE)
        assert own["weights"].keys() == one["weights"].keys()
        for name, weight in own["weights"].items():
            torch.testing.assert_close(weight, one["weights"][name], rtol=0, atol=CLOSE, msg=name)


@pytest.mark.parametrize("setting", ranks.DDP_SETTINGS)
def test_two_ranks_train_as_one_process_and_are_cut_off_in_the_same_step(found: Any, setting: str) -> None:
    one = one_process()
    cutoffs = series(one, "cutoff")
    assert series(one, "weight")[0] == 0.0
    assert not cutoffs[0]  # warm-up, not a cutoff
    assert 5 < cutoffs.index(True) < 15
    assert all(cutoffs[cutoffs.index(True) :])
    assert_alike(one, found[setting])


@pytest.mark.parametrize("case", ranks.IMAGES)
def test_images_on_two_ranks_have_the_gradients_of_one_process(found: Any, case: str) -> None:
    expected = ranks.image_gradients(case, 0, 1)
    assert {"crepa_projector.1.weight"} < expected.keys()
    for own in found["images"]:
        assert own[case].keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(own[case][name], gradient, rtol=1e-4, atol=CLOSE, msg=name)


def test_the_comparison_sees_a_wrong_sum_over_ranks(found: Any) -> None:
    # With its own samples alone a rank would have measured something else.
    ema = series(ranks.one_process(ranks.frame_mask_of_even_samples), "ema")
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            ema[3:], series(found["unused-False-static-False"][0], "ema")[3:], rtol=0, atol=CLOSE
        )


def test_a_rank_without_a_frame_in_the_loss_takes_part_and_probes_with_the_other(found: Any) -> None:
    one = ranks.one_process(ranks.frame_mask_of_even_samples, **ranks.RECOVERABLE)
    cutoffs = series(one, "cutoff")
    assert any(cutoffs)
    assert len(set(series(one, "ema")[cutoffs.index(True) + 2 :])) > 1, "no probe was made"
    assert_alike(one, found["rank-1-has-no-frames"])


def test_a_resumed_run_of_two_ranks_is_bitwise_the_one_that_was_not_stopped(found: Any) -> None:
    for own in found["resumed"]:
        whole = own["whole"]
        assert series(whole, "cutoff").index(True) == 11
        for stop in ranks.STOPS:
            result = own[f"after {stop} steps"]
            # repr, so that a NaN equals itself.
            assert repr(result["history"]) == repr(whole["history"][stop:])
            assert all(torch.equal(result["weights"][name], weight) for name, weight in whole["weights"].items())


def test_ranks_decide_alike_also_where_one_of_them_has_measured_nothing(found: Any) -> None:
    one = ranks.schedule(0, ranks=1)
    first, second = found["schedule"]
    assert {True, False} == {decision[2] for decision, _ in one["trace"]}
    assert any(decision[3] for decision, _ in one["trace"])
    assert first["trace"] == second["trace"]
    assert [decision for decision, _ in first["trace"]] == [decision for decision, _ in one["trace"]]
    assert_close_averages(first["trace"], one["trace"])


def assert_close_averages(trace: list[Any], expected: list[Any]) -> None:
    for (_, ema), (_, other) in zip(trace, expected, strict=True):
        assert ema == pytest.approx(other, abs=1e-12)  # fp64 sums in another order


def test_each_rank_has_the_whole_state_and_goes_on_from_it(found: Any) -> None:
    first, second = found["schedule"]
    assert first["states"] == second["states"]
    under_way = [entry for state in first["states"] for entry in state["under_way"] if state["step"] > entry["step"]]
    every = [ranks.measured(rank, 1, micro) for rank in range(ranks.RANKS) for micro in range(2)]
    of_step_1 = {entry["count"] for entry in under_way if entry["step"] == 1}
    assert of_step_1 == {sum(value[1] for value in every if value is not None)}
    for rank in found["schedule"]:
        for step, trace in rank["from between steps"].items():
            assert trace == rank["trace"][step:]
        for step, trace in rank["from within steps"].items():
            assert [decision for decision, _ in trace] == [decision for decision, _ in rank["trace"][step:]]
            assert_close_averages(trace, rank["trace"][step:])


def test_fully_shard_trains_as_one_process(found: Any) -> None:
    assert_alike(one_process(), found["fsdp"])


def test_sharded_weights_that_are_read_outside_of_the_projector_are_an_error(found: Any) -> None:
    for own in found["fsdp"]:
        for message in own["read elsewhere"].values():
            assert "DTensors: make it a CrepaProjector and its own fully_shard unit" in message
        assert set(own["read elsewhere"]) == {"another module", "no unit of its own"}


def test_a_sharded_projector_is_saved_whole_and_comes_back(found: Any) -> None:
    for own in found["fsdp"]:
        trained = {name: own["weights"][f"crepa_projector.{name}"] for name in own["state"]["projector"]}
        for where in (own["state"]["projector"], own["restored"], own["loaded"]):
            assert all(torch.equal(where[name], weight) for name, weight in trained.items())
