from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from schedule_runs import observe, run, schedule

from crepa_kernels.config import CrepaConfig
from crepa_kernels.regularizer.schedule import CrepaSchedule, Decision

DECAY: dict[str, Any] = {
    "crepa_lambda": 0.5,
    "crepa_warmup_steps": 100,
    "crepa_decay_steps": 5000,
    "crepa_lambda_end": 0.1,
}


@pytest.mark.parametrize(
    ("settings", "step", "weight"),
    [
        ({}, 0, 0.5),
        ({}, 10**9, 0.5),
        ({"crepa_warmup_steps": 100}, 0, 0.0),
        ({"crepa_warmup_steps": 100}, 1, 0.005),
        ({"crepa_warmup_steps": 100}, 50, 0.25),
        ({"crepa_warmup_steps": 100}, 100, 0.5),
        *(({**DECAY, "crepa_scheduler": name}, 0, 0.0) for name in ("linear", "cosine", "polynomial")),
        *(({**DECAY, "crepa_scheduler": name}, 99, 0.495) for name in ("linear", "cosine", "polynomial")),
        *(({**DECAY, "crepa_scheduler": name}, 100, 0.5) for name in ("linear", "cosine", "polynomial")),
        *(({**DECAY, "crepa_scheduler": name}, 5100, 0.1) for name in ("linear", "cosine", "polynomial")),
        *(({**DECAY, "crepa_scheduler": name}, 9999, 0.1) for name in ("linear", "cosine", "polynomial")),
        ({**DECAY, "crepa_scheduler": "linear"}, 2600, 0.3),
        ({**DECAY, "crepa_scheduler": "linear"}, 5099, 0.1 + 0.4 / 5000),
        ({**DECAY, "crepa_scheduler": "cosine"}, 2600, 0.3),
        ({**DECAY, "crepa_scheduler": "cosine"}, 1350, 0.1 + 0.2 * (1 + math.sqrt(0.5))),
        ({**DECAY, "crepa_scheduler": "polynomial", "crepa_power": 2.0}, 2600, 0.2),
        ({**DECAY, "crepa_scheduler": "polynomial"}, 2600, 0.3),
        # Decay over the rest of a run of 1000 steps.
        ({"crepa_scheduler": "linear", "crepa_warmup_steps": 200}, 600, 0.25),
        ({"crepa_scheduler": "linear", "crepa_warmup_steps": 200}, 1000, 0.0),
        # Nothing is left of the run for the decay.
        ({"crepa_scheduler": "linear", "crepa_warmup_steps": 1000}, 1000, 0.5),
        ({"crepa_scheduler": "linear", "crepa_warmup_steps": 2000}, 2001, 0.0),
        # The weight may rise as well.
        ({"crepa_scheduler": "linear", "crepa_lambda": 0.0, "crepa_lambda_end": 1.0}, 500, 0.5),
        ({"crepa_cutoff_step": 7}, 6, 0.5),
        ({"crepa_cutoff_step": 7}, 7, 0.0),
        ({"crepa_cutoff_step": 7, "crepa_warmup_steps": 10}, 6, 0.3),
    ],
)
def test_weight_at_hand_computed_points(settings: dict[str, Any], step: int, weight: float) -> None:
    # A handful of float64 operations on numbers below 1.
    assert schedule(**settings).weight(step) == pytest.approx(weight, abs=1e-15)


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial"])
def test_decay_starts_and_ends_exactly(name: str) -> None:
    crepa = schedule(**{**DECAY, "crepa_scheduler": name, "crepa_lambda": 0.1, "crepa_lambda_end": 0.4})
    # In float64, (0.1 - 0.4) + 0.4 is not 0.1.
    assert (crepa.weight(100), crepa.weight(5100)) == (0.1, 0.4)
    assert crepa.weight(5099) < crepa.weight(5100)


def test_weight_does_not_depend_on_what_was_decided() -> None:
    crepa = schedule(crepa_similarity_threshold=0.5)
    before = [crepa.weight(step) for step in range(20)]
    run(crepa, [0.9] * 20)
    assert [crepa.weight(step) for step in range(20)] == before


