"""The training loop's own parts: noise, groups, accumulation, the CSV of logged values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from crepa_trainer.loop import (
    StepReports,
    StepValues,
    Student,
    add_noise,
    check_finite,
    draw_noise,
    parameter_groups,
    train,
)
from crepa_trainer.models import add_lora
from crepa_trainer.reporting.trackers import CSVTracker, read_csv
from tiny import CHANNELS, TEXT_DIM, tiny_wan, wan_inputs
from torch.utils.data import DataLoader, TensorDataset

from crepa_kernels import CrepaRegularizer


@pytest.fixture
def transformer() -> torch.nn.Module:
    model = tiny_wan().requires_grad_(False)
    add_lora(model, rank=2)
    return model


def crepa_of(transformer: torch.nn.Module) -> CrepaRegularizer:
    settings = {
        "crepa_enabled": True,
        "crepa_block_index": 0,
        "crepa_feature_source": "backbone",
        "crepa_teacher_block_index": 1,
        "crepa_warmup_steps": 10,
    }
    return CrepaRegularizer(settings, transformer)


def test_noise_is_a_straight_line_from_video_to_noise() -> None:
    latents, noise = torch.randn(2, 4, 3, 4, 6), torch.randn(2, 4, 3, 4, 6)
    noisy = add_noise(latents, noise, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(noisy.latents[0], latents[0])
    torch.testing.assert_close(noisy.latents[1], noise[1])
    assert noisy.timestep.tolist() == [0.0, 1000.0]
    half = add_noise(latents, noise, torch.tensor([0.5, 0.5]))
    # Following the target velocity back for t = 0.5 gives the clean video.
    torch.testing.assert_close(half.latents - 0.5 * half.target, latents)


def test_noise_is_drawn_anew_and_repeatably() -> None:
    latents = torch.zeros(1, 4, 3, 4, 6)
    first, second = (draw_noise(latents, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert 0 < float(first.timestep) < 1000
    assert float(first.timestep) != float(second.timestep)
    torch.testing.assert_close(first.target, draw_noise(latents, torch.Generator().manual_seed(0)).target)


def test_the_projector_has_a_group_of_its_own(transformer: torch.nn.Module) -> None:
    crepa = crepa_of(transformer)
    adapter, projector = parameter_groups(transformer, 1e-4, 1e-3)
    assert {id(p) for p in projector["params"]} == {id(p) for p in crepa.projector.parameters()}
    everything = {id(p) for p in transformer.parameters() if p.requires_grad}
    assert {id(p) for p in adapter["params"]} | {id(p) for p in projector["params"]} == everything
    assert (adapter["lr"], projector["lr"]) == (1e-4, 1e-3)


def test_without_crepa_there_is_one_group(transformer: torch.nn.Module) -> None:
    assert [group["lr"] for group in parameter_groups(transformer, 1e-4, 1e-3)] == [1e-4]


def test_micro_batches_of_one_step_share_its_number(transformer: torch.nn.Module, tmp_path: Path) -> None:
    tracker = CSVTracker(tmp_path / "metrics.csv")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, log_with=[tracker])
    accelerator.init_trackers("test")
    crepa = crepa_of(transformer)
    optimizer = torch.optim.AdamW(parameter_groups(transformer, 1e-3, 1e-3))
    latents, pixels = torch.randn(8, CHANNELS, 2, 4, 4), torch.zeros(8, 5, 3, 32, 32, dtype=torch.uint8)
    loader = DataLoader(TensorDataset(latents, pixels))
    model, optimizer, loader = accelerator.prepare(transformer, optimizer, loader)
    steps: list[int] = []
    train(
        accelerator,
        Student(model, crepa, optimizer),
        loader,
        torch.randn(1, 3, TEXT_DIM),
        steps=3,
        generator=torch.Generator().manual_seed(0),
        on_step=lambda step, values: steps.append(step),
    )
    assert steps == [0, 1, 2]
    rows = read_csv(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    # A warm-up of 10 steps to 0.5 tells which step CREPA was told; counting micro-batches would give 0.05, 0.15, 0.25.
    assert [float(row["crepa_weight"]) for row in rows] == pytest.approx([0.0, 0.05, 0.1])


@pytest.mark.parametrize(
    ("values", "skipped", "message"),
    [
        ({"loss": 1.0, "grad_norm": 2.0}, False, None),
        ({"loss": 1.0}, False, None),
        ({"loss": 1.0, "grad_norm": float("inf")}, True, None),
        ({"loss": 1.0, "grad_norm": float("nan")}, False, "step 3: the grad_norm is nan"),
        ({"loss": float("nan"), "grad_norm": float("inf")}, False, "step 3: the loss is nan and grad_norm is inf"),
        ({"loss": float("inf"), "grad_norm": float("inf")}, True, "step 3: the loss is inf; lower the learning rate"),
    ],
)
def test_what_is_not_finite_is_named_before_it_is_in_a_checkpoint(
    transformer: torch.nn.Module, values: dict[str, float], skipped: bool, message: str | None
) -> None:
    student = Student(transformer, None, torch.optim.SGD(transformer.parameters()))
    if message is None:
        check_finite(student, 3, values, skipped=skipped)
    else:
        with pytest.raises(FloatingPointError, match=message):
            check_finite(student, 3, values, skipped=skipped)


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_what_a_teacher_makes_is_not_blamed_on_the_learning_rate(side: str) -> None:
    transformer = tiny_wan(num_layers=1)
    crepa = CrepaRegularizer({"crepa_enabled": True, "crepa_block_index": 0}, transformer, feature_size=8)
    student = Student(transformer, crepa, torch.optim.SGD(transformer.parameters()))
    inputs, features = wan_inputs(), torch.randn(1, 3, 6, 8)
    (features if side == "teacher" else inputs["hidden_states"])[0, 0, 0, 0] = float("nan")
    transformer(**inputs)
    loss, _ = crepa.loss(step=0, features=features)
    cure = "it came from the teacher's features" if side == "teacher" else "lower the learning rate"
    with pytest.raises(FloatingPointError, match=f"^step 0: the loss is nan; {cure}"):
        check_finite(student, 0, {"loss": float(loss.detach())})


def values_of(*losses: float) -> StepValues:
    values = StepValues()
    for loss in losses:
        values.add({"loss": torch.tensor(loss), "rate": loss, "crepa_similarity_ema": torch.tensor(float("nan"))})
    return values


class Reported:
    """What was reported, through an accelerator and a student that are there."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        student = Student(transformer, None, torch.optim.SGD(transformer.parameters()))
        self.late = StepReports(Accelerator(cpu=True), student, lambda *row: self.rows.append(row))

    def of(self, *losses: float, flush: bool = False, error: BaseException | None = None) -> None:
        """Steps with these losses, numbered from 0, and what comes then."""
        with self.late as late:
            for step, loss in enumerate(losses):
                late.send(step, values_of(loss))
            if flush:
                late.flush()
            if error is not None:
                raise error


