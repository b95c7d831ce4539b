"""The training loop: flow matching on latents with CREPA beside it, through accelerate. Copy from here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from accelerate import Accelerator

    from crepa_kernels import CrepaRegularizer

Batch = tuple[Tensor, Tensor]  # clean latents (B, C, T, h, w), pixels (B, P, 3, H, W) uint8


@dataclass
class Student:
    """What is trained. `crepa` None trains without CREPA."""

    transformer: torch.nn.Module
    crepa: CrepaRegularizer | None
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class NoisyLatents:
    """Flow matching: x_t = (1 - t) x_0 + t ε, and the velocity ε - x_0 that is to be predicted from it."""

    latents: Tensor  # (B, C, T, h, w)
    timestep: Tensor  # (B,), 1000 t, as Wan takes it; (B, tokens) where tokens have times of their own
    target: Tensor  # (B, C, T, h, w)
    frame_mask: Tensor | None = None  # (B, T) bool: frames that are predicted; None: all


def add_noise(latents: Tensor, noise: Tensor, time: Tensor) -> NoisyLatents:
    """x_t at noise level `time` (B,) in [0, 1]; 0 is the clean video."""
    t = time.view(-1, 1, 1, 1, 1).to(latents)
    return NoisyLatents((1 - t) * latents + t * noise, 1000 * time.to(latents), noise - latents)


def draw_noise(latents: Tensor, generator: torch.Generator) -> NoisyLatents:
    """Gaussian noise at a logit-normal level. The generator is the CPU's, so that every device draws the same."""
    time = torch.randn(len(latents), generator=generator).sigmoid()
    noise = torch.randn(latents.shape, generator=generator)
    return add_noise(latents, noise.to(latents), time.to(latents.device))


def parameter_groups(
    transformer: torch.nn.Module, learning_rate: float, projector_learning_rate: float
) -> list[dict[str, Any]]:
    """Optimiser groups of all that requires a gradient; the projector starts from nothing and may learn faster."""
    trained = [(name, p) for name, p in transformer.named_parameters() if p.requires_grad]
    projector = [p for name, p in trained if name.startswith("crepa_projector.")]
    adapter = [p for name, p in trained if not name.startswith("crepa_projector.")]
    groups = [{"params": adapter, "lr": learning_rate}, {"params": projector, "lr": projector_learning_rate}]
    return [group for group in groups if group["params"]]


def training_step(
    accelerator: Accelerator,
    student: Student,
    batch: Batch,
    text: Tensor,
    step: int,
    generator: torch.Generator,
) -> dict[str, Any]:
    """One micro-batch: forward, losses, backward, and the optimiser when it is its turn.

    Returns the values to log: detached tensors, floats and bools, nothing read from the device yet.
    """
    latents, pixels = batch
    noisy = draw_noise(latents, generator)
    with accelerator.accumulate(student.transformer):
        prediction = student.transformer(
            noisy.latents, noisy.timestep, text.expand(len(latents), -1, -1), return_dict=False
        )[0]
        flow_loss = F.mse_loss(prediction.float(), noisy.target.float())
        loss = flow_loss
        logs: dict[str, Any] = {}
        if student.crepa is not None:
            aux, logs = student.crepa.loss(step=step, pixels=pixels)
            loss = flow_loss + aux
            student.crepa.release()
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(student.transformer.parameters(), 1.0)
        student.optimizer.step()
        student.optimizer.zero_grad()
    return {"loss": loss.detach(), "flow_loss": flow_loss.detach(), **logs}


def train(
    accelerator: Accelerator,
    student: Student,
    loader: DataLoader[Any],
    text: Tensor,
    *,
    steps: int,
    generator: torch.Generator,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, values: None,
) -> None:
    """`steps` optimiser steps of a student and a loader that come out of accelerator.prepare.

    text: (1, L, text_dim), the condition of every clip. Each step's values go to the accelerator's trackers and
    to `on_step`. FloatingPointError as soon as the loss is not a finite number.
    """
    student.transformer.train()
    batches = _endless(loader)
    step = 0
    while step < steps:
        logs = training_step(accelerator, student, next(batches), text, step, generator)
        if not accelerator.sync_gradients:
            continue
        # The one place where the host waits for the device.
        values = {name: float(value) for name, value in logs.items()}
        if not math.isfinite(values["loss"]):
            if student.crepa is not None:
                student.crepa.flush()  # says which side it came from
            raise FloatingPointError(f"step {step}: the loss is {values['loss']}; lower the learning rate")
        accelerator.log(values, step=step)
        on_step(step, values)
        step += 1


def _endless(loader: DataLoader[Any]) -> Iterator[Batch]:
    while True:
        yield from loader
