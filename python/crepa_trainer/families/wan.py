"""Wan 2.1 and 2.2: WanTransformer3DModel with AutoencoderKLWan and UMT5, and for some an image encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from crepa_kernels.models.vaes import normalized

from .base import TrainingFamily, picture
from .folder import has_part, read_config
from .noise import NoisyLatents, scheduler_shift, shifted
from .sizes import ClipSize
from .text_limits import tokens

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# As in diffusers' own conversion of Wan's checkpoints.
ORIGINAL_NAMES = {
    **{
        f"blocks.*.{ours}.{layer}": f"blocks.*.{theirs}.{name}"
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for layer, name in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
    },
    "blocks.*.attn2.add_k_proj": "blocks.*.cross_attn.k_img",
    "blocks.*.attn2.add_v_proj": "blocks.*.cross_attn.v_img",
    "blocks.*.ffn.net.0.proj": "blocks.*.ffn.0",
    "blocks.*.ffn.net.2": "blocks.*.ffn.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "patch_embedding": "patch_embedding",
    "proj_out": "head.head",
}
EXPERTS = {"high": "transformer", "low": "transformer_2"}


class WanFamily(TrainingFamily):
    """Text to video; image to video by a first latent frame without noise (`expand_timesteps`, 2.2 5B) or by channels.

    Of two transformers (2.2 A14B) the one of `expert` is trained, at the noise levels at which the pipeline uses it.
    """

    name = "wan"
    transformer_class = "WanTransformer3DModel"
    text_widths: ClassVar = {"text": "text_dim"}
    pixel_multiple = 16
    original_names: ClassVar = ORIGINAL_NAMES
    shares_tokens = True
    text_limits: ClassVar = {"tokenizer": 512}  # WanPipeline's default max_sequence_length
    pipelines: ClassVar = {"text2video": "WanPipeline", "image2video": "WanImageToVideoPipeline"}

    def _check_task(self) -> None:
        super()._check_task()
        index, transformer, made = self.configs["pipeline"], self.configs["transformer"], self.configs["vae"]["z_dim"]
        given = transformer["in_channels"]
        beside = made + self.compression[0]  # the image's latents and a mask of its frames
        if given not in (made, made + beside):
            raise ValueError(
                f"{self.model}: the transformer takes {given} channels and the VAE makes {made}: supported are {made} "
                f"and, with an image by channels, {made + beside}"
            )
        if self.task == "text2video" and self._by_channels:
            raise ValueError(f"task = text2video: {self.model} is an image-to-video model ({given} channels)")
        if self.task == "image2video" and not (self._by_channels or index.get("expand_timesteps")):
            raise ValueError(
                f"task = image2video: {self.model} is a text-to-video model (no expand_timesteps, and no channels for "
                "an image)"
            )
        if transformer["pos_embed_seq_len"] is not None:
            raise ValueError(f"{self.model} wants a first and a last frame (pos_embed_seq_len): not supported")
        lacking = [part for part in self.image_parts if not has_part(self.model, index, part)]
        if lacking:
            raise ValueError(f"{self.model} lacks {', '.join(lacking)}, whose image embeddings the transformer takes")
        if self.expert is not None and index.get("boundary_ratio") is None:
            raise ValueError(f"{self.model} has two transformers and no boundary_ratio in its model_index.json")

    @classmethod
    def part_of_expert(cls, model: str, index: Mapping[str, Any], expert: str | None) -> str:
        if (index.get("transformer_2") or [None, None])[1] is None:
            return super().part_of_expert(model, index, expert)
        if expert not in EXPERTS:
            raise ValueError(
                f"{model} has two transformers, of which one is trained: set expert to high (transformer, noise levels "
                f"from boundary_ratio = {index.get('boundary_ratio')} on) or low (transformer_2, those below)"
            )
        return EXPERTS[expert]

    @property
    def _by_channels(self) -> bool:
        return bool(self.configs["transformer"]["in_channels"] != self.configs["vae"]["z_dim"])

    @property
    def image_parts(self) -> tuple[str, ...]:
        return () if self.configs["transformer"]["image_dim"] is None else ("image_encoder", "image_processor")

    def token_count(self, tokenizer: Any, part: str, prompt: str) -> int:
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        return tokens(tokenizer, prompt_clean(prompt))

    @property
    def of_image_encoder(self) -> frozenset[str]:
        return frozenset({"image_embeds"})

    def load_image_encoder(self) -> DiffusionPipeline | None:
        return self._bare_pipeline("image2video", self._image_models()) if self.image_parts else None

    def _image_models(self) -> dict[str, Any]:
        from transformers import CLIPImageProcessor, CLIPVisionModel

        encoder = CLIPVisionModel.from_pretrained(self.model, subfolder="image_encoder", dtype=torch.float32)
        return {
            "image_encoder": encoder.requires_grad_(False).eval(),
            "image_processor": CLIPImageProcessor.from_pretrained(self.model, subfolder="image_processor"),
        }

    @torch.no_grad()
    def encode_clip(self, vae: Any, pixels: Tensor, image_encoder: Any = None) -> dict[str, Tensor]:
        """`latents` (C, T, h, w); for an image by channels also `condition` (4 + C, T, h, w), the mask of its frames
        and the latents of a clip that is grey after it, and `image_embeds` (L, d) where there is an image encoder.
        """
        encoded = super().encode_clip(vae, pixels)
        if not self._by_channels:
            return encoded
        video = pixels[None].to(vae.device).to(vae.dtype).transpose(1, 2) / 127.5 - 1  # (1, 3, P, H, W)
        video[:, :, 1:] = 0
        image = normalized(vae, vae.encode(video).latent_dist.mode())[0]
        mask = image.new_zeros(self.compression[0], *image.shape[1:])
        mask[:, 0] = 1
        encoded["condition"] = torch.cat([mask, image])
        if image_encoder is not None:
            encoded["image_embeds"] = image_encoder.encode_image(picture(pixels[0]))[0]
        return encoded

    def blank_clip(self, bucket: ClipSize) -> dict[str, Tensor]:
        blank = super().blank_clip(bucket)
        if self._by_channels:
            blank["condition"] = torch.zeros(self.compression[0] + len(blank["latents"]), *blank["latents"].shape[1:])
        if self.image_parts:
            config = read_config(self.model, "image_encoder")
            tokens_of_image = (config["image_size"] // config["patch_size"]) ** 2 + 1
            blank["image_embeds"] = torch.zeros(tokens_of_image, self.configs["transformer"]["image_dim"])
        return blank

    def noise_level(self, draw: Tensor, latent_shape: Sequence[int]) -> Tensor:
        """As for one transformer; of two, by the share of these levels that the expert's side of the boundary has."""
        if self.expert is None:
            return super().noise_level(draw, latent_shape)
        shift, boundary = scheduler_shift(self.configs["scheduler"]), float(self.configs["pipeline"]["boundary_ratio"])
        inverse = shifted(torch.tensor(boundary, dtype=torch.float64), 1 / shift)
        below = torch.special.ndtr(inverse.logit())  # share of the draws that give a level below the boundary
        share = torch.special.ndtr(draw.double())
        share = below + (1 - below) * share if self.expert == "high" else below * share
        level = shifted(torch.special.ndtri(share).sigmoid(), shift).float()
        # The pipeline compares timesteps, 1000 times as large, with the boundary; rounding must not cross it.
        if self.expert == "high":
            return level.clamp(min=boundary)
        return level.clamp(max=boundary - torch.finfo(torch.float32).eps)

    def predict(self, transformer: torch.nn.Module, noisy: NoisyLatents, batch: Mapping[str, Tensor]) -> Tensor:
        states = noisy.latents
        if self._by_channels:
            states = torch.cat([states, batch["condition"].to(states)], dim=1)
        prediction: Tensor = transformer(
            states, noisy.timestep, batch["text"], batch.get("image_embeds"), return_dict=False
        )[0]
        return prediction

    def _pipeline_models(self, transformer: torch.nn.Module, vae: torch.nn.Module) -> dict[str, Any]:
        models = super()._pipeline_models(transformer, vae)
        if self.task == "image2video" and self.image_parts:
            models |= self._image_models()
            models["image_encoder"].to(vae.device)
        if self.expert is None:
            return models
        trained: Any = transformer
        models[self.transformer_part] = trained
        (other,) = set(EXPERTS.values()) - {self.transformer_part}
        models[other] = self._load(other, trained.dtype, **self._loading).eval()
        if self._place is None:
            models[other].to(trained.device)
        else:
            self._place(models[other])
        return models

    def _pipeline_settings(self) -> dict[str, Any]:
        index = self.configs["pipeline"]
        return {key: index[key] for key in ("expand_timesteps", "boundary_ratio") if index.get(key) is not None}

    def image_argument(self, image: Tensor) -> Any:
        # The image encoder's processor takes numbers from 0 to 255.
        return picture((image * 255).round().byte()) if self.image_parts else super().image_argument(image)
