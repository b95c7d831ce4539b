"""Clips with noise on them, noise levels as schedulers move them, and clips whose first frame is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from crepa_kernels.models.layouts import TokenLayout


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


def scheduler_shift(config: Mapping[str, Any]) -> float:
    """By how much a scheduler moves its noise levels, from its config."""
    return float(config.get("flow_shift", config.get("shift", 1.0)))


def shifted(time: Tensor, shift: float) -> Tensor:
    """Noise levels in [0, 1] moved towards noise as `FlowMatchEulerDiscreteScheduler` does with `shift` > 1."""
    return shift * time / (1 + (shift - 1) * time)


def with_given_first_frame(noisy: NoisyLatents, given: Tensor) -> NoisyLatents:
    """`noisy` with the first latent frame `given` (B, C, 1, h, w), which is not predicted; the timestep is the others'.

    For transformers whose token frames are single latent frames.
    """
    latents = torch.cat([given.to(noisy.latents), noisy.latents[:, :, 1:]], dim=2)
    predicted = torch.ones(len(latents), latents.shape[2], dtype=torch.bool, device=latents.device)
    predicted[:, 0] = False
    return replace(noisy, latents=latents, frame_mask=predicted)


def with_clean_first_frame(noisy: NoisyLatents, latents: Tensor, layout: TokenLayout) -> NoisyLatents:
    """`noisy` with the first frame of the clean `latents` (B, C, T, h, w), at time 0 and not predicted.

    Its timesteps are then those of each token, (B, tokens).
    """
    timestep = noisy.timestep[:, None].repeat(1, layout.frames)
    timestep[:, 0] = 0
    tokens = layout.grid[0] * layout.grid[1]
    given = with_given_first_frame(noisy, latents[:, :, :1])
    return replace(given, timestep=timestep.repeat_interleave(tokens, dim=1))
