"""HunyuanVideo: HunyuanVideoTransformer3DModel with AutoencoderKLHunyuanVideo, Llama or LLaVA, and CLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .base import Text, TrainingFamily, picture
from .folder import has_part
from .noise import NoisyLatents
from .text_limits import CLIP_TOKENS, tokens

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# At which a guidance-distilled model is trained: 1 asks for the data's own distribution, and larger scales of the
# samples go on meaning what they meant.
TRAINED_GUIDANCE = 1.0
# Every how manieth of the image's tokens the image-to-video pipeline's call keeps of the text encoder's, by
# `image_condition_type`; of a negative prompt it keeps every second one with both.
KEPT_IMAGE_TOKENS = {"latent_concat": 2, "token_replace": 4}
IMAGE_MARK = "<image>"  # for which LLaVA reads an image, once in the image-to-video pipeline's instruction


_DOUBLE, _SINGLE = "transformer_blocks.*.", "single_transformer_blocks.*."
_REFINER = "context_embedder.token_refiner.refiner_blocks.*."
# As in diffusers' own conversion of HunyuanVideo's checkpoints. The last layer's modulation is not here: there its
# halves are the other way round.
ORIGINAL_NAMES = {
    **{f"{_DOUBLE}attn.to_{part}": "double_blocks.*.img_attn_qkv" for part in "qkv"},
    **{f"{_DOUBLE}attn.add_{part}_proj": "double_blocks.*.txt_attn_qkv" for part in "qkv"},
    f"{_DOUBLE}attn.to_out.0": "double_blocks.*.img_attn_proj",
    f"{_DOUBLE}attn.to_add_out": "double_blocks.*.txt_attn_proj",
    f"{_DOUBLE}ff.net.0.proj": "double_blocks.*.img_mlp.fc1",
    f"{_DOUBLE}ff.net.2": "double_blocks.*.img_mlp.fc2",
    f"{_DOUBLE}ff_context.net.0.proj": "double_blocks.*.txt_mlp.fc1",
    f"{_DOUBLE}ff_context.net.2": "double_blocks.*.txt_mlp.fc2",
    f"{_DOUBLE}norm1.linear": "double_blocks.*.img_mod.linear",
    f"{_DOUBLE}norm1_context.linear": "double_blocks.*.txt_mod.linear",
    **{f"{_SINGLE}attn.to_{part}": "single_blocks.*.linear1" for part in "qkv"},
    f"{_SINGLE}proj_mlp": "single_blocks.*.linear1",
    f"{_SINGLE}proj_out": "single_blocks.*.linear2",
    f"{_SINGLE}norm.linear": "single_blocks.*.modulation.linear",
    **{f"{_REFINER}attn.to_{part}": "txt_in.individual_token_refiner.blocks.*.self_attn_qkv" for part in "qkv"},
    f"{_REFINER}attn.to_out.0": "txt_in.individual_token_refiner.blocks.*.self_attn_proj",
    f"{_REFINER}ff.net.0.proj": "txt_in.individual_token_refiner.blocks.*.mlp.fc1",
    f"{_REFINER}ff.net.2": "txt_in.individual_token_refiner.blocks.*.mlp.fc2",
    f"{_REFINER}norm_out.linear": "txt_in.individual_token_refiner.blocks.*.adaLN_modulation.1",
    "context_embedder.proj_in": "txt_in.input_embedder",
    "context_embedder.time_text_embed.timestep_embedder.linear_1": "txt_in.t_embedder.mlp.0",
    "context_embedder.time_text_embed.timestep_embedder.linear_2": "txt_in.t_embedder.mlp.2",
    "context_embedder.time_text_embed.text_embedder.*": "txt_in.c_embedder.*",
    "time_text_embed.timestep_embedder.linear_1": "time_in.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "time_in.mlp.2",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.mlp.0",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.mlp.2",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "x_embedder.proj": "img_in.proj",
    "proj_out": "final_layer.linear",
}


class HunyuanVideoFamily(TrainingFamily):
    """Text to video; image to video by channels ("latent_concat") or a clean first frame ("token_replace").

    For image to video the text encoder reads the clip's first frame together with the caption.
    """

    name = "hunyuan_video"
    transformer_class = "HunyuanVideoTransformer3DModel"
    text_parts = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    original_names: ClassVar = ORIGINAL_NAMES
    text_limits: ClassVar = {"tokenizer": 256, "tokenizer_2": CLIP_TOKENS}  # 256: the pipelines' default
    text_keys: ClassVar = {
        "text": "prompt_embeds",
        "text_pooled": "pooled_prompt_embeds",
        "text_mask": "prompt_attention_mask",
    }
    text_widths: ClassVar = {"text": "text_embed_dim", "text_pooled": "pooled_projection_dim"}
    encodes_first_frame = True
    depth = ("num_layers", "num_single_layers")
    pixel_multiple = 16
    pipelines: ClassVar = {"text2video": "HunyuanVideoPipeline", "image2video": "HunyuanVideoImageToVideoPipeline"}

    def _check_task(self) -> None:
        super()._check_task()
        condition = self._condition
        if self.task == "text2video" and condition is not None:
            raise ValueError(
                f"task = text2video: {self.model} is an image-to-video model (image_condition_type = {condition})"
            )
        if self.task == "image2video" and condition not in KEPT_IMAGE_TOKENS:
            raise ValueError(
                f"task = image2video: {self.model} is a text-to-video model (image_condition_type = {condition}, not "
                f"{' or '.join(KEPT_IMAGE_TOKENS)})"
            )
        given, made = self.configs["transformer"]["in_channels"], self.configs["vae"]["latent_channels"]
        # Beside the noisy latents the image's and a mask of its frames.
        needed = 2 * made + 1 if condition == "latent_concat" else made
        if given != needed:
            raise ValueError(
                f"{self.model}: the transformer takes {given} channels, {self.task} with image_condition_type = "
                f"{condition} needs {needed} (the VAE makes {made})"
            )
        lacking = [part for part in self.text_image_parts if not has_part(self.model, self.configs["pipeline"], part)]
        if lacking:
            raise ValueError(
                f"{self.model} lacks {', '.join(lacking)}, which makes the text encoder's image of the first frame"
            )

    @property
    def _condition(self) -> str | None:
        condition: str | None = self.configs["transformer"]["image_condition_type"]
        return condition

    @property
    def text_image_parts(self) -> tuple[str, ...]:
        return () if self.task == "text2video" else ("image_processor",)

    @property
    def text_image_options(self) -> dict[str, Any]:
        kept = KEPT_IMAGE_TOKENS.get(str(self._condition))
        return {} if kept is None else {"image_embed_interleave": kept}

    def load_text(self, dtype: torch.dtype) -> DiffusionPipeline:
        loaded = super().load_text(dtype)
        if self.task == "text2video":
            return loaded
        from transformers import CLIPImageProcessor

        parts = {part: getattr(loaded, part) for part in self.text_parts}
        parts["image_processor"] = CLIPImageProcessor.from_pretrained(self.model, subfolder="image_processor")
        return self._bare_pipeline(self.task, parts)

    def check_prompt(self, prompt: str) -> None:
        if self.text_image_parts and IMAGE_MARK in prompt:
            raise ValueError(f"the text encoder reads the first frame at {IMAGE_MARK}, which a text must not contain")

    @torch.no_grad()
    def encode_text(self, parts: Any, prompts: Sequence[str]) -> list[Text]:
        """`text` (L, d) with `text_mask` (L,), and `text_pooled` (d,) of CLIP; for image to video as negative prompts,
        which the pipeline encodes with a black image and without the options of its other prompts.
        """
        if self.task == "text2video":
            return super().encode_text(parts, prompts)
        black = picture(torch.zeros(3, 16, 16, dtype=torch.uint8))
        options = self.prompt_options(prompts)
        return [self._texts(parts.encode_prompt(black, [prompt], **options))[0] for prompt in prompts]

    def prompt_options(self, prompts: Sequence[str]) -> dict[str, Any]:
        return {"max_sequence_length": self.text_limits["tokenizer"]}

    def token_count(self, tokenizer: Any, part: str, prompt: str) -> int:
        if part != "tokenizer":
            return super().token_count(tokenizer, part, prompt)
        if self.task == "text2video":
            from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE as instruction
        else:
            from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import (
                DEFAULT_PROMPT_TEMPLATE as instruction,
            )
        return tokens(tokenizer, instruction["template"].format(prompt)) - instruction["crop_start"]

    @torch.no_grad()
    def encode_text_of_clip(self, parts: Any, prompt: str, first_frame: Tensor) -> Text:
        """As `encode_text`; for image to video `text` begins with what the text encoder makes of the first frame."""
        if self.task == "text2video":
            return super().encode_text_of_clip(parts, prompt, first_frame)
        options = {**self.prompt_options([prompt]), **self.text_image_options}
        return self._texts(parts.encode_prompt(picture(first_frame), [prompt], **options))[0]

    def encode_clip(self, vae: Any, pixels: Tensor, image_encoder: Any = None) -> dict[str, Tensor]:
        encoded = super().encode_clip(vae, pixels)
        return encoded if self.task == "text2video" else {**encoded, "first_frame": pixels[0]}

    def predict(self, transformer: torch.nn.Module, noisy: NoisyLatents, batch: Mapping[str, Tensor]) -> Tensor:
        states, guidance = noisy.latents, None
        if self._condition == "latent_concat":
            image, mask = torch.zeros_like(states), torch.zeros_like(states[:, :1])
            image[:, :, :1] = batch["image_latents"]
            mask[:, :, 0] = 1
            states = torch.cat([states, image, mask], dim=1)
        if self.task == "text2video" or self.configs["transformer"]["guidance_embeds"]:
            guidance = noisy.timestep.new_full((len(states),), 1000 * TRAINED_GUIDANCE)
        prediction: Tensor = transformer(
            hidden_states=states,
            timestep=noisy.timestep,
            encoder_hidden_states=batch["text"],
            encoder_attention_mask=batch["text_mask"].to(states.dtype),
            pooled_projections=batch["text_pooled"],
            guidance=guidance,
            return_dict=False,
        )[0]
        return prediction

    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        # A model that is not distilled ignores the embedded scale.
        key = "guidance_scale" if self.config("transformer").guidance_embeds else "true_cfg_scale"
        return {key: guidance}

    def first_frame(self, vae: torch.nn.Module, clip: Mapping[str, Tensor]) -> Tensor:
        # With which the text was encoded too.
        return clip["first_frame"] / 255 if self.task == "image2video" else super().first_frame(vae, clip)

    def image_argument(self, image: Tensor) -> Any:
        return picture((image * 255).round().byte())

    def original_rows(self, layer: str) -> int:
        config = self.configs["transformer"]
        width = int(config["num_attention_heads"] * config["attention_head_dim"])
        return int(width * config["mlp_ratio"]) if layer.endswith("proj_mlp") else width
