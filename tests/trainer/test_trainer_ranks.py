"""Two processes under torchrun train as one: the same samples, losses and weights."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from crepa_trainer.checkpoint import FOLDER, WEIGHTS_FILE
from crepa_trainer.ranks import anywhere, limit_waits, wait_for_all
from processes import run
from safetensors.torch import load_file
from training_runs import TinyClips, metrics_rows, tiny_config, tiny_settings, train, train_elsewhere

# fp32: two ranks add the same four gradients in another order, and AdamW passes that on from step to step.
CLOSE = 1e-6
STEPS = 20


def run_both(models: Path, tmp_path: Path, crepa: dict[str, Any], **changes: Any) -> list[list[dict[str, float]]]:
    """The rows of one process that accumulates four micro-batches, and of two that accumulate two each."""
    common = {"max_train_steps": STEPS, "learning_rate": 1e-3, "lr_scheduler": "cosine", "ema_decay": 0.9, **changes}
    config = tiny_config(models, crepa_warmup_steps=1, **crepa)
    alone = train(
        tiny_settings(models, tmp_path / "one", **common, gradient_accumulation_steps=4), config, TinyClips(3, 2)
    )
    settings = tiny_settings(models, tmp_path / "two", **common, gradient_accumulation_steps=2)
    process = train_elsewhere(settings, config, processes=2, wide=3, tall=2)
    assert process.returncode == 0, process.stderr
    return [alone, metrics_rows(tmp_path / "two")]


def assert_alike(alone: list[dict[str, float]], shared: list[dict[str, float]], tmp_path: Path) -> None:
    assert [list(row) for row in alone] == [list(row) for row in shared]
    for one, two in zip(alone, shared, strict=True):
        for name in one:
            values = [row[name] for row in (one, two)]
            # Norms of hundreds of gradients: relative to their size.
            assert values[0] == pytest.approx(values[1], abs=CLOSE, rel=CLOSE, nan_ok=True), (one["step"], name)
    for part in (f"{FOLDER}/step-{STEPS:08d}/{WEIGHTS_FILE}", "trained/ema/pytorch_lora_weights.safetensors"):
        one, two = (load_file(tmp_path / run / part) for run in ("one", "two"))
        for name in one:
            torch.testing.assert_close(one[name], two[name], atol=CLOSE, rtol=0)


def test_two_processes_log_and_learn_what_one_does(models: Path, tmp_path: Path) -> None:
    alone, shared = run_both(models, tmp_path, {"crepa_cutoff_step": 10})
    assert [row["crepa_cutoff"] for row in alone] == [0.0] * 10 + [1.0] * 10
    assert_alike(alone, shared, tmp_path)


def one_is_late() -> None:
    """The others wait for it longer than a step's collectives would."""
    dist.init_process_group("gloo")
    limit_waits(timedelta(seconds=1))
    rank = dist.get_rank()
    if rank == 0:
        time.sleep(2)
    wait_for_all()
    if rank == 1:
        time.sleep(2)
    assert anywhere(rank == 1)
    assert not anywhere(False)
    if rank == 1:
        time.sleep(3)
        return
    with pytest.raises(RuntimeError, match="Timed out"):
        dist.barrier()


def test_processes_wait_for_one_that_encodes_or_writes_longer_than_in_a_step() -> None:
    done = run(one_is_late, ranks=2, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["permanent", "recoverable"])
def test_the_similarity_cuts_off_at_the_same_step_on_both(models: Path, tmp_path: Path, mode: str) -> None:
    crepa = {"crepa_similarity_ema_decay": 0.5, "crepa_threshold_mode": mode, "crepa_probe_interval": 2}
    fast = {"projector_learning_rate": 3e-2}
    free = tiny_config(models, crepa_warmup_steps=1, crepa_similarity_threshold=1.0, crepa_similarity_ema_decay=0.5)
    settings = tiny_settings(models, tmp_path / "free", max_train_steps=12, gradient_accumulation_steps=4, **fast)
    averages = [row.get("crepa_similarity_ema", 0) for row in train(settings, free, TinyClips(3, 2))]
    threshold = max(averages) * 0.9
    alone, shared = run_both(models, tmp_path, {**crepa, "crepa_similarity_threshold": threshold}, **fast)
    cut = [row["crepa_cutoff"] for row in alone]
    assert 0 < sum(cut) < STEPS
    assert_alike(alone, shared, tmp_path)


@pytest.mark.slow
def test_two_processes_go_on_from_their_checkpoint(models: Path, tmp_path: Path) -> None:
    config = tiny_config(models, crepa_similarity_threshold=0.9, crepa_warmup_steps=1)
    # One process samples while the other waits.
    validation = {"validation_prompts": ["a video"], "validation_every": 4, "validation_steps": 1}
    common = {"max_train_steps": 8, "checkpoint_every": 3, **validation}
    whole = train_elsewhere(tiny_settings(models, tmp_path / "whole", **common), config, processes=2)
    assert whole.returncode == 0, whole.stderr
    settings = tiny_settings(models, tmp_path / "killed", **common)
    killed = train_elsewhere(settings, config, processes=2, kill_at=5)
    assert killed.returncode != 0
    resumed = settings.model_copy(update={"resume": "latest"})
    process = train_elsewhere(resumed, config, processes=2)
    assert process.returncode == 0, process.stderr
    rows, expected = (metrics_rows(tmp_path / run) for run in ("killed", "whole"))
    assert rows == expected
    alone = train_elsewhere(resumed, config)
    assert "processes = 1 (checkpoint: 2)" in alone.stderr.splitlines()[-1]
    (tmp_path / "killed" / FOLDER / "step-00000008").rename(tmp_path / "step-00000008")
    # The same micro-batches a step.
    alone = train_elsewhere(resumed.model_copy(update={"gradient_accumulation_steps": 2}), config)
    assert alone.returncode == 0, alone.stderr
    for row, one in zip(expected, metrics_rows(tmp_path / "killed"), strict=True):
        assert row == pytest.approx(one, abs=CLOSE, rel=CLOSE, nan_ok=True)
