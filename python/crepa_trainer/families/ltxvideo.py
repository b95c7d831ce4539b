"""LTX-Video: LTXVideoTransformer3DModel with AutoencoderKLLTXVideo and T5."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .base import TrainingFamily
from .noise import NoisyLatents, shifted

FRAME_RATE = 25  # frames a second that LTXPipeline takes where it is not told


class LtxVideoFamily(TrainingFamily):
    """Text to video, and image to video where the first latent frame is given clean."""

    name = "ltxvideo"
    transformer_class = "LTXVideoTransformer3DModel"
    pixel_multiple = 32
    shares_tokens = True
    original_names: ClassVar = {
        "transformer_blocks.*": "transformer_blocks.*",
        "caption_projection.*": "caption_projection.*",
        "proj_in": "patchify_proj",
        "proj_out": "proj_out",
        "time_embed.*": "adaln_single.*",
    }
    text_keys: ClassVar = {"text": "prompt_embeds", "text_mask": "prompt_attention_mask"}
    text_widths: ClassVar = {"text": "caption_channels"}
    text_limits: ClassVar = {"tokenizer": 128}  # the pipelines' default max_sequence_length
    pipelines: ClassVar = {"text2video": "LTXPipeline", "image2video": "LTXImageToVideoPipeline"}

    def noise_level(self, draw: Tensor, latent_shape: Sequence[int]) -> Tensor:
        """As the base class; a scheduler with dynamic shifting moves the levels of longer clips further."""
        scheduler = self.configs["scheduler"]
        if not scheduler.get("use_dynamic_shifting"):
            return super().noise_level(draw, latent_shape)
        from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

        keys = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        mu = calculate_shift(math.prod(latent_shape[1:]), *(scheduler.get(key, keys[key]) for key in keys))
        return shifted(draw.sigmoid(), mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu))

    def predict(self, transformer: torch.nn.Module, noisy: NoisyLatents, batch: Mapping[str, Tensor]) -> Tensor:
        from diffusers import LTXPipeline

        config = self.config("transformer")
        patches = config.patch_size, config.patch_size_t
        frames, height, width = noisy.latents.shape[2:]
        temporal, spatial = self.compression
        packed: Tensor = transformer(
            hidden_states=LTXPipeline._pack_latents(noisy.latents, *patches),
            encoder_hidden_states=batch["text"],
            timestep=noisy.timestep,
            encoder_attention_mask=batch["text_mask"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(temporal / FRAME_RATE, spatial, spatial),
            return_dict=False,
        )[0]
        prediction: Tensor = LTXPipeline._unpack_latents(packed, frames, height, width, *patches)
        return prediction
