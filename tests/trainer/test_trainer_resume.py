"""A run that is killed and goes on logs what it would have logged: real processes, real SIGKILL."""

from __future__ import annotations

import csv
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from crepa_trainer.reporting.trackers import CSVTracker, read_csv
from training_runs import TinyClips, save_models, tiny_config, tiny_settings, train, train_elsewhere

STEPS, CHECKPOINT, KILLED = 12, 4, 10
SCHEDULERS = ("constant", "linear", "cosine", "polynomial")
CUTOFFS = ("none", "cutoff_step", "permanent", "recoverable")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


def settings_of(scheduler: str) -> dict[str, Any]:
    """Warm-up, decay of the learning rate, accumulation and an average: everything that has a state."""
    return {
        "max_train_steps": STEPS,
        "gradient_accumulation_steps": 2,
        "lr_scheduler": {"constant": "constant_with_warmup"}.get(scheduler, scheduler),
        "lr_warmup_steps": 2,
        "projector_learning_rate": 1e-1,
        "ema_decay": 0.8,
        "checkpoint_every": CHECKPOINT,
    }


def config_of(models: Path, scheduler: str, cutoff: str, tmp_path: Path) -> dict[str, Any]:
    """CREPA with the cutoff between the checkpoint at step 4 or 8 and the kill at step 10."""
    config: dict[str, Any] = {"crepa_scheduler": scheduler, "crepa_lambda_end": 0.05, "crepa_warmup_steps": 1}
    if cutoff == "cutoff_step":
        return config | {"crepa_cutoff_step": 9}
    if cutoff == "none":
        return config
    decay = {"crepa_similarity_ema_decay": 0.5}
    # The average over a run without cutoff says which threshold it passes in step 7, to count from step 9 on.
    free = tiny_config(models, **config, **decay, crepa_similarity_threshold=1.0)
    rows = train(tiny_settings(models, tmp_path / "free", **settings_of(scheduler)), free, TinyClips(1, 0))
    averages = [float(row["crepa_similarity_ema"] or "nan") for row in rows]
    # What is logged at step s is the average up to step s - 2.
    assert max(averages[3:9]) < averages[9], "the threshold would be passed earlier"
    threshold = (averages[8] + averages[9]) / 2
    mode = {"crepa_similarity_threshold": threshold, "crepa_threshold_mode": cutoff, "crepa_probe_interval": 1}
    return config | decay | mode


def kill_and_go_on(models: Path, tmp_path: Path, scheduler: str, cutoff: str, kept: int = CHECKPOINT) -> None:
    config = tiny_config(models, **config_of(models, scheduler, cutoff, tmp_path))
    given = settings_of(scheduler) | {"checkpoint_every": kept}
    whole = train(tiny_settings(models, tmp_path / "whole", **given), config, TinyClips(1, 0))
    settings = tiny_settings(models, tmp_path / "killed", **given)
    killed = train_elsewhere(settings, config, wide=1, tall=0, kill_at=2 * KILLED + 1)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # The values of its last step were still under way.
    assert len(read_csv(tmp_path / "killed" / "metrics.csv")) == KILLED - 1
    rows = train(settings.model_copy(update={"resume": "latest"}), config, TinyClips(1, 0))
    # Bit for bit: the CSV has the shortest text that gives each float back.
    assert rows == whole
    cut = [float(row["crepa_cutoff"]) for row in rows]
    assert cut[:9] == [0.0] * 9
    assert cut[9] == (cutoff != "none")
    for part in ("trained", "trained/ema"):
        name = f"{part}/pytorch_lora_weights.safetensors"
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(("scheduler", "cutoff"), [("cosine", "permanent")])
def test_a_killed_run_goes_on_as_if_it_had_not_stopped(
    models: Path, tmp_path: Path, scheduler: str, cutoff: str
) -> None:
    kill_and_go_on(models, tmp_path, scheduler, cutoff)


@pytest.mark.slow
@pytest.mark.parametrize("cutoff", CUTOFFS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kept", [4, 7], ids=["one-step-of-lag", "metrics-under-way"])
def test_every_scheduler_and_cutoff_goes_on_the_same(
    models: Path, tmp_path: Path, scheduler: str, cutoff: str, kept: int
) -> None:
    kill_and_go_on(models, tmp_path, scheduler, cutoff, kept)


def test_tensorboard_shows_each_step_once_after_a_resume(models: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = tiny_settings(models, tmp_path / "run", max_train_steps=6, checkpoint_every=3)
    train(settings.model_copy(update={"max_train_steps": 3}), tiny_config(models))
    with (tmp_path / "run" / "metrics.csv").open("a", newline="") as file:
        csv.writer(file).writerow(["3", "of a step that is done again"])
    rows = train(settings.model_copy(update={"resume": "latest"}), tiny_config(models))
    assert [row["step"] for row in rows] == [str(step) for step in range(6)]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(6))


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(models: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = tiny_settings(models, tmp_path / "run", resume="latest")
    killed = train_elsewhere(settings, tiny_config(models), kill_at=3)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(read_csv(tmp_path / "run" / "metrics.csv")) == 2  # and the third step's values under way
    time.sleep(1.1)  # TensorBoard orders its files by the second, and no process starts as fast as this one.
    rows = train(settings, tiny_config(models))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [0, 1, 2, 3]


def test_the_csv_is_cut_back_where_a_kill_tore_its_last_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    tracker = CSVTracker(path)
    tracker.start()
    for step in range(12):
        tracker.log({"loss": step / 2}, step=step)
    path.write_text(path.read_text() + "1")  # of "12,6.0"
    resumed = CSVTracker(path, first_step=12)
    resumed.start()
    assert [row["step"] for row in read_csv(path)] == [str(step) for step in range(12)]
    CSVTracker(path, first_step=5).start()
    assert read_csv(path)[-1] == {"step": "4", "loss": "2.0"}
    resumed.log({"loss": 9.0, "new": 1.0}, step=5)
    assert read_csv(path)[-1] == {"step": "5", "loss": "9.0", "new": "1.0"}