def test_values_are_reported_a_step_late_and_all_of_them_at_the_end(transformer: torch.nn.Module) -> None:
    reported = Reported(transformer)
    seen = []
    with reported.late as late:
        for step in range(4):
            late.send(step, values_of(step, step + 1))
            seen.append(len(reported.rows))
            if step == 2:
                late.flush()  # as before a checkpoint
                seen.append(len(reported.rows))
    assert seen == [0, 1, 2, 3, 3]
    assert reported.rows == [(step, {"loss": step + 0.5, "rate": step + 1.0}) for step in range(4)]


@pytest.mark.parametrize(("after", "flush"), [(0, False), (1, False), (0, True)], ids=["end", "next step", "flush"])
def test_what_is_not_finite_ends_the_reports_at_its_own_step(
    transformer: torch.nn.Module, after: int, flush: bool
) -> None:
    reported = Reported(transformer)
    with pytest.raises(FloatingPointError, match=r"^step 1: the loss is nan"):
        reported.of(0.0, *[float("nan")] * (1 + after), flush=flush)
    assert [step for step, _ in reported.rows] == [0]


def test_whether_a_scaler_left_a_step_out_is_of_that_step(transformer: torch.nn.Module) -> None:
    reported = Reported(transformer)
    optimizer = Accelerator(cpu=True).prepare(torch.optim.SGD(transformer.parameters()))
    reported.late._accelerator._optimizers.append(optimizer)
    overflowed = StepValues()
    overflowed.add({"loss": torch.tensor(1.0), "grad_norm": torch.tensor(float("inf"))})
    with reported.late as late:
        optimizer._is_overflow = True
        late.send(0, overflowed)
        optimizer._is_overflow = False
        late.send(1, values_of(1.0))
    assert [step for step, _ in reported.rows] == [0, 1]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
def test_a_run_that_ends_early_still_reports_the_step_before(
    transformer: torch.nn.Module, error: BaseException
) -> None:
    reported = Reported(transformer)
    with pytest.raises(type(error)):
        reported.of(1.0, 1.0, error=error)
    assert [step for step, _ in reported.rows] == [0, 1]


def test_a_value_first_logged_later_gets_a_column(tmp_path: Path) -> None:
    tracker = CSVTracker(tmp_path / "new" / "metrics.csv")
    tracker.start()
    tracker.log({"loss": 1.5}, step=0)
    tracker.log({"loss": 1.25, "similarity": 0.5}, step=1)
    tracker.log({"similarity": 0.75}, step=2)
    assert read_csv(tmp_path / "new" / "metrics.csv") == [
        {"step": "0", "loss": "1.5", "similarity": ""},
        {"step": "1", "loss": "1.25", "similarity": "0.5"},
        {"step": "2", "loss": "", "similarity": "0.75"},
    ]
