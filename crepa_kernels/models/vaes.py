"""Latents to pixels: what each VAE's pipelines do after the last denoising step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..transfer import moved


@dataclass(frozen=True)
class VideoVae:
    """How a diffusers video VAE is decoded.

    Attributes:
        channels: C of its latents, from its config.
        temporal_factor: pixel frames of a latent frame after the first, from its config.
        decode: ``(vae, latents (B, C, T, H, W)) -> pixels (B, P, 3, H, W)`` in [0, 1]; the latents are clean and
            normalised as the transformer sees them.
    """

    channels: Callable[[Any], int]
    temporal_factor: Callable[[Any], int]
    decode: Callable[[Any, torch.Tensor], torch.Tensor]


def _pixels(video: torch.Tensor) -> torch.Tensor:
    """(B, 3, P, H, W) in [-1, 1] -> (B, P, 3, H, W) in [0, 1], as ``VideoProcessor.postprocess_video``."""
    return (video / 2 + 0.5).clamp(0, 1).transpose(1, 2)


def _by_config(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Wan: ``vae.decode(latents * std + mean)`` with the statistics in its config."""
    statistics = torch.tensor([vae.config.latents_mean, vae.config.latents_std], dtype=torch.float32)
    # From pageable memory, so the host does not wait for the device.
    mean, std = moved(statistics, latents.device).view(2, 1, -1, 1, 1, 1)
    return _pixels(vae.decode((latents.float() * std + mean).to(vae.dtype), return_dict=False)[0])


def _by_buffers(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """``latents * std + mean`` with the statistics in the VAE's buffers, in its type."""
    mean, std = (buffer.float().view(1, -1, 1, 1, 1) for buffer in (vae.latents_mean, vae.latents_std))
    scale = getattr(vae.config, "scaling_factor", 1.0)
    return (latents.float() * std / scale + mean).to(vae.dtype)


def _ltx(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """LTX: by the statistics in its buffers, and for newer ones at the decode timestep 0.

    The pipeline's own default: other timesteps go with noise added to what the transformer made, these are clean.
    """
    latents = _by_buffers(vae, latents)
    if not vae.config.timestep_conditioning:
        return _pixels(vae.decode(latents, None, return_dict=False)[0])
    # Clip by clip for slicing: its decode() pairs the clips with the timesteps wrongly there.
    parts = latents.split(1) if vae.use_slicing else (latents,)
    videos = [vae.decode(part, part.new_zeros(len(part)), return_dict=False)[0] for part in parts]
    return _pixels(torch.cat(videos))


def _ltx2(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """SanaVideo with LTX 2's VAE: by the statistics in its buffers."""
    return _pixels(vae.decode(_by_buffers(vae, latents), return_dict=False)[0])


def _by_scaling_factor(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """CogVideoX, HunyuanVideo, Kandinsky 5: ``vae.decode(latents / scaling_factor)``."""
    return _pixels(vae.decode((latents.float() / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0])


def statistics(vae: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation, (1, C or 1, 1, 1, 1), of what ``vae`` encodes clips to, on ``device``."""
    scale = getattr(vae.config, "scaling_factor", None) or 1.0
    buffers = dict(vae.named_buffers(recurse=False))
    if "latents_mean" in buffers:
        mean, std = (buffers[f"latents_{name}"].to(device, torch.float32) for name in ("mean", "std"))
        std = std / scale
    elif getattr(vae.config, "latents_mean", None) is not None:
        both = torch.tensor([vae.config.latents_mean, vae.config.latents_std], dtype=torch.float32)
        mean, std = moved(both, device)
    else:
        mean, std = torch.zeros(1, device=device), torch.full((1,), 1.0 / scale, device=device)
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


def _z_dim(config: Any) -> int:
    return int(config.z_dim)


def _latent_channels(config: Any) -> int:
    return int(config.latent_channels)


def _scale_factor(config: Any) -> int:
    return int(config.scale_factor_temporal)


def _compression_ratio(config: Any) -> int:
    return int(config.temporal_compression_ratio)


def _ltx_factor(config: Any) -> int:
    # As the model itself does where its config does not say.
    return int(config.temporal_compression_ratio or config.patch_size_t * 2 ** sum(config.spatio_temporal_scaling))


# By class; which families decode with which is in the families' table.
VIDEO_VAES = {
    "AutoencoderKLWan": VideoVae(_z_dim, _scale_factor, _by_config),
    "AutoencoderKLLTXVideo": VideoVae(_latent_channels, _ltx_factor, _ltx),
    "AutoencoderKLLTX2Video": VideoVae(_latent_channels, _ltx_factor, _ltx2),
    "AutoencoderKLCogVideoX": VideoVae(_latent_channels, _compression_ratio, _by_scaling_factor),
    "AutoencoderKLHunyuanVideo": VideoVae(_latent_channels, _compression_ratio, _by_scaling_factor),
}
