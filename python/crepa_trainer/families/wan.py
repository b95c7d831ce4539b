"""Wan 2.1 and 2.2 (one transformer): WanTransformer3DModel with AutoencoderKLWan and UMT5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..loop import NoisyLatents
from .base import ClipSize, Text, TrainingFamily

TEXT_TOKENS = 512  # WanPipeline's default max_sequence_length
PIXEL_MULTIPLE = 16  # which WanPipeline asks of height and width


class WanFamily(TrainingFamily):
    """Text to video, and image to video where the first latent frame is given clean (`expand_timesteps`, 2.2 5B)."""

    name = "wan"
    transformer_class = "WanTransformer3DModel"
    pipelines: ClassVar = {"text2video": "WanPipeline", "image2video": "WanImageToVideoPipeline"}

    def _check_task(self) -> None:
        index, transformer, vae = (self.configs[part] for part in ("pipeline", "transformer", "vae"))
        if (index.get("transformer_2") or [None, None])[1] is not None:
            raise ValueError(f"{self.model} has two transformers (transformer_2): not supported, one is trained alone")
        if transformer["in_channels"] != vae["z_dim"]:
            raise ValueError(
                f"{self.model}: the transformer takes {transformer['in_channels']} channels and the VAE makes "
                f"{vae['z_dim']}: models conditioned on an image by channels are not supported"
            )
        if self.task == "image2video" and not index.get("expand_timesteps"):
            raise ValueError(f"task = image2video: {self.model} is a text-to-video model (no expand_timesteps)")

    def check_bucket(self, bucket: ClipSize) -> None:
        _, height, width = self._multiples()
        if bucket.height % height or bucket.width % width or bucket.height < height or bucket.width < width:
            raise ValueError(
                f"resolution {bucket.height}x{bucket.width}: height must be a multiple of {height}, "
                f"width of {width} (VAE and patches)"
            )
        factor = self._scale("scale_factor_temporal", 4)
        if bucket.frames < 1 or (bucket.frames - 1) % factor:
            raise ValueError(f"frame count {bucket.frames}: the VAE makes 1 + {factor}n frames (1, {1 + factor}, ...)")
        frames = 1 + (bucket.frames - 1) // factor
        if frames % self.configs["transformer"]["patch_size"][0]:
            raise ValueError(
                f"frame count {bucket.frames}: {frames} latent frames are not a multiple of the transformer's "
                f"temporal patch {self.configs['transformer']['patch_size'][0]}"
            )

    def latent_shape(self, bucket: ClipSize) -> tuple[int, int, int, int]:
        spatial = self._scale("scale_factor_spatial", 8)
        frames = 1 + (bucket.frames - 1) // self._scale("scale_factor_temporal", 4)
        return self.configs["vae"]["z_dim"], frames, bucket.height // spatial, bucket.width // spatial

    def _multiples(self) -> tuple[int, int, int]:
        spatial, (_, height, width) = self._scale("scale_factor_spatial", 8), self.configs["transformer"]["patch_size"]
        multiples = [spatial * patch for patch in (height, width)]
        # The pipeline's own check, on top of what VAE and patches need.
        tall, wide = (m if m % PIXEL_MULTIPLE == 0 else m * PIXEL_MULTIPLE for m in multiples)
        return 1, tall, wide

    def _scale(self, key: str, default: int) -> int:
        return int(self.configs["vae"].get(key, default))

    @torch.no_grad()
    def encode_text(self, parts: Any, prompts: Sequence[str]) -> list[Text]:
        embeddings, _ = parts.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
        )
        return [{"text": embedding.clone()} for embedding in embeddings]

    @torch.no_grad()
    def encode_latents(self, vae: Any, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        video = pixels.to(vae.device).to(vae.dtype).transpose(1, 2) / 127.5 - 1  # (B, 3, P, H, W)
        distribution = vae.encode(video).latent_dist
        latents = distribution.mode() if generator is None else distribution.sample(generator)
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return (latents.float() - mean) / std

    def noisy(self, batch: Mapping[str, Tensor], noise: Tensor, time: Tensor) -> NoisyLatents:
        noisy = super().noisy(batch, noise, time)
        if self.task == "text2video":
            return noisy
        # WanImageToVideoPipeline: the first latent frame is the image's, clean, and each token has its own time.
        latents = batch["latents"]
        given = torch.cat([latents[:, :, :1], noisy.latents[:, :, 1:]], dim=2)
        _, tall, wide = self.configs["transformer"]["patch_size"]
        clips, _, frames, height, width = latents.shape
        predicted = torch.ones(clips, frames, dtype=torch.bool, device=latents.device)
        predicted[:, 0] = False
        tokens = (height // tall) * (width // wide)
        timestep = (noisy.timestep[:, None] * predicted).repeat_interleave(tokens, dim=1)  # (B, T h w)
        return replace(noisy, latents=given, timestep=timestep, frame_mask=predicted)

    def predict(self, transformer: torch.nn.Module, noisy: NoisyLatents, batch: Mapping[str, Tensor]) -> Tensor:
        prediction: Tensor = transformer(noisy.latents, noisy.timestep, batch["text"], return_dict=False)[0]
        return prediction

    def _pipeline_settings(self) -> dict[str, Any]:
        return {"expand_timesteps": bool(self.configs["pipeline"].get("expand_timesteps"))}

    def text_arguments(self, text: Text, negative: Text | None) -> dict[str, Any]:
        without = None if negative is None else negative["text"][None]
        return {"prompt_embeds": text["text"][None], "negative_prompt_embeds": without}
