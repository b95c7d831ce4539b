"""Tiny training runs: settings, encoded clips, and a run in this process or, as a script, in one of its own."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState
from crepa_trainer.checkpoint import Checkpoint, find_checkpoint, run_identity
from crepa_trainer.control import RunControl
from crepa_trainer.data.dataset import Bucket, ClipKey
from crepa_trainer.families import TrainingFamily
from crepa_trainer.launcher import launched_processes
from crepa_trainer.reporting.trackers import MEASURED, read_metrics
from crepa_trainer.run import TrainingRun, make_accelerator, train_on
from crepa_trainer.settings import RunSettings
from processes import run
from rich.console import Console
from tiny import CHANNELS, DINOV2, TEXT_DIM, tiny_dinov2
from tiny_pipelines import save_tiny_wan_pipeline
from torch import Tensor
from torch.distributed.tensor import DTensor

from crepa_kernels import CrepaConfig

TEXT_TOKENS = 6
FEATURE_GRID = (2, 3)


def save_models(folder: Path) -> Path:
    """A Wan pipeline in `folder`/wan and a teacher in `folder`/dinov2."""
    save_tiny_wan_pipeline(folder / "wan")
    tiny_dinov2(folder / "dinov2")
    return folder


def tiny_settings(models: Path, output: Path, **changes: Any) -> RunSettings:
    """A LoRA on latents of 3 frames of 4 x 6, in fp32 so that every number repeats."""
    settings = {
        "model": str(models / "wan"),
        "data": str(models / "videos"),
        "output": str(output),
        "lora_rank": 2,
        "resolutions": [[32, 48], [48, 32]],
        "frame_counts": [9],
        "max_train_steps": 4,
        "learning_rate": 1e-2,
        "mixed_precision": "no",
        "checkpoint_every": 100,
    }
    return RunSettings(**{**settings, **changes})


def tiny_config(models: Path, **changes: Any) -> CrepaConfig:
    """CREPA on block 1 of three, with the teacher's features given."""
    config = {"crepa_enabled": True, "crepa_block_index": 1, "crepa_encoder": str(models / "dinov2")}
    return CrepaConfig.from_dict({**config, **changes})


