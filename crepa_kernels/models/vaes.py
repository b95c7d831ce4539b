"""Each video VAE in both directions, as its pipelines use it: pixels to latents, latents to pixels, sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..transfer import moved


@dataclass(frozen=True)
class VideoVae:
    """What is known of a diffusers video VAE.

    Attributes:
        channels: C of its latents, from its config.
        compression: (pixel frames, pixels) of one latent frame after the first and of one latent's side, from its
            config.
        to_video: ``(vae, its own latents in its type) -> video (B, 3, P, H, W)`` in [-1, 1].
    """

    channels: Callable[[Any], int]
    compression: Callable[[Any], tuple[int, int]]
    to_video: Callable[[Any, Tensor], Tensor]

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Pixels (B, P, 3, H, W) in [0, 1] of clean latents (B, C, T, h, w), normalised as the transformer sees them.

        The end is ``VideoProcessor.postprocess_video``.
        """
        mean, std, scale = statistics(vae, latents.device)
        video = self.to_video(vae, (latents.float() * std / scale + mean).to(vae.dtype))
        return (video / 2 + 0.5).clamp(0, 1).transpose(1, 2)


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
    mean, std, scale = statistics(vae, latents.device)
    return (latents.float() - mean) * scale / std


def statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """Of what ``vae`` encodes clips to: mean and standard deviation, (1, C or 1, 1, 1, 1), on ``device``, and the
    factor between a standard deviation and what the transformer sees of it.
    """
    scale = float(getattr(vae.config, "scaling_factor", None) or 1.0)
    buffers = dict(vae.named_buffers(recurse=False))
    if "latents_mean" in buffers:
        mean, std = (buffers[f"latents_{name}"].to(device, torch.float32) for name in ("mean", "std"))
    elif getattr(vae.config, "latents_mean", None) is not None:
        # From pageable memory, so the host does not wait for the device.
        both = torch.tensor([vae.config.latents_mean, vae.config.latents_std], dtype=torch.float32)
        (mean, std), scale = moved(both, device), 1.0
    else:
        mean, std = torch.zeros(1, device=device), torch.ones(1, device=device)
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1), scale


def _decoded(vae: Any, latents: Tensor) -> Tensor:
    video: Tensor = vae.decode(latents, return_dict=False)[0]
    return video


def _decoded_at_0(vae: Any, latents: Tensor) -> Tensor:
    """LTX: newer ones want a timestep, which is 0.

    The pipeline's own default: other timesteps go with noise added to what the transformer made, these are clean.
    """
    if not vae.config.timestep_conditioning:
        video: Tensor = vae.decode(latents, None, return_dict=False)[0]
        return video
    # Clip by clip for slicing: its decode() pairs the clips with the timesteps wrongly there.
    parts = latents.split(1) if vae.use_slicing else (latents,)
    return torch.cat([vae.decode(part, part.new_zeros(len(part)), return_dict=False)[0] for part in parts])


def _ltx(config: Any) -> tuple[int, int]:
    # As the model itself does where its config does not say.
    scaled = 2 ** sum(config.spatio_temporal_scaling)
    return (
        config.temporal_compression_ratio or config.patch_size_t * scaled,
        config.spatial_compression_ratio or config.patch_size * scaled,
    )


def _cogvideox(config: Any) -> tuple[int, int]:
    return int(config.temporal_compression_ratio), int(2 ** (len(config.block_out_channels) - 1))


_RATIOS = attrgetter("temporal_compression_ratio", "spatial_compression_ratio")
_CHANNELS = attrgetter("latent_channels")
# By class; which families decode with which is in the families' table.
VIDEO_VAES = {
    "AutoencoderKLWan": VideoVae(
        attrgetter("z_dim"), attrgetter("scale_factor_temporal", "scale_factor_spatial"), _decoded
    ),
    "AutoencoderKLLTXVideo": VideoVae(_CHANNELS, _ltx, _decoded_at_0),
    "AutoencoderKLLTX2Video": VideoVae(_CHANNELS, _ltx, _decoded),
    "AutoencoderKLCogVideoX": VideoVae(_CHANNELS, _cogvideox, _decoded),
    "AutoencoderKLHunyuanVideo": VideoVae(_CHANNELS, _RATIOS, _decoded),
}
