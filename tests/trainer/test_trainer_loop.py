"""The training step's own parts: noise, groups, accumulation, the file of logged values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from crepa_trainer.data.sampler import ClipOrder, MicroBatches, Position
from crepa_trainer.families import TrainingFamily
from crepa_trainer.families.noise import add_noise
from crepa_trainer.reporting.trackers import MetricsTracker, log_values, read_metrics
from crepa_trainer.run import make_accelerator
from crepa_trainer.state import TrainState, make_state, parameter_groups
from crepa_trainer.step import StepReports, StepValues, check_finite, training_step
from peft import LoraConfig
from tiny import tiny_wan, wan_inputs
from training_runs import TinyClips, save_models, tiny_config, tiny_settings

from crepa_kernels import CrepaRegularizer


@pytest.fixture
def transformer() -> torch.nn.Module:
    model = tiny_wan().requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
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


def test_the_projector_has_a_group_of_its_own(transformer: torch.nn.Module) -> None:
    crepa = crepa_of(transformer)
    adapter, projector = parameter_groups(transformer, 1e-4, 1e-3)
    assert {id(p) for p in projector["params"]} == {id(p) for p in crepa.projector.parameters()}
    everything = {id(p) for p in transformer.parameters() if p.requires_grad}
    assert {id(p) for p in adapter["params"]} | {id(p) for p in projector["params"]} == everything
    assert (adapter["lr"], projector["lr"]) == (1e-4, 1e-3)


def test_without_crepa_there_is_one_group(transformer: torch.nn.Module) -> None:
    assert [group["lr"] for group in parameter_groups(transformer, 1e-4, 1e-3)] == [1e-4]


def state_of(transformer: torch.nn.Module) -> TrainState:
    """A state without CREPA that nothing was prepared for."""
    optimizer = torch.optim.SGD([p for p in transformer.parameters() if p.requires_grad])
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    return TrainState(Accelerator(cpu=True), transformer, None, optimizer, scheduler)


def test_micro_batches_of_one_step_are_one_step(tmp_path: Path) -> None:
    models = save_models(tmp_path)
    settings = tiny_settings(models, tmp_path / "run", gradient_accumulation_steps=2, lr_scheduler="linear")
    # A warm-up of 10 steps to 0.5 tells which step CREPA was told; counting micro-batches would give 0.05 after one.
    config = tiny_config(models, crepa_warmup_steps=10)
    family = TrainingFamily.of(settings.model)
    state = make_state(make_accelerator(settings), family, settings, config)
    clips: Any = TinyClips(1, 0)
    order = ClipOrder([key.bucket for key in clips.keys], batch_size=1, accumulation=2)
    batches = MicroBatches(clips, order, family.noise_level)
    weights = dict(state.transformer.named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}

    def logs_at(step: int, micro: int, **options: bool) -> dict[str, Any]:
        position = Position(step, micro, 0)
        return training_step(state, family, batches[position, True], position, **options)

    def changed() -> set[str]:
        return {name for name, weight in weights.items() if not torch.equal(weight, before[name])}

    first = logs_at(0, 0)
    assert changed() == set()
    assert not {"grad_norm", "learning_rate"} & first.keys()
    second = logs_at(0, 1)
    trained = {name for name, weight in weights.items() if weight.requires_grad}
    assert {name for name in trained if "lora_B" in name} <= changed() <= trained
    assert second["learning_rate"] == 1e-2
    torch.testing.assert_close(first["loss"], first["flow_loss"])  # the warm-up's first weight is 0
    steps = [logs_at(1, 0), logs_at(1, 1, look=True)]
    assert [logs["crepa_weight"] for logs in (first, second, *steps)] == pytest.approx([0, 0, 0.05, 0.05])
    assert steps[1]["learning_rate"] == pytest.approx(0.75e-2)
    torch.testing.assert_close(steps[0]["loss"], steps[0]["flow_loss"] + steps[0]["crepa_loss"])
    # Of the first clip; its diagonal is what CREPA calls the similarity of each frame with its own.
    matrix = steps[1]["look"].matrix
    torch.testing.assert_close(matrix.diagonal().mean(), steps[1]["crepa_similarity_self"])
    assert changed() == trained
    assert not any(isinstance(value, torch.Tensor) and value.requires_grad for value in steps[1].values())


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
    crepa = crepa_of(transformer)
    if message is None:
        check_finite(crepa, 3, values, skipped=skipped)
    else:
        with pytest.raises(FloatingPointError, match=message):
            check_finite(crepa, 3, values, skipped=skipped)


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_what_a_teacher_makes_is_not_blamed_on_the_learning_rate(side: str) -> None:
    transformer = tiny_wan(num_layers=1)
    crepa = CrepaRegularizer({"crepa_enabled": True, "crepa_block_index": 0}, transformer, feature_size=8)
    inputs, features = wan_inputs(), torch.randn(1, 3, 6, 8)
    (features if side == "teacher" else inputs["hidden_states"])[0, 0, 0, 0] = float("nan")
    transformer(**inputs)
    loss, _ = crepa.loss(step=0, features=features)
    cure = "it came from the teacher's features" if side == "teacher" else "lower the learning rate"
    with pytest.raises(FloatingPointError, match=f"^step 0: the loss is nan; {cure}"):
        check_finite(crepa, 0, {"loss": float(loss.detach())})


def values_of(*losses: float) -> StepValues:
    values = StepValues()
    for loss in losses:
        values.add({"loss": torch.tensor(loss), "rate": loss, "crepa_similarity_ema": torch.tensor(float("nan"))})
    return values


class Reported:
    """What was reported, of a state that is there."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.state = state_of(transformer)
        self.late = StepReports(self.state, lambda *row: self.rows.append(row))

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
    reported.state.accelerator._optimizers.append(optimizer)
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


def test_values_that_cannot_be_written_are_said_with_their_step(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, log_with=[MetricsTracker(tmp_path / "metrics.jsonl")])
    accelerator.init_trackers("run")
    log_values(accelerator, {"loss": 1.5}, 0)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"^the values of step 1 could not be logged: .*No space left on device"):
        log_values(accelerator, {"loss": 1.25}, 1)


def test_each_line_has_the_values_of_its_step_as_json(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    tracker = MetricsTracker(path)
    tracker.start()
    assert read_metrics(path) == []
    tracker.log({"loss": 1.5}, step=0)
    tracker.log({"loss": 1.25, "similarity": 0.1 + 0.2}, step=1)
    tracker.log({"similarity": 0.75, "grad_norm": math.inf}, step=2)
    rows = read_metrics(path)
    assert rows[:2] == [{"step": 0, "loss": 1.5}, {"step": 1, "loss": 1.25, "similarity": 0.1 + 0.2}]
    assert math.isnan(rows[2].pop("grad_norm"))
    assert rows[2] == {"step": 2, "similarity": 0.75}
    # What JSON has no number for would be refused by other readers.
    assert path.read_text().splitlines()[2] == '{"step": 2, "similarity": 0.75, "grad_norm": null}'
