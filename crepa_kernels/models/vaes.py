"""Each VAE in both directions, as its pipelines use it: pixels to latents, latents to pixels, sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..transfer import moved


def _sampled(vae: Any, video: Tensor, generator: torch.Generator | None) -> Tensor:
    distribution = vae.encode(video).latent_dist
    latents: Tensor = distribution.mode() if generator is None else distribution.sample(generator)
    return latents


@dataclass(frozen=True)
class Vae:
    """What is known of a diffusers VAE. An image is a clip of one frame.

    Attributes:
        channels: C of its latents, from its config.
        compression: (pixel frames, pixels) of one latent frame after the first and of one latent's side, from its
            config.
        to_video: ``(vae, its own latents in its type) -> video (B, 3, P, H, W)`` in [-1, 1].
        to_latents: ``(vae, video in its type, generator) -> its own latents``, a sample, or the mode without a
            generator.
    """

    channels: Callable[[Any], int]
    compression: Callable[[Any], tuple[int, int]]
    to_video: Callable[[Any, Tensor], Tensor]
    to_latents: Callable[[Any, Tensor, torch.Generator | None], Tensor] = _sampled

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Pixels (B, P, 3, H, W) in [0, 1] of clean latents (B, C, T, h, w), normalised as the transformer sees them.

        The end is ``VideoProcessor.postprocess_video``.
        """
        mean, std, scale = statistics(vae, latents.device)
        with _upcast(vae):
            video = self.to_video(vae, (latents.float() * std / scale + mean).to(vae.dtype))
        return (video / 2 + 0.5).clamp(0, 1).transpose(1, 2)


@contextmanager
def _upcast(vae: Any) -> Iterator[None]:
    """In fp32, where its config says that it overflows in fp16 and it is in fp16, as SDXL's pipeline does it."""
    overflows = vae.dtype == torch.float16 and bool(getattr(vae.config, "force_upcast", False))
    if overflows:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if overflows:
            vae.to(torch.float16)


def encode(vae: Any, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
    """Latents (B, C, T, h, w) in fp32, normalised, of pixels (B, P, 3, H, W) uint8; of an image P and T are 1.

    A sample of the VAE's distribution with a generator, its mode without.
    """
    video = pixels.to(vae.device).to(vae.dtype).transpose(1, 2) / 127.5 - 1  # (B, 3, P, H, W)
    return normalized(vae, VAES[type(vae).__name__].to_latents(vae, video, generator))


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
    if hasattr(vae, "bn"):  # Flux 2
        mean, std = vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        mean, std = (each.to(device, torch.float32) for each in (mean, std))
    elif "latents_mean" in buffers:
        mean, std = (buffers[f"latents_{name}"].to(device, torch.float32) for name in ("mean", "std"))
    elif getattr(vae.config, "latents_mean", None) is not None:
        # From pageable memory, so the host does not wait for the device.
        both = torch.tensor([vae.config.latents_mean, vae.config.latents_std], dtype=torch.float32)
        mean, std = moved(both, device)
    else:
        shift = float(getattr(vae.config, "shift_factor", None) or 0.0)
        mean, std = torch.full((1,), shift, device=device), torch.ones(1, device=device)
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


def _image_decoded(vae: Any, latents: Tensor) -> Tensor:
    image: Tensor = vae.decode(latents[:, :, 0], return_dict=False)[0]
    return image[:, :, None]


def _image_sampled(vae: Any, video: Tensor, generator: torch.Generator | None) -> Tensor:
    return _sampled(vae, video[:, :, 0], generator)[:, :, None]


def _image_encoded(vae: Any, video: Tensor, generator: torch.Generator | None) -> Tensor:
    # Sana's is deterministic.
    latents: Tensor = vae.encode(video[:, :, 0], return_dict=False)[0]
    return latents[:, :, None]


def _unpatchified(vae: Any, latents: Tensor) -> Tensor:
    """Flux 2: the transformer's channels are squares of the VAE's latents, channel first."""
    rows, columns = vae.config.patch_size
    squares = latents[:, :, 0].unflatten(1, (-1, rows, columns))  # [B, C, rows, columns, h, w]
    return _image_decoded(vae, squares.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)[:, :, None])


def _patchified(vae: Any, video: Tensor, generator: torch.Generator | None) -> Tensor:
    rows, columns = vae.config.patch_size
    latents = _sampled(vae, video[:, :, 0], generator).unflatten(3, (-1, columns)).unflatten(2, (-1, rows))
    return latents.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)[:, :, None]


def _halved(blocks: str) -> Callable[[Any], tuple[int, int]]:
    """Compression of an image's VAE that halves a side between two of its blocks."""
    return lambda config: (1, 2 ** (len(getattr(config, blocks)) - 1))


def _flux2(config: Any) -> tuple[int, int]:
    return 1, config.patch_size[0] * _halved("block_out_channels")(config)[1]


def _qwen(config: Any) -> tuple[int, int]:
    return 2 ** sum(config.temperal_downsample), 2 ** len(config.temperal_downsample)


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
VAES = {
    "AutoencoderKLWan": Vae(attrgetter("z_dim"), attrgetter("scale_factor_temporal", "scale_factor_spatial"), _decoded),
    "AutoencoderKLLTXVideo": Vae(_CHANNELS, _ltx, _decoded_at_0),
    "AutoencoderKLLTX2Video": Vae(_CHANNELS, _ltx, _decoded),
    "AutoencoderKLCogVideoX": Vae(_CHANNELS, _cogvideox, _decoded),
    "AutoencoderKLHunyuanVideo": Vae(_CHANNELS, _RATIOS, _decoded),
    "AutoencoderKL": Vae(_CHANNELS, _halved("block_out_channels"), _image_decoded, _image_sampled),
    "AutoencoderKLFlux2": Vae(
        lambda config: config.latent_channels * prod(config.patch_size), _flux2, _unpatchified, _patchified
    ),
    "AutoencoderKLQwenImage": Vae(attrgetter("z_dim"), _qwen, _decoded),
    "AutoencoderDC": Vae(_CHANNELS, _halved("encoder_block_out_channels"), _image_decoded, _image_encoded),
}
