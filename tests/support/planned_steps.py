"""A run's plan, and what its steps take of the memory of the process that they run in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from crepa_trainer.data.dataset import find_clips
from crepa_trainer.data.sampler import MicroBatch, Position
from crepa_trainer.families import TrainingFamily
from crepa_trainer.launcher import launched_processes
from crepa_trainer.reporting.memory import RunMemory
from crepa_trainer.reporting.plan import Plan, make_plan
from crepa_trainer.run import make_accelerator
from crepa_trainer.settings import RunSettings
from crepa_trainer.state import TrainState, make_ema, make_state
from crepa_trainer.step import training_step
from memory import allocated_peak
from torch import Tensor
from torch.distributed.tensor import DTensor

from crepa_kernels import CrepaConfig
from crepa_kernels.teachers.dinov2 import DinoV2


class Measured(NamedTuple):
    """Bytes that are there before a step, and those that a step adds at the most."""

    there: int
    peak: int


def planned(settings: RunSettings, config: CrepaConfig, **given: Any) -> Plan:
    family = TrainingFamily.of(settings.model)
    return make_plan(settings, config, family, find_clips(settings, family), **given)


def made(plan: Plan) -> TrainState:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    state = make_state(make_accelerator(plan.settings), plan.family, plan.settings, plan.config)
    state.transformer.train()
    return state


def batch(plan: Plan) -> MicroBatch:
    family, bucket = plan.family, plan.buckets[0]
    blank = {**family.blank_clip(bucket.bucket), **family.blank_text()}
    clips = {name: torch.stack([each] * plan.settings.batch_size) for name, each in blank.items()}
    teacher: dict[str, Any] = {}
    if plan.config.crepa_enabled:
        shape = plan.settings.batch_size, bucket.encoded or 0, 3, bucket.bucket.height, bucket.bucket.width
        teacher["pixels"] = torch.randint(0, 256, shape, dtype=torch.uint8)
    noise = torch.randn(clips["latents"].shape)
    return MicroBatch(clips, teacher, noise, torch.full((len(noise),), 0.5))


def measured(plan: Plan) -> Measured:
    state = made(plan)
    transformer = state.accelerator.unwrap_model(state.transformer)
    ema = make_ema(transformer, plan.settings.ema_decay)
    # Optimizer state and teacher come with the first.
    training_step(state, plan.family, batch(plan), Position(0, 0, 0))
    held = [*transformer.parameters(), *(ema.shadow_params if ema is not None else ())]
    held += [each for of in state.optimizer.state.values() for each in of.values() if isinstance(each, Tensor)]
    weights = 0
    if plan.config.crepa_enabled:
        weights = 4 * DinoV2(plan.config.crepa_encoder).parameters()
    peak = allocated_peak(lambda: training_step(state, plan.family, batch(plan), Position(1, 0, 0)))
    own = [each.to_local() if isinstance(each, DTensor) else each for each in held]
    return Measured(sum(each.nbytes for each in own) + weights, peak)


def measured_apart(given: dict[str, Any], config: dict[str, Any], folder: str) -> None:
    """In each of several processes: writes what it measured as `folder`/RANK.pt."""
    torch.set_num_threads(1)
    # diffusers' context parallelism counts them, and takes a CPU for none.
    mock.patch.object(torch.accelerator, "device_count", return_value=1).start()
    plan = planned(RunSettings(**given), CrepaConfig.from_dict(config), processes=launched_processes())
    if os.environ["RANK"] == "0":
        RunMemory(plan).training()  # as the first does on GPUs, before the processes meet
    found = measured(plan)
    torch.save(tuple(found), Path(folder) / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
