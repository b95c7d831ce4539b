"""Wan 2.1 and 2.2 (one transformer): WanTransformer3DModel with AutoencoderKLWan and UMT5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..loop import NoisyLatents
from .base import Text, TrainingFamily

TEXT_TOKENS = 512  # WanPipeline's default max_sequence_length


class WanFamily(TrainingFamily):
    """Text to video, and image to video where the first latent frame is given clean (`expand_timesteps`, 2.2 5B)."""

    name = "wan"
    transformer_class = "WanTransformer3DModel"
    pixel_multiple = 16
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

    @torch.no_grad()
    def encode_text(self, parts: Any, prompts: Sequence[str]) -> list[Text]:
        embeddings, _ = parts.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
        )
        return [{"text": embedding.clone()} for embedding in embeddings]

    def predict(self, transformer: torch.nn.Module, noisy: NoisyLatents, batch: Mapping[str, Tensor]) -> Tensor:
        prediction: Tensor = transformer(noisy.latents, noisy.timestep, batch["text"], return_dict=False)[0]
        return prediction

    def _pipeline_settings(self) -> dict[str, Any]:
        return {"expand_timesteps": bool(self.configs["pipeline"].get("expand_timesteps"))}

    def text_arguments(self, text: Text, negative: Text | None) -> dict[str, Any]:
        without = None if negative is None else negative["text"][None]
        return {"prompt_embeds": text["text"][None], "negative_prompt_embeds": without}
