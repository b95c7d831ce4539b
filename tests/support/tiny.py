"""Tiny real models with seeded random weights, saved in the hub's folder layout and loaded back."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from crepa_kernels import CrepaRegularizer

# Operations on models this small lose more time to handing work around than they gain.
torch.set_num_threads(1)

CHANNELS = 4  # of the latents
TEXT_DIM = 8
SPATIAL, TEMPORAL = 8, 4  # pixels and frames of one latent

WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": TEXT_DIM,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
    "rope_max_seq_len": 64,
}
VAE: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": CHANNELS,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "latents_mean": [0.3, -0.2, 0.1, 0.5],
    "latents_std": [1.5, 0.8, 2.0, 1.2],
}
DINOV2: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "image_size": 70,
    "patch_size": 14,
}


class Mold:
    """Copies of a model as `copy.deepcopy` makes them, in a fifth of the time: all but its tensors is pickled once."""

    def __init__(self, model: torch.nn.Module) -> None:
        found: dict[int, tuple[int, torch.Tensor]] = {}  # by identity: a tensor that modules share stays one

        class Pickler(pickle.Pickler):
            def persistent_id(self, part: object) -> int | None:
                if not isinstance(part, torch.Tensor):
                    return None
                return found.setdefault(id(part), (len(found), part))[0]

        written = io.BytesIO()
        Pickler(written, pickle.HIGHEST_PROTOCOL).dump(model)
        self._pickled = written.getvalue()
        self._tensors = [tensor for _, tensor in found.values()]

    def copy(self) -> Any:
        tensors = copy.deepcopy(self._tensors)

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, place: int) -> torch.Tensor:
                return tensors[place]

        return Unpickler(io.BytesIO(self._pickled)).load()


_LOADED: dict[str, Mold] = {}


def reloaded(build: Callable[[], Any], seed: int, folder: Path | None, key: str) -> Any:
    """A model with weights of ``seed``, saved and loaded back; without a folder once for each key, then copied."""
    if folder is None and key in _LOADED:
        return _LOADED[key].copy()
    with torch.random.fork_rng(devices=[]), TemporaryDirectory() as temporary:
        torch.manual_seed(seed)
        model = build()
        model.save_pretrained(folder or temporary)
        loaded = type(model).from_pretrained(folder or temporary)
    # A copy, so that its weights are aligned in memory as every other tensor's and products round alike.
    if folder is not None:
        return copy.deepcopy(loaded)
    _LOADED[key] = Mold(loaded)
    return _LOADED[key].copy()


def tiny_wan(folder: Path | None = None, *, seed: int = 0, **overrides: Any) -> WanTransformer3DModel:
    """A Wan transformer in train mode: width 32, 3 blocks, patch (1, 2, 2); saved to ``folder`` when it is given."""
    build = partial(WanTransformer3DModel, **{**WAN, **overrides})
    return reloaded(build, seed, folder, f"wan {seed} {overrides}").train()


def tiny_vae(folder: Path | None = None, *, seed: int = 1, **overrides: Any) -> AutoencoderKLWan:
    """A Wan VAE: 4 latent channels with their own mean and std, 8 times smaller in space and 4 times in time."""
    return reloaded(partial(AutoencoderKLWan, **{**VAE, **overrides}), seed, folder, f"vae {seed} {overrides}")


def tiny_dinov2(
    folder: Path | None = None, *, seed: int = 2, registers: int = 0, **overrides: Any
) -> Dinov2Model | Dinov2WithRegistersModel:
    """A DINOv2 of width 32 with patches of 14 pixels, with register tokens where ``registers`` > 0."""
    settings = {**DINOV2, **overrides}
    if registers:
        config = Dinov2WithRegistersConfig(**settings, num_register_tokens=registers)
        build = partial(Dinov2WithRegistersModel, config)
    else:
        build = partial(Dinov2Model, Dinov2Config(**settings))
    return reloaded(build, seed, folder, f"dinov2 {seed} {registers} {overrides}")


def tiny_pipeline(
    folder: Path, transformer: WanTransformer3DModel | None = None, vae: AutoencoderKLWan | None = None
) -> WanPipeline:
    """A stock Wan pipeline without its text side, saved to ``folder`` as the hub lays it out, and loaded back."""
    WanPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=tiny_wan() if transformer is None else transformer,
        vae=tiny_vae() if vae is None else vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return WanPipeline.from_pretrained(folder, tokenizer=None, text_encoder=None)


def is_captured(crepa: CrepaRegularizer) -> bool:
    """Whether the last forward's hidden states are held."""
    try:
        crepa.captured()
    except ValueError:
        return False
    return True


def pixel_frames(latent_frames: int) -> int:
    """P of a clip of T latent frames."""
    return 1 + TEMPORAL * (latent_frames - 1)


def wan_inputs(
    batch: int = 1, frames: int = 3, height: int = 4, width: int = 6, *, seed: int = 3
) -> dict[str, torch.Tensor]:
    """Arguments of a transformer forward: noisy latents (B, 4, T, height, width), timestep, text (B, 5, 8)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, CHANNELS, frames, height, width, generator=generator),
        "timestep": torch.randint(1, 1000, (batch,), generator=generator),
        "encoder_hidden_states": torch.randn(batch, 5, TEXT_DIM, generator=generator),
    }


def clip_pixels(batch: int = 1, frames: int = 9, height: int = 32, width: int = 48, *, seed: int = 4) -> torch.Tensor:
    """Random uint8 pixels (B, P, 3, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, frames, 3, height, width), generator=generator, dtype=torch.uint8)
