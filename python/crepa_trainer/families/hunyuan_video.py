"""HunyuanVideo: HunyuanVideoTransformer3DModel with AutoencoderKLHunyuanVideo, Llama and CLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..loop import NoisyLatents
from .base import Text, TrainingFamily

# At which a guidance-distilled model is trained: 1 asks for the data's own distribution, and larger scales of the
# samples go on meaning what they meant.
TRAINED_GUIDANCE = 1.0


class HunyuanVideoFamily(TrainingFamily):
    """Text to video."""

    name = "hunyuan_video"
    transformer_class = "HunyuanVideoTransformer3DModel"
    text_parts = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    depth = ("num_layers", "num_single_layers")
    pixel_multiple = 16
    pipelines: ClassVar = {"text2video": "HunyuanVideoPipeline"}

    def _check_task(self) -> None:
        if self.task == "image2video" or self.config("transformer").image_condition_type is not None:
            raise ValueError(
                f"{self.model}: image2video is not supported for {self.name}: its text encoder reads the first frame "
                "with the caption, so that captions cannot be encoded before the clips"
            )

    @torch.no_grad()
    def encode_text(self, parts: Any, prompts: Sequence[str]) -> list[Text]:
        texts, pooled, masks = parts.encode_prompt(list(prompts))
        return [
            {"text": text.clone(), "text_pooled": vector.clone(), "text_mask": mask.clone()}
            for text, vector, mask in zip(texts, pooled, masks, strict=True)
        ]

    def predict(self, transformer: torch.nn.Module, noisy: NoisyLatents, batch: Mapping[str, Tensor]) -> Tensor:
        prediction: Tensor = transformer(
            hidden_states=noisy.latents,
            timestep=noisy.timestep,
            encoder_hidden_states=batch["text"],
            encoder_attention_mask=batch["text_mask"].to(noisy.latents.dtype),
            pooled_projections=batch["text_pooled"],
            guidance=noisy.timestep.new_full((len(noisy.latents),), 1000 * TRAINED_GUIDANCE),
            return_dict=False,
        )[0]
        return prediction

    def text_arguments(self, text: Text, negative: Text | None) -> dict[str, Any]:
        arguments = _arguments(text, "")
        return arguments if negative is None else {**arguments, **_arguments(negative, "negative_")}

    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        # A model that is not distilled ignores the embedded scale.
        key = "guidance_scale" if self.config("transformer").guidance_embeds else "true_cfg_scale"
        return {key: guidance}


def _arguments(text: Text, prefix: str) -> dict[str, Any]:
    return {
        f"{prefix}prompt_embeds": text["text"][None],
        f"{prefix}pooled_prompt_embeds": text["text_pooled"][None],
        f"{prefix}prompt_attention_mask": text["text_mask"][None],
    }
