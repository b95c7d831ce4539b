"""The demo's own small model with random weights, in the hub's layout, which the trainer loads as any other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crepa_kernels.models.vaes import encode

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

TEXT_WIDTH = 32
TRANSFORMER = {
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "ffn_dim": 512,
    "num_layers": 6,
    "text_dim": TEXT_WIDTH,
    "rope_max_seq_len": 128,
}
LATENT_CHANNELS = 16
VAE = {"base_dim": 8, "z_dim": LATENT_CHANNELS, "num_res_blocks": 1}
TEXT_ENCODER = {"d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}


def save_demo_model(folder: Path, clips: Sequence[Tensor], seed: int) -> None:
    """A small WanPipeline with seeded random weights, in the folder that from_pretrained reads.

    clips: (P, 3, H, W) uint8, one of each video. The VAE's `latents_mean` and `latents_std` are measured on them, as
    those of a released VAE were on its training videos: the transformer must see latents of about unit variance.
    """
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

    tokenizer = ByT5Tokenizer()  # of bytes: it has no files of words
    unit = {"latents_mean": [0.0] * LATENT_CHANNELS, "latents_std": [1.0] * LATENT_CHANNELS}
    # The caller's random state is none of ours.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(**VAE, **unit).eval()
        _keep_the_signal(vae)
        transformer = WanTransformer3DModel(**TRANSFORMER)
        text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **TEXT_ENCODER))
    if clips:
        with torch.no_grad():
            latents = torch.cat([encode(vae, clip[None], None) for clip in clips])
        means, deviations = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
        vae.register_to_config(latents_mean=means.tolist(), latents_std=deviations.tolist())
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)


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
