"""Two and three processes that have a share of the model each train as one does that has it whole."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crepa_trainer.checkpoint import FOLDER, newest_checkpoint, read_checkpoint
from crepa_trainer.cli import main
from crepa_trainer.export import EXPORTED
from PIL import Image
from processes import environment, run
from safetensors.torch import load_file
from sharded_families import gradients_alone, sharded_gradients
from tiny_families import FAMILIES
from training_runs import TinyClips, command, metrics_rows, tiny_config, tiny_settings, train, train_elsewhere
from videos import captioned_squares

# fp32, summed up in another order.
CLOSE = 1e-5
SHARDED = {"sharding": "fsdp2"}
LORA = "pytorch_lora_weights.safetensors"
FULL = "transformer/diffusion_pytorch_model.safetensors"


def run_alone(models: Path, output: Path, crepa: dict[str, Any], **changes: Any) -> list[dict[str, float]]:
    return train(tiny_settings(models, output, **changes), tiny_config(models, **crepa), TinyClips(3, 2))


def run_sharded(
    models: Path, output: Path, crepa: dict[str, Any], processes: int, **changes: Any
) -> list[dict[str, float]]:
    """The rows of a run that has asserted, in each process, that its weights are shares."""
    settings = tiny_settings(models, output, **SHARDED, **changes)
    done = train_elsewhere(settings, tiny_config(models, **crepa), processes=processes, wide=3, tall=2)
    assert done.returncode == 0, done.stderr
    return metrics_rows(output)


def assert_rows_alike(alone: list[dict[str, float]], shared: list[dict[str, float]]) -> None:
    for one, other in zip(alone, shared, strict=True):
        assert one == pytest.approx(other, abs=CLOSE, rel=CLOSE, nan_ok=True)


def assert_weights_alike(one: Path, other: Path) -> None:
    weights, others = load_file(one), load_file(other)
    assert weights.keys() == others.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], others[name], atol=CLOSE, rtol=0)


def test_two_processes_that_share_a_model_learn_what_one_does(models: Path, tmp_path: Path) -> None:
    crepa = {"crepa_warmup_steps": 1, "crepa_cutoff_step": 2}
    common = {"max_train_steps": 4, "learning_rate": 1e-3, "ema_decay": 0.9, "checkpoint_every": 3}
    alone = run_alone(models, tmp_path / "one", crepa, **common, gradient_accumulation_steps=4)
    shared = run_sharded(models, tmp_path / "two", crepa, 2, **common, gradient_accumulation_steps=2)
    assert [row["crepa_cutoff"] for row in shared] == [0.0] * 2 + [1.0] * 2
    assert_rows_alike(alone, shared)
    for part in (f"trained/{LORA}", f"trained/ema/{LORA}", "trained/crepa_projector.safetensors"):
        assert_weights_alike(tmp_path / "one" / part, tmp_path / "two" / part)
    # From the shares that each of them wrote.
    assert main(["export", str(tmp_path / "two")]) == 0
    exported = tmp_path / "two" / EXPORTED / "step-00000004" / LORA
    assert_weights_alike(tmp_path / "two" / "trained" / LORA, exported)


@pytest.mark.slow
@pytest.mark.parametrize("training", ["lora", "full"])
def test_a_run_goes_on_with_another_number_of_processes(models: Path, tmp_path: Path, training: str) -> None:
    """One, two and three processes; then each of them goes on from the middle of the run of three."""
    fast = {"learning_rate": 1e-3, "projector_learning_rate": 3e-2}
    crepa = {"crepa_warmup_steps": 1, "crepa_similarity_ema_decay": 0.5}
    free = {**crepa, "crepa_similarity_threshold": 1.0}
    measured = run_alone(models, tmp_path / "free", free, max_train_steps=14, gradient_accumulation_steps=6, **fast)
    crepa["crepa_similarity_threshold"] = max(row.get("crepa_similarity_ema", 0) for row in measured) * 0.9
    common = {"max_train_steps": 20, "lr_scheduler": "cosine", "ema_decay": 0.9, "checkpoint_every": 10}
    common |= {"training": training, **fast}

    alone = run_alone(models, tmp_path / "1", crepa, **common, gradient_accumulation_steps=6)
    assert 0 < sum(row["crepa_cutoff"] for row in alone) < 20
    for processes in (2, 3):
        output = tmp_path / str(processes)
        steps = 6 // processes
        shared = run_sharded(models, output, crepa, processes, **common, gradient_accumulation_steps=steps)
        assert_rows_alike(alone, shared)
    for processes in (1, 2, 3):
        output = tmp_path / f"3 to {processes}"
        shutil.copytree(tmp_path / "3", output)
        shutil.rmtree(output / FOLDER / "step-00000020")
        shutil.rmtree(output / "trained")
        resumed = {**common, "resume": "latest", "gradient_accumulation_steps": 6 // processes}
        assert_rows_alike(alone, run_sharded(models, output, crepa, processes, **resumed))
    part = LORA if training == "lora" else FULL
    for output in ("2", "3", "3 to 1", "3 to 2", "3 to 3"):
        for exported in (part, f"ema/{part}", "crepa_projector.safetensors"):
            assert_weights_alike(tmp_path / "1" / "trained" / exported, tmp_path / output / "trained" / exported)
    assert main(["export", str(tmp_path / "3")]) == 0
    assert_weights_alike(tmp_path / "1" / "trained" / part, tmp_path / "3" / EXPORTED / "step-00000020" / part)

    refused = tiny_settings(models, tmp_path / "3", **SHARDED, **common, resume="latest")
    done = train_elsewhere(refused, tiny_config(models, **crepa), processes=2, wide=3, tall=2)
    assert "gradient_accumulation_steps = 1 (checkpoint: 2); processes = 2 (checkpoint: 3)" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16"},
        {"mixed_precision": "bf16", "training": "full"},
        {"compile_blocks": True, "gradient_checkpointing": False},
        {"layersync_enabled": True, "layersync_student_block": 0, "layersync_teacher_block": 2},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_what_a_sharded_run_may_have(models: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    common = {"max_train_steps": 3, "learning_rate": 1e-3, **changes}
    alone = run_alone(models, tmp_path / "one", {}, **common, gradient_accumulation_steps=2)
    shared = run_sharded(models, tmp_path / "two", {}, 2, **common)
    close = CLOSE if "mixed_precision" not in changes else 2e-3  # what rounds the other way in bf16
    for one, two in zip(alone, shared, strict=True):
        assert one == pytest.approx(two, abs=close, rel=close)


@pytest.mark.slow
def test_the_gradients_of_every_family(tmp_path: Path) -> None:
    """A block of each kind at work in two processes, each with a sample of its own."""
    done = run(sharded_gradients, str(tmp_path), ranks=2)
    assert done.returncode == 0, done.stderr
    for case in FAMILIES:
        found, expected = torch.load(tmp_path / f"{case}.pt"), gradients_alone(case)
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5, msg=f"{case}: {name}")


@pytest.mark.slow
@pytest.mark.parametrize("irepa", [False, True])
def test_looks_and_samples_of_a_sharded_run(models: Path, tmp_path: Path, irepa: bool) -> None:
    common = {"max_train_steps": 2, "matrix_every": 1, "validation_every": 2, "ema_decay": 0.9}
    common |= {"validation_prompts": ["a video"], "validation_steps": 2}
    crepa = {"irepa_enabled": irepa}
    alone = run_alone(models, tmp_path / "one", crepa, **common, gradient_accumulation_steps=2)
    assert_rows_alike(alone, run_sharded(models, tmp_path / "two", crepa, 2, **common))
    looks = [json.loads((tmp_path / run / "looks/step-00000001.json").read_text()) for run in ("one", "two")]
    torch.testing.assert_close(*(torch.tensor(look["matrix"]) for look in looks), atol=CLOSE, rtol=0)
    strips = []
    for name in ("one", "two"):
        with Image.open(tmp_path / name / "validation/step-00000002/prompt-0.png") as strip:
            strips.append(np.array(strip, dtype=int))
    # Of weights that are only alike a color may be rounded the other way.
    np.testing.assert_allclose(*strips, atol=1, rtol=0)


@pytest.mark.slow
def test_a_process_that_is_killed_ends_all_and_the_run_goes_on(models: Path, tmp_path: Path) -> None:
    config = tiny_config(models, crepa_similarity_threshold=0.9, crepa_warmup_steps=1)
    common = {"max_train_steps": 6, "checkpoint_every": 2, **SHARDED}
    whole = train_elsewhere(tiny_settings(models, tmp_path / "whole", **common), config, processes=2)
    assert whole.returncode == 0, whole.stderr
    settings = tiny_settings(models, tmp_path / "killed", **common)
    began = time.monotonic()
    killed = torchrun(command(settings, config, processes=2, kill_at=5, kill_rank=1))
    assert killed.returncode != 0
    assert time.monotonic() - began < 120
    assert "Signal 9 (SIGKILL) received" in killed.stderr
    newest = newest_checkpoint(settings.output)
    assert newest is not None
    assert read_checkpoint(newest).step == 4
    done = train_elsewhere(settings.model_copy(update={"resume": "latest"}), config, processes=2)
    assert done.returncode == 0, done.stderr
    assert metrics_rows(tmp_path / "killed") == metrics_rows(tmp_path / "whole")


@pytest.mark.slow
def test_a_process_that_hangs_ends_all_after_the_time_limit(models: Path, tmp_path: Path) -> None:
    settings = tiny_settings(models, tmp_path / "run", max_train_steps=6, checkpoint_every=2, step_timeout=5, **SHARDED)
    clips = {"kill_at": 5, "kill_rank": 1, "kill_by": int(signal.SIGSTOP)}
    began = time.monotonic()
    hung = torchrun(command(settings, tiny_config(models), processes=2, **clips))
    assert hung.returncode != 0
    assert time.monotonic() - began < 200  # torchrun waits half a minute before it kills what does not end
    assert re.search("RuntimeError: .*(Timed out|Application timeout)", hung.stderr)  # as gloo says it of its kinds
    newest = newest_checkpoint(settings.output)
    assert newest is not None
    assert read_checkpoint(newest).step == 4


# The command itself, in which one process meets an error that nobody expected.
FAILING = """\
import os, runpy
from crepa_trainer.data.cache import CachedClips

def fail(self, index):
    raise RuntimeError("nobody expected this")

if os.environ["RANK"] == "1":
    CachedClips.__getitem__ = fail
runpy.run_module("crepa_trainer", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_the_first_error_is_what_torchrun_ends_with(models: Path, tmp_path: Path) -> None:
    captioned_squares(tmp_path / "videos", 2)
    script, output = tmp_path / "failing.py", tmp_path / "run"
    script.write_text(FAILING)
    given = {"model": models / "wan", "data": tmp_path / "videos", "output": output, "sharding": "fsdp2"}
    given |= {"resolutions": "[[32, 48]]", "frame_counts": "[5]", "lora_rank": 2, "max_train_steps": 4}
    words = [str(word) for key, value in given.items() for word in (f"--{key}", value)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = torchrun([*launch, str(script), "run", *words])
    assert done.returncode != 0
    summary = done.stderr[done.stderr.index("Root Cause") :]
    assert "rank      : 1" in summary
    assert "RuntimeError: nobody expected this" in summary


def torchrun(words: list[str]) -> subprocess.CompletedProcess[str]:
    given = {**environment(), "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=given)
