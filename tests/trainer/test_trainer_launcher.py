"""What `accelerate launch` and its environment say: applied, or refused by name, and never instead of the settings."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from crepa_trainer.cli import main
from crepa_trainer.launcher import training_device
from processes import environment
from safetensors.torch import load_file
from training_runs import save_models
from videos import captioned_squares

# As `accelerate config` writes it for torch.compile.
DYNAMO = """\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: 'NO'
downcast_bf16: 'no'
dynamo_config:
  dynamo_backend: 'EAGER'
enable_cpu_affinity: false
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 1
use_cpu: true
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_models(tmp_path_factory.mktemp("models"))
    captioned_squares(folder / "videos", 1)
    return folder


def words(models: Path, output: Path, **changes: str) -> list[str]:
    given = {
        "model": str(models / "wan"),
        "data": str(models / "videos"),
        "output": str(output),
        "resolutions": "[[32, 48]]",
        "frame_counts": "[5]",
        "lora_rank": "2",
        "max_train_steps": "1",
        **changes,
    }
    return ["run", *(word for key, value in given.items() for word in (f"--{key}", value))]


@pytest.fixture
def error_of(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line of the command, after which nothing was made."""

    def line(*command: str, **changes: str) -> str:
        assert main([*words(models, tmp_path / "run", **changes), *command]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert not (tmp_path / "run").exists()
        return error.removeprefix("crepa-train: error: ")

    return line


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER", "EAGER: use compile_blocks"),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor", "inductor: use compile_blocks"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "4: gradient_accumulation_steps is 2"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1", "1: gradient_accumulation_steps is 2"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "fp16: mixed_precision is bf16"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "fp8: mixed_precision is bf16"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "true: launched with DeepSpeed, whose engine keeps the backward"),
        ("ACCELERATE_USE_FSDP", "true", "true: launched with FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "true: launched with Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "true: launched with a parallelism config"),
    ],
)
def test_what_the_launcher_says_otherwise_is_refused_by_name(
    error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(name, value)
    assert error_of("--plan", gradient_accumulation_steps="2").startswith(f"{name} = {says}")
    assert error_of(gradient_accumulation_steps="2").startswith(f"{name} = {says}")


def test_what_the_launcher_says_of_the_demo_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    assert main(["demo", "--output", str(tmp_path / "demo"), "--steps", "1"]) == 2
    assert "ACCELERATE_DYNAMO_BACKEND = EAGER: " in capsys.readouterr().err


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_fp16_without_a_gpu_is_the_only_line(error_of: Callable[..., str]) -> None:
    assert error_of(mixed_precision="fp16") == "mixed_precision = fp16 needs a GPU: use bf16 or no"


def test_what_the_launcher_says_of_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    assert training_device() == "meta"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert training_device() == "cpu"


@pytest.mark.parametrize("dynamo", [pytest.param("EAGER", marks=pytest.mark.slow), "NO"])
def test_a_run_under_accelerate_launch(models: Path, tmp_path: Path, dynamo: str) -> None:
    file, output = tmp_path / "accelerate.yaml", tmp_path / "run"
    file.write_text(DYNAMO.replace("EAGER", dynamo))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "-m", "crepa_trainer"]
    done = subprocess.run(
        [*launch, *words(models, output)], capture_output=True, text=True, timeout=300, env=environment()
    )
    if dynamo == "EAGER":
        assert done.returncode != 0
        assert "crepa-train: error: ACCELERATE_DYNAMO_BACKEND = EAGER: use compile_blocks" in done.stderr
        assert not output.exists()
    else:
        assert done.returncode == 0, done.stderr
        names = load_file(output / "trained" / "pytorch_lora_weights.safetensors")
        assert names
        assert all(name.startswith("transformer.blocks.") for name in names)
