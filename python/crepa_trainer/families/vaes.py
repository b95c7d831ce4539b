"""The way into each video VAE's latents: sizes from its config alone, and the normalisation that decoding undoes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class VaeEncoding:
    """How a diffusers video VAE encodes.

    Attributes:
        compression: (pixel frames, pixels) of one latent frame and of one latent's side, from its config.
        normalised: `(vae, latents (B, C, T, h, w)) -> latents` in fp32 as the transformer sees them.
    """

    compression: Callable[[Any], tuple[int, int]]
    normalized: Callable[[Any, Tensor], Tensor]


def encode(vae: Any, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
    """Latents (B, C, T, h, w) in fp32, normalised, of pixels (B, P, 3, H, W) uint8.

    A sample of the VAE's distribution with a generator, its mode without.
    """
    video = pixels.to(vae.device).to(vae.dtype).transpose(1, 2) / 127.5 - 1  # (B, 3, P, H, W)
    distribution = vae.encode(video).latent_dist
    latents = distribution.mode() if generator is None else distribution.sample(generator)
    return normalized(vae, latents)


def normalized(vae: Any, latents: Tensor) -> Tensor:
    """Latents of the VAE (B, C, T, h, w) in fp32 as the transformer sees them."""
    return ENCODINGS[type(vae).__name__].normalized(vae, latents.float())


def _by_config(vae: Any, latents: Tensor) -> Tensor:
    mean, std = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / std


def _by_buffers(vae: Any, latents: Tensor) -> Tensor:
    mean, std = (buffer.float().view(1, -1, 1, 1, 1) for buffer in (vae.latents_mean, vae.latents_std))
    return (latents - mean) * vae.config.scaling_factor / std


def _by_scaling_factor(vae: Any, latents: Tensor) -> Tensor:
    return latents * float(vae.config.scaling_factor)


def _scale_factors(config: Any) -> tuple[int, int]:
    return config.scale_factor_temporal, config.scale_factor_spatial


def _compression_ratios(config: Any) -> tuple[int, int]:
    return config.temporal_compression_ratio, config.spatial_compression_ratio


def _ltx(config: Any) -> tuple[int, int]:
    # As the model itself does where its config does not say.
    scaled = 2 ** sum(config.spatio_temporal_scaling)
    return (
        config.temporal_compression_ratio or config.patch_size_t * scaled,
        config.spatial_compression_ratio or config.patch_size * scaled,
    )


def _cogvideox(config: Any) -> tuple[int, int]:
    return int(config.temporal_compression_ratio), int(2 ** (len(config.block_out_channels) - 1))


ENCODINGS = {
    "AutoencoderKLWan": VaeEncoding(_scale_factors, _by_config),
    "AutoencoderKLLTXVideo": VaeEncoding(_ltx, _by_buffers),
    "AutoencoderKLLTX2Video": VaeEncoding(_ltx, _by_buffers),
    "AutoencoderKLCogVideoX": VaeEncoding(_cogvideox, _by_scaling_factor),
    "AutoencoderKLHunyuanVideo": VaeEncoding(_compression_ratios, _by_scaling_factor),
}