def test_nothing_runs_while_the_weight_is_zero_and_that_is_no_cutoff() -> None:
    crepa = schedule(
        crepa_warmup_steps=2,
        crepa_scheduler="linear",
        crepa_decay_steps=3,
        crepa_similarity_threshold=0.9,
        crepa_threshold_mode="recoverable",
        crepa_probe_interval=1,
    )
    decisions = run(crepa, [0.0] * 8)
    assert [decision.run for decision in decisions] == [False, True, True, True, True, False, False, False]
    assert not any(decision.cutoff or decision.probe for decision in decisions)
    assert schedule(crepa_lambda=0).decide(3) == Decision(0.0, run=False, cutoff=False, probe=False)


def test_cutoff_step_is_a_cutoff_without_probes() -> None:
    crepa = schedule(
        crepa_cutoff_step=3,
        crepa_similarity_threshold=0.5,
        crepa_threshold_mode="recoverable",
        crepa_probe_interval=1,
    )
    decisions = run(crepa, [0.9] * 6)
    assert decisions[3:] == [Decision(0.0, run=False, cutoff=True, probe=False)] * 3
    assert [decision.cutoff for decision in decisions[:3]] == [False, False, True]


def test_a_metric_decides_two_steps_later() -> None:
    crepa = schedule(crepa_similarity_threshold=0.5)
    emas = []
    decisions = []
    for step in range(5, 10):
        decisions.append(crepa.decide(step))
        emas.append(crepa.ema)
        if decisions[-1].run:
            observe(crepa, step, 0.9 if step == 5 else 0.1)
    assert emas[:2] == [None, None]
    assert emas[2] == 0.9
    assert [decision.cutoff for decision in decisions] == [False, False, True, True, True]
    assert [decision.weight for decision in decisions] == [0.5, 0.5, 0.0, 0.0, 0.0]


def test_the_threshold_itself_cuts_off() -> None:
    assert run(schedule(crepa_similarity_threshold=0.5), [0.5, 0.5, 0.5])[2].cutoff
    assert not run(schedule(crepa_similarity_threshold=0.5), [math.nextafter(0.5, 0.0)] * 3)[2].cutoff


def test_average_starts_at_its_first_value_and_decays() -> None:
    crepa = schedule(crepa_similarity_threshold=1.0, crepa_similarity_ema_decay=0.75)
    run(crepa, [0.4, 0.8, 0.2, 0.0, 0.0])
    # After 0.4, 0.8, 0.2; the last two are still under way. Float64 rounding of three updates.
    assert crepa.ema == pytest.approx(0.75 * (0.75 * 0.4 + 0.25 * 0.8) + 0.25 * 0.2, abs=1e-15)


