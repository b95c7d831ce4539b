"""Tiny settings of the families of images, the calls that their pipelines make, and their VAEs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    Flux2Pipeline,
    FluxPipeline,
)
from tiny import CHANNELS, TEXT_DIM, VAE
from torch import Tensor

TEXT_TOKENS = 5
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": CHANNELS, "out_channels": CHANNELS}
# Squares of 2 x 2 latents are in the channels of a token.
_PACKED = {**_HEADS, "in_channels": 4 * CHANNELS, "out_channels": 4 * CHANNELS}
_TWO_LISTS = {"num_layers": 2, "num_single_layers": 2, "joint_attention_dim": TEXT_DIM}

FLUX = {**_PACKED, **_TWO_LISTS, "pooled_projection_dim": TEXT_DIM, "axes_dims_rope": (4, 6, 6)}
FLUX2 = {
    **_HEADS,
    **_TWO_LISTS,
    "timestep_guidance_channels": 16,
    "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": False,
}
SD3 = {
    **_HEADS,
    "sample_size": 32,
    "num_layers": 3,
    "joint_attention_dim": TEXT_DIM,
    "caption_projection_dim": 32,
    "pooled_projection_dim": TEXT_DIM,
    "pos_embed_max_size": 32,
    "dual_attention_layers": (0,),
}
QWEN = {
    **_PACKED,
    "out_channels": CHANNELS,
    "num_layers": 3,
    "joint_attention_dim": TEXT_DIM,
    "axes_dims_rope": (4, 6, 6),
}
CHROMA = {
    **_PACKED,
    **_TWO_LISTS,
    "axes_dims_rope": (4, 6, 6),
    "approximator_num_channels": 16,
    "approximator_hidden_dim": 16,
    "approximator_layers": 1,
}
SANA = {
    **_HEADS,
    "num_layers": 3,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": TEXT_DIM,
    "sample_size": 32,
    "patch_size": 1,
}
PIXART = {
    **_HEADS,
    "out_channels": 2 * CHANNELS,
    "num_layers": 3,
    "cross_attention_dim": 32,
    "sample_size": 32,
    "caption_channels": TEXT_DIM,
    "norm_num_groups": 4,
}


def _text(latents: Tensor, generator: torch.Generator) -> dict[str, Any]:
    batch = len(latents)
    return {
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "timestep": torch.rand(batch, generator=generator),
    }


def _pooled(latents: Tensor, generator: torch.Generator) -> dict[str, Any]:
    return {"pooled_projections": torch.randn(len(latents), TEXT_DIM, generator=generator)}


def _packed(latents: Tensor) -> Tensor:
    batch, channels, _, height, width = latents.shape
    return FluxPipeline._pack_latents(latents, batch, channels, height, width)


def chroma(latents: Tensor, generator: torch.Generator, model: Any) -> dict[str, Any]:
    height, width = latents.shape[3:]
    return {
        "hidden_states": _packed(latents),
        **_text(latents, generator),
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
    }


def flux(latents: Tensor, generator: torch.Generator, model: Any) -> dict[str, Any]:
    return {**chroma(latents, generator, model), **_pooled(latents, generator)}


def flux2(latents: Tensor, generator: torch.Generator, model: Any) -> dict[str, Any]:
    squares = latents[:, :, 0]
    text = _text(latents, generator)
    return {
        "hidden_states": Flux2Pipeline._pack_latents(squares),
        **text,
        "img_ids": Flux2Pipeline._prepare_latent_ids(squares),
        "txt_ids": Flux2Pipeline._prepare_text_ids(text["encoder_hidden_states"]),
    }


def sd3(latents: Tensor, generator: torch.Generator, model: Any) -> dict[str, Any]:
    return {"hidden_states": latents[:, :, 0], **_text(latents, generator), **_pooled(latents, generator)}


def qwen_image(latents: Tensor, generator: torch.Generator, model: Any) -> dict[str, Any]:
    batch, _, _, height, width = latents.shape
    mask = torch.ones(batch, TEXT_TOKENS, dtype=torch.int64)
    mask[:, -1] = 0
    return {
        "hidden_states": _packed(latents),
        **_text(latents, generator),
        "encoder_hidden_states_mask": mask,
        "img_shapes": [[(1, height // 2, width // 2)]] * batch,
    }


def plain(latents: Tensor, generator: torch.Generator, model: Any) -> dict[str, Any]:
    return {"hidden_states": latents[:, :, 0], **_text(latents, generator)}


def image_tokens(output: Any) -> Tensor:
    """Of what a block returns: the second of (text, image), or what comes after the text in one tensor."""
    return output[1] if isinstance(output, tuple) else output[:, TEXT_TOKENS:]


_BLOCKS = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
_DOWN, _UP = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
_KL = {**_BLOCKS, "latent_channels": CHANNELS, "down_block_types": _DOWN, "up_block_types": _UP}
_DC = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": (1, 1, 1, 1), "qkv_multiscales": ((), (), (), ())}
VAES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AutoencoderKL": (AutoencoderKL, {**_KL, "scaling_factor": 0.4, "shift_factor": 0.3}),
    # The transformer sees squares of 2 x 2 of its latents.
    "AutoencoderKLFlux2": (AutoencoderKLFlux2, {**_KL, "latent_channels": CHANNELS // 4}),
    "AutoencoderKLQwenImage": (
        AutoencoderKLQwenImage,
        {**VAE, "temperal_downsample": [False, True, True]},
    ),
    "AutoencoderDC": (
        AutoencoderDC,
        {
            "latent_channels": CHANNELS,
            "scaling_factor": 0.4,
            "attention_head_dim": 8,
            **{f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in _DC.items()},
        },
    ),
}
