"""Kandinsky 5: Kandinsky5Transformer3DModel with HunyuanVideo's VAE, Qwen2.5-VL and CLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from crepa_kernels.models.layouts import SPARSE_TILE

from .base import Text, TrainingFamily
from .noise import NoisyLatents
from .sizes import ClipSize
from .text_limits import CLIP_TOKENS, tokens

# The image-to-video pipeline moves the statistics of its first latent frames to those of the ones after them.
REPAIRED_FRAMES = 4


class Kandinsky5Family(TrainingFamily):
    """Latents (B, T, H, W, C), with the given frame and a mask beside them where the transformer has `visual_cond`."""

    name = "kandinsky5_video"
    transformer_class = "Kandinsky5Transformer3DModel"
    pipelines: ClassVar = {"text2video": "Kandinsky5T2VPipeline", "image2video": "Kandinsky5I2VPipeline"}
    text_parts: ClassVar = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    text_limits: ClassVar = {"tokenizer": 512, "tokenizer_2": CLIP_TOKENS}  # 512: the pipelines' default
    text_keys: ClassVar = {"text": "prompt_embeds_qwen", "pooled": "prompt_embeds_clip"}
    text_widths: ClassVar = {"text": "in_text_dim", "pooled": "in_text_dim2"}
    # A shorter prompt beside a longer one would be filled up with tokens that are attended to.
    one_prompt_at_a_time = True
    encodes_first_frame = True
    depth: ClassVar = ("num_visual_blocks",)
    pixel_multiple = 16
    original_names: ClassVar = {"*": "*"}  # diffusers has kept them
    # The whole names, as feed-forwards and the model itself have an out_layer too.
    lora_targets: ClassVar = (
        "to_query",
        "to_key",
        "to_value",
        "self_attention.out_layer",
        "cross_attention.out_layer",
    )

    def _check_task(self) -> None:
        super()._check_task()
        if self.task == "image2video" and not self.configs["transformer"]["visual_cond"]:
            raise ValueError(
                f"task = image2video: the transformer of {self.model} has no channels that say which frame is given "
                "(visual_cond)"
            )

    @property
    def token_square(self) -> int:
        return SPARSE_TILE if self.configs["transformer"]["attention_type"] == "nabla" else 1

    def check_run(self, batch_size: int, device_type: str) -> None:
        if batch_size > 1:
            raise ValueError(
                f"batch_size = {batch_size}: {self.name} has no mask for texts of different lengths, so a "
                "forward takes one clip: set batch_size to 1 and gradient_accumulation_steps to as many"
            )
        if self.token_square > 1 and device_type == "cpu":
            raise ValueError(
                f"{self.model} attends sparsely (attention_type = nabla), which has no backward on a CPU: train it on "
                "a GPU"
            )

    def dense(self) -> TrainingFamily:
        transformer = {**self.configs["transformer"], "attention_type": "regular"}
        return type(self)(self.model, self.task, {**self.configs, "transformer": transformer}, self.expert)

    def check_bucket(self, bucket: ClipSize) -> None:
        super().check_bucket(bucket)
        least = 1 + self.compression[0] * REPAIRED_FRAMES
        if self.task == "image2video" and bucket.frames < least:
            raise ValueError(
                f"frame count {bucket.frames}: the image-to-video pipeline makes clips of {least} frames or more"
            )

    def prompt_options(self, prompts: Sequence[str]) -> dict[str, Any]:
        return {"max_sequence_length": self.text_limits["tokenizer"]}

    def token_count(self, tokenizer: Any, part: str, prompt: str) -> int:
        if part != "tokenizer":
            return super().token_count(tokenizer, part, prompt)
        from diffusers import Kandinsky5T2VPipeline

        pipeline = Kandinsky5T2VPipeline(*[None] * 7)
        instructed = pipeline.prompt_template.format(prompt)
        return tokens(tokenizer, instructed) - pipeline.prompt_template_encode_start_idx

    def predict(self, transformer: torch.nn.Module, noisy: NoisyLatents, batch: Mapping[str, Tensor]) -> Tensor:
        states = noisy.latents.permute(0, 2, 3, 4, 1)  # (B, T, h, w, C)
        device, pixels = states.device, self.compression[1]
        if self.configs["transformer"]["visual_cond"]:
            mask = states.new_zeros(*states.shape[:-1], 1)
            if self.task == "image2video":
                mask[:, 0] = 1
            states = torch.cat([states, torch.zeros_like(states), mask], dim=-1)
        _, tall, wide = self.configs["transformer"]["patch_size"]
        _, frames, height, width, _ = states.shape
        prediction: Tensor = transformer(
            hidden_states=states,
            encoder_hidden_states=batch["text"],
            pooled_projections=batch["pooled"],
            timestep=noisy.timestep,
            visual_rope_pos=[torch.arange(n, device=device) for n in (frames, height // tall, width // wide)],
            text_rope_pos=torch.arange(batch["text"].shape[1], device=device),
            scale_factor=self._scale_factor(height * pixels, width * pixels),
            sparse_params=self._sparse_parameters(states),
            return_dict=False,
        )
        return prediction.permute(0, 4, 1, 2, 3)

    def _scale_factor(self, height: int, width: int) -> tuple[float, float, float]:
        """Of the positions, by the pipeline's own rule."""
        from diffusers import Kandinsky5T2VPipeline

        rule: Any = Kandinsky5T2VPipeline._get_scale_factor
        factors: tuple[float, float, float] = rule(None, height, width)
        return factors

    def _sparse_parameters(self, states: Tensor) -> dict[str, Any] | None:
        """By the pipeline's own rule; None for dense attention."""
        from diffusers import Kandinsky5T2VPipeline

        transformer = SimpleNamespace(config=self.config("transformer"))
        known = SimpleNamespace(transformer=transformer, fast_sta_nabla=Kandinsky5T2VPipeline.fast_sta_nabla)
        rule: Any = Kandinsky5T2VPipeline.get_sparse_params
        parameters: dict[str, Any] | None = rule(known, states, states.device)
        return parameters

    def text_arguments(self, text: Text, negative: Text | None) -> dict[str, Any]:
        arguments = super().text_arguments(text, negative)
        for prefix, each in (("", text), ("negative_", negative)):
            if each is not None:
                arguments[f"{prefix}prompt_cu_seqlens"] = torch.tensor([0, len(each["text"])], dtype=torch.int32)
        return arguments
