"""CogVideoX 1.0 and 1.5: CogVideoXTransformer3DModel with AutoencoderKLCogVideoX and T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..terminal import several
from .base import TrainingFamily
from .noise import NoisyLatents
from .sizes import ClipSize

# The VAE halves the frames twice, a first one apart; its decoder makes 1 + 8n frames of the 1 + 2n latents, and of an
# even number of latents more frames than they were made of.
FRAME_MULTIPLE = 8
OFFSET = 2.0  # what CogVideoXImageToVideoPipeline gives to transformers with an `ofs` embedding


class CogVideoXFamily(TrainingFamily):
    """v-prediction at the integer timesteps of the pipeline's scheduler; an image comes in channels of its own."""

    name = "cogvideox"
    text_widths: ClassVar = {"text": "text_embed_dim"}
    encodes_first_frame = True
    transformer_class = "CogVideoXTransformer3DModel"
    pipelines: ClassVar = {"text2video": "CogVideoXPipeline", "image2video": "CogVideoXImageToVideoPipeline"}

    def _check_task(self) -> None:
        super()._check_task()
        given, made = self.configs["transformer"]["in_channels"], self.configs["vae"]["latent_channels"]
        needed = made if self.task == "text2video" else 2 * made
        if given != needed:
            raise ValueError(
                f"task = {self.task}: the transformer of {self.model} takes {given} channels, {self.task} needs "
                f"{needed} (the VAE makes {made})"
            )
        predicted = self.configs["scheduler"].get("prediction_type")
        if predicted != "v_prediction":
            raise ValueError(f"{self.model}: prediction_type = {predicted} of the scheduler: must be v_prediction")

    def check_bucket(self, bucket: ClipSize) -> None:
        self._check_sides(bucket)
        self._check_frames(bucket, FRAME_MULTIPLE)
        config, pixels = self.configs["transformer"], self.compression[1]
        frames = config["sample_frames"]
        height, width = (config[f"sample_{side}"] * pixels for side in ("height", "width"))
        fits = (bucket.frames, bucket.height, bucket.width) == (frames, height, width)
        if config["use_learned_positional_embeddings"] and not fits:
            raise ValueError(
                f"{bucket.height}x{bucket.width} with {several(bucket.frames, 'frame')}: {self.model} has learned "
                f"positions for {height}x{width} with {frames} frames alone"
            )

    @property
    def text_limits(self) -> Mapping[str, int]:
        # Without a mask: the transformer was trained on as many tokens, however short the text is.
        return {"tokenizer": int(self.configs["transformer"]["max_text_seq_length"])}

    def encode_clip(self, vae: Any, pixels: Tensor, image_encoder: Any = None) -> dict[str, Tensor]:
        """`latents` (C, T, h, w), padded at the front to a multiple of the temporal patch by copies of the first frame;
        `image_latents` are as the pipeline scales them.
        """
        encoded = super().encode_clip(vae, pixels)
        latents = encoded["latents"]
        missing = -latents.shape[1] % (self.configs["transformer"]["patch_size_t"] or 1)
        encoded["latents"] = torch.cat([*[latents[:, :1]] * missing, latents], dim=1)
        if "image_latents" in encoded and vae.config.invert_scale_latents:
            # Some models were trained on an image that is scaled the other way round.
            encoded["image_latents"] /= vae.config.scaling_factor**2
        return encoded

    @cached_property
    def _scheduler(self) -> Any:
        import diffusers

        return getattr(diffusers, self.configs["pipeline"]["scheduler"][1]).from_config(self.configs["scheduler"])

    def noise_level(self, draw: Tensor, latent_shape: Sequence[int]) -> Tensor:
        """Uniform: (timestep + some fraction) / number of timesteps."""
        return torch.special.ndtr(draw)

    def noisy(self, batch: Mapping[str, Tensor], noise: Tensor, time: Tensor) -> NoisyLatents:
        steps = self._scheduler.config.num_train_timesteps
        timestep = (time * steps).long().clamp(max=steps - 1)
        latents = batch["latents"].float()
        return NoisyLatents(
            self._scheduler.add_noise(latents, noise, timestep),
            timestep,
            self._scheduler.get_velocity(latents, noise, timestep),
        )

    def predict(self, transformer: torch.nn.Module, noisy: NoisyLatents, batch: Mapping[str, Tensor]) -> Tensor:
        config = self.configs["transformer"]
        states = noisy.latents.transpose(1, 2)  # (B, T, C, h, w)
        positions = self._positions(tuple(states.shape), states.device)
        given: dict[str, Any] = {"image_rotary_emb": positions}
        if self.task == "image2video":
            image = batch["image_latents"].transpose(1, 2).to(states)
            rest = states.new_zeros(len(states), states.shape[1] - 1, *states.shape[2:])
            states = torch.cat([states, torch.cat([image, rest], dim=1)], dim=2)
        if config["ofs_embed_dim"] is not None:
            given["ofs"] = states.new_full((1,), OFFSET)
        prediction: Tensor = transformer(states, batch["text"], noisy.timestep, **given, return_dict=False)[0]
        return prediction.transpose(1, 2)

    def _positions(self, shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Rotary embeddings of latents (B, T, C, h, w), by the pipeline's own rule."""
        from diffusers import CogVideoXPipeline

        config = self.config("transformer")
        if not config.use_rotary_positional_embeddings:
            return None
        pixels = self.compression[1]
        known = SimpleNamespace(vae_scale_factor_spatial=pixels, transformer=SimpleNamespace(config=config))
        height, width = (size * pixels for size in shape[3:])
        rule: Any = CogVideoXPipeline._prepare_rotary_positional_embeddings
        cosines, sines = rule(known, height, width, shape[1], device)
        return cosines, sines
