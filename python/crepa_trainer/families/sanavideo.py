"""SANA-Video: SanaVideoTransformer3DModel with AutoencoderKLWan or AutoencoderKLLTX2Video, and Gemma 2."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Text, TrainingFamily
from .noise import NoisyLatents
from .sizes import ClipSize
from .text_limits import tokens


class SanaVideoFamily(TrainingFamily):
    """Text to video, and image to video where the first latent frame is given clean."""

    name = "sanavideo"
    transformer_class = "SanaVideoTransformer3DModel"
    pixel_multiple = 32
    one_prompt_at_a_time = True
    text_keys: ClassVar = {"text": "prompt_embeds", "text_mask": "prompt_attention_mask"}
    text_widths: ClassVar = {"text": "caption_channels"}
    text_limits: ClassVar = {"tokenizer": 300}  # the pipelines' default max_sequence_length
    pipelines: ClassVar = {"text2video": "SanaVideoPipeline", "image2video": "SanaImageToVideoPipeline"}

    def prompt_options(self, prompts: Sequence[str]) -> dict[str, Any]:
        """As the pipeline's call: under its instruction for the text encoder, but the empty prompt alone."""
        instruction = _instruction() if any(prompts) else None
        return {**super().prompt_options(prompts), "complex_human_instruction": instruction}

    def token_count(self, tokenizer: Any, part: str, prompt: str) -> int:
        instruction, prompt = "\n".join(_instruction()), prompt.lower().strip()
        # As the pipeline counts: the tokens at both ends of an instruction alone make room for two of the prompt's.
        return tokens(tokenizer, instruction + prompt) - (tokens(tokenizer, instruction) - 2)

    def predict(self, transformer: torch.nn.Module, noisy: NoisyLatents, batch: Mapping[str, Tensor]) -> Tensor:
        timestep = noisy.timestep
        if timestep.dim() == 2:
            _, *sides = self.config("transformer").patch_size
            frames, *latent = noisy.latents.shape[2:]
            grid = [size // side for size, side in zip(latent, sides, strict=True)]
            timestep = timestep.view(-1, 1, frames, *grid)
        prediction: Tensor = transformer(
            noisy.latents,
            encoder_hidden_states=batch["text"],
            encoder_attention_mask=batch["text_mask"],
            timestep=timestep,
            return_dict=False,
        )[0]
        # Of a model that learned the variance too, as its pipelines do.
        return prediction[:, : noisy.latents.shape[1]]

    def text_arguments(self, text: Text, negative: Text | None) -> dict[str, Any]:
        # Its default is "", which it refuses beside embeddings.
        return {**super().text_arguments(text, negative), "negative_prompt": None}

    def size_arguments(self, size: ClipSize) -> dict[str, Any]:
        sizes = super().size_arguments(size)
        # A clip is sampled in the size that is trained, not in the nearest of the pipeline's own.
        return {"frames": sizes.pop("num_frames"), **sizes, "use_resolution_binning": False}


def _instruction() -> list[str]:
    from diffusers import SanaVideoPipeline

    lines: list[str] = inspect.signature(SanaVideoPipeline.__call__).parameters["complex_human_instruction"].default
    return lines
