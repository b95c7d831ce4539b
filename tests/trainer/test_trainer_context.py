"""Processes that share out a clip's tokens train as one process that has them all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from crepa_trainer.checkpoint import newest_checkpoint, read_checkpoint
from crepa_trainer.context import check_context
from crepa_trainer.data.dataset import Bucket
from crepa_trainer.families import TrainingFamily
from crepa_trainer.launcher import check_launcher
from processes import environment, run
from safetensors.torch import load_file
from sharded_families import SHARING, context_gradients, gradients_alone
from tiny import tiny_dinov2
from tiny_pipelines import save_tiny_ltx_pipeline, save_tiny_sana_pipeline
from training_runs import TinyClips, metrics_rows, tiny_config, tiny_settings, train, train_elsewhere
from videos import captioned_squares

# fp32 sums in another order, which AdamW passes on from step to step.
CLOSE = 1e-6
CREPA: dict[str, Any] = {
    "crepa_warmup_steps": 1,
    "crepa_cutoff_step": 4,
    "crepa_similarity_threshold": 0.99,
    "crepa_relational_weight": 0.5,
}
SYNC = {"layersync_enabled": True, "layersync_student_block": 0, "layersync_teacher_block": 2}
SAMPLES = {"validation_prompts": ["a video"], "validation_every": 3, "validation_steps": 1}


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_that_share_clips_log_and_learn_what_one_does(models: Path, tmp_path: Path, processes: int) -> None:
    common = {"max_train_steps": 5, "learning_rate": 1e-3, "matrix_every": 2, **SYNC, **SAMPLES}
    config = tiny_config(models, **CREPA)
    alone = tiny_settings(models, tmp_path / "one", **common, gradient_accumulation_steps=2)
    rows = train(alone, config, TinyClips(3, 2))
    shared = tiny_settings(
        models, tmp_path / "shared", **common, context_parallel=2, gradient_accumulation_steps=4 // processes
    )
    done = train_elsewhere(shared, config, processes=processes, wide=3, tall=2, accelerators=1)
    assert done.returncode == 0, done.stderr[-4000:]
    found = metrics_rows(tmp_path / "shared")
    assert [row["crepa_cutoff"] for row in rows] == [0.0] * 4 + [1.0]
    assert [row.keys() for row in found] == [row.keys() for row in rows]
    for one, several in zip(rows, found, strict=True):
        for name, value in one.items():
            # What the first process has seen is of its own clips alone.
            if processes == 2 or name != "crepa_constant":
                assert several[name] == pytest.approx(value, abs=CLOSE, rel=CLOSE, nan_ok=True), (one["step"], name)
    one, several = (load_file(tmp_path / run / "trained/pytorch_lora_weights.safetensors") for run in ("one", "shared"))
    for name, weight in one.items():
        torch.testing.assert_close(several[name], weight, rtol=0, atol=CLOSE)
    assert (tmp_path / "shared/validation/step-00000003").is_dir()


# The command itself, where diffusers' context parallelism finds an accelerator to count.
COUNTED = """\
import runpy, torch

