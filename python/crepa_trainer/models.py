"""Model folders in the hub's layout: the demo's small random ones, and loading, encoding, LoRA for any."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

DEMO_TRANSFORMER = {
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "ffn_dim": 512,
    "num_layers": 6,
    "text_dim": 32,
    "rope_max_seq_len": 128,
}
DEMO_VAE = {"base_dim": 8, "z_dim": 16, "num_res_blocks": 1}
DEMO_TEACHER = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 14,
    "image_size": 518,
}


@dataclass(frozen=True)
class ModelFolders:
    """`wan`: a WanPipeline folder with transformer/ and vae/. `teacher`: a DINOv2 folder."""

    wan: Path
    teacher: Path


def save_demo_models(folder: Path, clips: Tensor, seed: int) -> ModelFolders:
    """Small Wan and DINOv2 with seeded random weights, in the folders that from_pretrained reads.

    clips: (n, P, 3, H, W) uint8, one of each video. The VAE's `latents_mean` and `latents_std` are measured
    on them, as those of a released VAE were on its training videos: the transformer must see latents of about unit
    variance.
    """
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import Dinov2Config, Dinov2Model

    folders = ModelFolders(folder / "wan", folder / "dinov2")
    # The caller's random state is none of ours.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(**DEMO_VAE).eval()
        _keep_the_signal(vae)
        transformer = WanTransformer3DModel(**DEMO_TRANSFORMER)
        teacher = Dinov2Model(Dinov2Config(**DEMO_TEACHER))
    raw = torch.cat([_encode(vae, clip[None]) for clip in clips])
    vae.register_to_config(latents_mean=raw.mean((0, 2, 3, 4)).tolist(), latents_std=raw.std((0, 2, 3, 4)).tolist())
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    # Not pipeline.save_pretrained, which warns of every component that is None.
    pipeline.save_config(folders.wan)
    for name in ("transformer", "vae", "scheduler"):
        getattr(pipeline, name).save_pretrained(folders.wan / name)
    teacher.save_pretrained(folders.teacher)
    return folders


def load_transformer(folder: Path) -> WanTransformer3DModel:
    """The transformer of a WanPipeline folder, frozen."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").requires_grad_(False)


def load_vae(folder: Path) -> AutoencoderKLWan:
    """The VAE of a WanPipeline folder, frozen."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(folder, subfolder="vae").requires_grad_(False).eval()


def add_lora(transformer: WanTransformer3DModel, rank: int) -> None:
    """A LoRA on every attention projection; it comes before CrepaRegularizer is attached."""
    from peft import LoraConfig

    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA_TARGETS)))


def save_lora(transformer: WanTransformer3DModel, folder: Path) -> Path:
    """`pytorch_lora_weights.safetensors` in `folder`, for WanPipeline.load_lora_weights."""
    from diffusers import WanPipeline
    from peft.utils import get_peft_model_state_dict

    WanPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(transformer))
    return folder / "pytorch_lora_weights.safetensors"


def encode_latents(vae: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    """Clips (n, P, 3, H, W) uint8 to latents (n, C, T, H/8, W/8), normalised as the transformer sees them."""
    mean, std = (
        torch.tensor(values, device=vae.device, dtype=vae.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return torch.cat([(_encode(vae, clip[None]) - mean) / std for clip in pixels])


def _keep_the_signal(vae: AutoencoderKLWan) -> None:
    """Kaiming weights and no biases in every convolution.

    PyTorch's own initialisation shrinks what passes by sqrt(3) a layer and adds random biases: after a whole encoder
    the latents hold the padding at the frame's border, and next to nothing of the video.
    """
    for layer in vae.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Conv3d):
            torch.nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)


@torch.no_grad()
def _encode(vae: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    video = pixels.to(vae.device, vae.dtype).transpose(1, 2) / 127.5 - 1  # (n, 3, P, H, W)
    return vae.encode(video).latent_dist.mode()
