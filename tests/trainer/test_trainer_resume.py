"""A run that is killed and goes on logs what it would have logged: real processes, real SIGKILL."""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from crepa_trainer.reporting.trackers import MetricsTracker, read_metrics
from training_runs import TinyClips, tiny_config, tiny_settings, train, train_elsewhere

STEPS, CHECKPOINT, KILLED = 12, 4, 10
SCHEDULERS = ("constant", "linear", "cosine", "polynomial")
CUTOFFS = ("none", "cutoff_step", "permanent", "recoverable")


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
    averages = [row.get("crepa_similarity_ema", math.nan) for row in rows]
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
    assert len(read_metrics(tmp_path / "killed" / "metrics.jsonl")) == KILLED - 1
    rows = train(settings.model_copy(update={"resume": "latest"}), config, TinyClips(1, 0))
    # Bit for bit: the file has the shortest text that gives each float back.
    assert rows == whole
    cut = [row["crepa_cutoff"] for row in rows]
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
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "of": "a step that is done again"}) + "\n")
    rows = train(settings.model_copy(update={"resume": "latest"}), tiny_config(models))
    assert [row["step"] for row in rows] == list(range(6))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(6))


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(models: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = tiny_settings(models, tmp_path / "run", resume="latest")
    killed = train_elsewhere(settings, tiny_config(models), kill_at=3)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2  # and the third step's values under way
    time.sleep(1.1)  # TensorBoard orders its files by the second, and no process starts as fast as this one.
    rows = train(settings, tiny_config(models))
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [0, 1, 2, 3]


def logged(path: Path, steps: int, first_step: int = 0) -> MetricsTracker:
    tracker = MetricsTracker(path, first_step)
    tracker.start()
    for step in range(first_step, steps):
        tracker.log({"loss": step / 2}, step=step)
    return tracker


@pytest.mark.parametrize("torn", ['{"step": 12, "lo', '{"step": 12, "loss": 6.0}', '{"step": 3}\n', "\0\0\0\n", "12\n"])
def test_the_metrics_are_cut_back_where_a_kill_tore_their_last_line(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    logged(path, 12)
    whole = path.read_bytes()
    path.write_text(whole.decode() + torn)
    assert [row["step"] for row in read_metrics(path)] == list(range(12))
    logged(path, 12, first_step=12)
    assert path.read_bytes() == whole
    resumed = logged(path, 5, first_step=5)
    assert read_metrics(path)[-1] == {"step": 4, "loss": 2.0}
    resumed.log({"loss": 9.0, "new": 1.0}, step=5)
    assert read_metrics(path)[-2:] == [{"step": 4, "loss": 2.0}, {"step": 5, "loss": 9.0, "new": 1.0}]
    logged(path, 1)
    assert read_metrics(path) == [{"step": 0, "loss": 0.0}]


def test_logging_appends_and_rewrites_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = logged(path, 3)
    before, file = path.read_bytes(), path.stat().st_ino
    tracker.log({"loss": 1.0, "similarity": 0.5}, step=3)
    assert path.read_bytes().startswith(before)
    logged(path, 5, first_step=4)
    assert path.read_bytes().startswith(before)
    assert path.stat().st_ino == file