torch.accelerator.device_count = lambda: 1
runpy.run_module("crepa_trainer", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_ltx_trains_and_samples_with_its_tokens_shared_out(tmp_path: Path) -> None:
    save_tiny_ltx_pipeline(tmp_path / "ltx")
    captioned_squares(tmp_path / "videos", 2)
    tiny_dinov2(tmp_path / "dinov2")
    script = tmp_path / "counted.py"
    script.write_text(COUNTED)
    given = {"model": tmp_path / "ltx", "data": tmp_path / "videos", "cache": tmp_path / "cache", "lora_rank": 2}
    given |= {"resolutions": "[[64, 96]]", "frame_counts": "[9]", "max_train_steps": 4, "mixed_precision": "no"}
    given |= {"validation_prompts": '["a square"]', "validation_every": 4, "validation_steps": 2, "task": "image2video"}
    given |= {"crepa_enabled": "true", "crepa_block_index": 1, "crepa_encoder": tmp_path / "dinov2"}
    given |= {"crepa_encoder_image_size": 28, "learning_rate": 1e-3}
    rows = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        each = {**given, "output": output, "context_parallel": processes}
        words = [str(word) for key, value in each.items() for word in (f"--{key}", value)]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] * (processes - 1)
        environ = {**environment(), "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(
            [sys.executable, *launch, str(script), "run", *words], capture_output=True, text=True, env=environ
        )
        assert done.returncode == 0, done.stderr[-4000:]
        rows.append(metrics_rows(output))
        assert (output / "validation/step-00000004").is_dir()
    for one, several in zip(*rows, strict=True):
        assert several == pytest.approx(one, abs=CLOSE, rel=CLOSE, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_a_killed_run_that_shares_tokens_goes_on_as_if_it_had_not_stopped(
    models: Path, tmp_path: Path, compiled: bool
) -> None:
    crepa = {"crepa_similarity_threshold": 0.9, "crepa_warmup_steps": 1, "crepa_relational_weight": 0.5}
    config = tiny_config(models, **crepa)
    given: dict[str, Any] = {"max_train_steps": 6, "checkpoint_every": 2, "context_parallel": 2, "ema_decay": 0.9}
    given |= {"compile_blocks": compiled, "gradient_checkpointing": not compiled}
    clips: dict[str, Any] = {"processes": 2, "wide": 3, "tall": 2, "accelerators": 1}
    whole = train_elsewhere(tiny_settings(models, tmp_path / "whole", **given), config, **clips)
    assert whole.returncode == 0, whole.stderr[-4000:]
    settings = tiny_settings(models, tmp_path / "killed", **given)
    killed = train_elsewhere(settings, config, **clips, kill_at=5, kill_rank=1)
    assert killed.returncode != 0
    newest = newest_checkpoint(settings.output)
    assert newest is not None
    assert read_checkpoint(newest).step == 4
    done = train_elsewhere(settings.model_copy(update={"resume": "latest"}), config, **clips)
    assert done.returncode == 0, done.stderr[-4000:]
    # Bit for bit.
    assert metrics_rows(tmp_path / "killed") == metrics_rows(tmp_path / "whole")
    for name in ("trained/pytorch_lora_weights.safetensors", "trained/ema/pytorch_lora_weights.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("degree", "processes", "size", "message"),
    [
        (2, 3, (32, 48, 9), "context_parallel = 2 must divide the 3 processes"),
        (3, 3, (32, 48, 9), "context_parallel = 3 must divide the 2 attention heads"),
        (2, 2, (48, 48, 9), "context_parallel = 2 must divide the 27 tokens of 48x48x9"),
    ],
)
def test_what_does_not_divide_is_said_before_a_weight_is_loaded(
    models: Path, tmp_path: Path, degree: int, processes: int, size: tuple[int, int, int], message: str
) -> None:
    settings = tiny_settings(models, tmp_path, context_parallel=degree)
    with pytest.raises(ValueError, match=message):
        check_context(settings, TrainingFamily.of(settings.model), [Bucket(*size)], processes)


def test_a_family_that_diffusers_does_not_train_so(models: Path, tmp_path: Path) -> None:
    save_tiny_sana_pipeline(tmp_path / "sana")
    settings = tiny_settings(models, tmp_path, context_parallel=2)
    words = "diffusers does not train sanavideo with its tokens shared out, only ltxvideo, wan"
    with pytest.raises(ValueError, match=words):
        check_context(settings, TrainingFamily.of(str(tmp_path / "sana")), [], 2)


def test_gradients_of_a_clip_that_is_shared_out_are_those_of_the_whole(tmp_path: Path) -> None:
    """LTX with a text of an odd length that ends before its limit, and a time for each token."""
    done = run(context_gradients, str(tmp_path), ranks=2)
    assert done.returncode == 0, done.stderr
    for case in SHARING:
        found, expected = torch.load(tmp_path / f"{case}.pt"), gradients_alone(case, samples=1)
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=2e-6, rtol=1e-5, msg=f"{case}: {name}")


def test_it_needs_gpus(models: Path, tmp_path: Path) -> None:
    if torch.accelerator.device_count():
        pytest.skip("this machine has GPUs, and the error is for those without")
    with pytest.raises(ValueError, match="context_parallel = 2 needs GPUs"):
        check_launcher(tiny_settings(models, tmp_path, context_parallel=2))