def test_permanent_cutoff_stays_and_recoverable_comes_back() -> None:
    values = [0.9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    shared: dict[str, Any] = {"crepa_similarity_threshold": 0.5, "crepa_similarity_ema_decay": 0.0}
    permanent = run(schedule(**shared), values)
    assert [decision.cutoff for decision in permanent] == [False, False] + [True] * 5
    assert not any(decision.run for decision in permanent[2:])
    # The metric of step 1 was already under way when step 2 was cut off.
    recoverable = run(schedule(**shared, crepa_threshold_mode="recoverable"), values)
    assert [decision.cutoff for decision in recoverable] == [False, False, True] + [False] * 4


def test_a_probe_comes_each_interval_and_counts_as_that_many_updates() -> None:
    crepa = schedule(
        crepa_similarity_threshold=0.5,
        crepa_similarity_ema_decay=0.9,
        crepa_threshold_mode="recoverable",
        crepa_probe_interval=4,
    )
    decisions = run(crepa, [0.8, 0.8] + [0.5] * 4 + [0.0] * 20)
    probes = [step for step, decision in enumerate(decisions) if decision.probe]
    # CREPA last runs in step 1. Probes at 5 (0.5) and 9 (0.0); what 9 measured brings it back in step 11.
    assert probes == [5, 9]
    assert all(decisions[step] == Decision(0.0, run=True, cutoff=True, probe=True) for step in probes)
    assert [step for step, decision in enumerate(decisions) if decision.cutoff] == list(range(2, 11))
    after_first = 0.9**4 * 0.8 + (1 - 0.9**4) * 0.5
    crepa = CrepaSchedule(crepa.config, 1000)
    run(crepa, [0.8, 0.8] + [0.5] * 6)
    # Float64 rounding of a few operations.
    assert crepa.ema == pytest.approx(after_first, abs=1e-15)


def test_micro_batches_are_one_update_from_sums() -> None:
    crepa = schedule(crepa_similarity_threshold=1.0)
    first = crepa.decide(0)
    for metric_sum, count in ((1.0, 4), (2.0, 4), (0.0, 0), (0.5, 2)):
        assert crepa.decide(0) is first
        crepa.observe(0, torch.tensor(metric_sum), torch.tensor(count))
    crepa.decide(1)
    crepa.decide(2)
    assert crepa.ema == 3.5 / 10


def test_a_step_without_frames_or_observations_does_not_count() -> None:
    crepa = schedule(crepa_similarity_threshold=1.0, crepa_similarity_ema_decay=0.5)
    for step, count in enumerate((0, 1, 0, None, 1, None, None)):
        crepa.decide(step)
        if count is not None:
            observe(crepa, step, 0.25 if step == 1 else 0.75, count)
    assert crepa.ema == 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_left_out_and_logged_once(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    crepa = schedule(crepa_similarity_threshold=0.9, crepa_similarity_ema_decay=0.5)
    caplog.clear()
    run(crepa, [bad, 0.2, bad, 0.6, 0.0, 0.0])
    assert crepa.ema == pytest.approx(0.4, abs=1e-15)  # one rounding
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "similarity" in caplog.text


def test_without_a_threshold_nothing_is_observed() -> None:
    crepa = schedule()
    run(crepa, [0.9] * 10)
    assert crepa.ema is None
    assert crepa.state_dict()["under_way"] == []


def test_the_threshold_is_told_once_on_the_other_scale(caplog: pytest.LogCaptureFixture) -> None:
    # Of a preset as it is shipped it is no warning.
    CrepaSchedule(CrepaConfig.preset("t2v"), 1000)
    assert not caplog.records
    caplog.set_level(logging.INFO)
    CrepaSchedule(CrepaConfig.preset("t2v"), 1000)
    assert [r.levelno for r in caplog.records if "threshold" in r.getMessage()] == [logging.INFO]
    caplog.set_level(logging.WARNING)
    caplog.clear()
    crepa = CrepaSchedule(CrepaConfig.preset("t2v", crepa_similarity_threshold=0.8500001), 1000)
    run(crepa, [0.1] * 5)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "0.85" in caplog.text
    assert "0.49 on similarity" in caplog.text
    caplog.clear()
    schedule()
    assert not caplog.records


def cut_off() -> CrepaSchedule:
    crepa = schedule(crepa_similarity_threshold=0.5)
    run(crepa, [0.9] * 3)
    return crepa


def decided() -> CrepaSchedule:
    crepa = schedule(crepa_similarity_threshold=0.5)
    crepa.decide(1)
    return crepa


ONE = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: schedule(0), ["max_train_steps", "0"]),
        (lambda: schedule(True), ["max_train_steps", "True"]),
        (lambda: schedule(1e3), ["max_train_steps", "1000.0"]),  # type: ignore[arg-type]
        (lambda: schedule().decide(-1), ["step", "-1"]),
        (lambda: schedule().decide(1.0), ["step", "1.0"]),  # type: ignore[arg-type]
        (lambda: schedule().weight(True), ["step", "True"]),
        (lambda: schedule(crepa_similarity_threshold=0.5).observe(0, ONE, ONE), ["observe(step=0)", "None"]),
        (lambda: decided().observe(0, ONE, ONE), ["observe(step=0)", "1"]),
        (lambda: cut_off().observe(2, ONE, ONE), ["step 2", "nothing"]),
        (lambda: decided().observe(1, torch.ones(2), ONE), ["(2,)", "()"]),
        (lambda: decided().observe(1, ONE, torch.ones((), device="meta")), ["meta", "cpu"]),
        (lambda: schedule().load_state_dict({"ema": None}), ["ema", "under_way"]),
    ],
)
def test_bad_input_is_named(call: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)