class TinyClips(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Encoded clips as the cache gives them, each made from its number.

    kill_at: the item at which `kill_by` comes to the process that makes it, or with `kill_training` to that which
    trains; with `kill_rank` in that one alone. broken: the clip whose file is damaged. nan: the clip that is not
    finite.
    """

    def __init__(
        self,
        wide: int = 5,
        tall: int = 3,
        *,
        pixels: bool = False,
        kill_at: int | None = None,
        kill_training: bool = False,
        kill_rank: int | None = None,
        kill_by: int = signal.SIGKILL,
        broken: int | None = None,
        nan: int | None = None,
    ) -> None:
        sizes = [Bucket(32, 48, 9)] * wide + [Bucket(48, 32, 9)] * tall
        self.keys: Sequence[ClipKey] = [ClipKey(f"{n}.mp4", 0, size, "a video") for n, size in enumerate(sizes)]
        self.pixels, self.given = pixels, 0
        self.kill_at = kill_at if kill_rank in (None, int(os.environ.get("RANK", "0"))) else None
        self.kill_by = kill_by
        self.kill_training, self.broken, self.nan = kill_training, broken, nan
        self.negative_text = {"text": torch.zeros(TEXT_TOKENS, TEXT_DIM)}
        prompt = torch.randn(TEXT_TOKENS, TEXT_DIM, generator=torch.Generator().manual_seed(99))
        self.validation_text = [{"text": prompt}]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self.given == self.kill_at:
            in_worker = torch.utils.data.get_worker_info() is not None
            os.kill(os.getppid() if in_worker and self.kill_training else os.getpid(), self.kill_by)
        self.given += 1
        if index == self.broken:
            raise ValueError(f"clip-{index}.safetensors is damaged; start again")
        generator = torch.Generator().manual_seed(1000 + index)
        bucket = self.keys[index].bucket
        height, width = bucket.height, bucket.width
        item = {
            "latents": torch.randn(CHANNELS, 3, height // 8, width // 8, generator=generator),
            "text": torch.randn(TEXT_TOKENS, TEXT_DIM, generator=generator),
            "index": torch.tensor(index),
        }
        if index == self.nan:
            item["latents"][0, 0, 0, 0] = torch.nan
        if self.pixels:
            return item | {"pixels": torch.randint(0, 256, (3, 3, height, width), generator=generator).byte()}
        grid = FEATURE_GRID if height < width else FEATURE_GRID[::-1]
        features = torch.randn(3, 6, DINOV2["hidden_size"], generator=generator)
        return item | {"features": features, "feature_grid": torch.tensor(grid)}


def train(settings: RunSettings, config: CrepaConfig, clips: Any = None) -> list[dict[str, float]]:
    """A run in this process; the rows of its metrics."""
    trained(settings, config, clips)
    return metrics_rows(settings.output)


def trained(settings: RunSettings, config: CrepaConfig, clips: Any = None) -> TrainingRun:
    """A run in this process."""
    for state in (AcceleratorState, GradientState):
        state._reset_state(True) if state is AcceleratorState else state._reset_state()
    family = TrainingFamily.of(settings.model, settings.task, settings.family, settings.expert)
    identity = run_identity(settings, config, launched_processes())
    checkpoint = find_checkpoint(settings, identity)
    accelerator = make_accelerator(settings, checkpoint.step if checkpoint else 0)
    console = Console(file=io.StringIO())
    control = RunControl(settings.output, settings.max_train_steps)
    return train_on(clips or TinyClips(), accelerator, family, settings, config, console, identity, checkpoint, control)


def check_shares(run: TrainingRun, processes: int) -> None:
    """Of every weight, and of what the optimizer and the EMA keep of it, this process has its share alone."""
    moments = [each for state in run.state.optimizer.state.values() for each in state.values() if each.ndim]
    kept = [*run.transformer.parameters(), *moments, *(run.ema.shadow_params if run.ema else ())]
    assert moments or run.settings.optimizer == "sgd"
    for tensor in kept:
        assert isinstance(tensor, DTensor)
        assert tensor.to_local().shape[0] <= -(-tensor.shape[0] // processes)


def metrics_rows(output: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics, without what depends on the machine and its time."""
    rows = read_metrics(output / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def latest_checkpoint(settings: RunSettings, config: CrepaConfig) -> Checkpoint | None:
    """What a run of one process with these settings would go on from."""
    return find_checkpoint(settings, run_identity(settings, config, 1))


def train_elsewhere(
    settings: RunSettings, config: CrepaConfig, *, processes: int = 1, timeout: float = 300, **clips: Any
) -> subprocess.CompletedProcess[str]:
    """The same in a process of its own, or in several as under torchrun. `clips`: arguments of TinyClips, and
    `file_size`, the bytes past which no file may grow, `start`, how worker processes are started, and `accelerators`,
    how many torch counts.
    """
    return run(_main, _given(settings, config, clips), ranks=processes, timeout=timeout)


def command(settings: RunSettings, config: CrepaConfig, *, processes: int = 1, **clips: Any) -> list[str]:
    """What runs `train` in a process of its own, or under torchrun in several."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] * (processes > 1)
    return [sys.executable, *launcher, __file__, json.dumps(_given(settings, config, clips))]


def _given(settings: RunSettings, config: CrepaConfig, clips: Mapping[str, Any]) -> dict[str, Any]:
    return {"settings": settings.model_dump(mode="json"), "config": config.to_dict(), "clips": dict(clips)}


def _main(given: Mapping[str, Any]) -> None:
    if file_size := given["clips"].pop("file_size", None):
        import resource

        # A file that would grow larger is an OSError, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if start := given["clips"].pop("start", None):
        torch.multiprocessing.set_start_method(start, force=True)
    if accelerators := given["clips"].pop("accelerators", None):
        # diffusers' context parallelism counts them, and takes a CPU for none.
        mock.patch.object(torch.accelerator, "device_count", return_value=accelerators).start()
    settings, config = RunSettings(**given["settings"]), CrepaConfig.from_dict(given["config"])
    run = trained(settings, config, TinyClips(**given["clips"]))
    if settings.sharding == "fsdp2":
        check_shares(run, int(os.environ.get("WORLD_SIZE", "1")))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
