"""Tiny UNets of the configurations that U-REPA meets, their VAE, and calls as their pipelines make them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny import CHANNELS, reloaded

WIDTH, TEXT = 16, 8
_COMMON: dict[str, Any] = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT,
    "sample_size": 16,
}
_POOLED = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "use_linear_projection": True}
_XL: dict[str, Any] = {
    **_COMMON,
    **_POOLED,
    "block_out_channels": (8, 8, WIDTH),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 2, 4),
    "projection_class_embeddings_input_dim": 6 * 4 + TEXT,
}
UNETS: dict[str, dict[str, Any]] = {
    "sdxl": _XL,
    "sd15": {
        **_COMMON,
        "block_out_channels": (8, WIDTH),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
    },
    # Of ChatGLM's width, which a Linear brings to that of the attention.
    "kolors": {**_XL, "encoder_hid_dim": 12, "encoder_hid_dim_type": "text_proj"},
}
VAE: dict[str, Any] = {
    "block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": CHANNELS,
    "norm_num_groups": 4,
    "sample_size": 32,
}


def tiny_unet(name: str = "sdxl", *, seed: int = 0, **overrides: Any) -> UNet2DConditionModel:
    """A UNet in train mode whose middle has 16 channels, on a quarter of a side of the latents (SD 1.5: half)."""
    build = partial(UNet2DConditionModel, **{**UNETS[name], **overrides})
    return reloaded(build, seed, None, f"unet {name} {seed} {overrides}").train()


def tiny_kl(**overrides: Any) -> AutoencoderKL:
    """Its VAE, 2 times smaller in space."""
    return reloaded(partial(AutoencoderKL, **{**VAE, **overrides}), 1, None, f"kl {overrides}")


def unet_inputs(
    name: str = "sdxl", batch: int = 2, size: tuple[int, int] = (16, 16), *, seed: int = 0
) -> dict[str, Any]:
    """Arguments of a forward on latents of ``size``."""
    generator = torch.Generator().manual_seed(seed)
    width = UNETS[name].get("encoder_hid_dim") or TEXT
    given: dict[str, Any] = {
        "sample": torch.randn(batch, CHANNELS, *size, generator=generator),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 5, width, generator=generator),
    }
    if name != "sd15":
        pooled = torch.randn(batch, TEXT, generator=generator)
        given["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.ones(batch, 6)}
    return given
