"""Every family's latents to pixels: what its own pipeline shows for the same latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    Kandinsky5T2VPipeline,
    LTXPipeline,
    SanaVideoPipeline,
    WanPipeline,
)
from tiny import CHANNELS, TEXT_DIM
from tiny_families import FAMILIES, TEXT_TOKENS, tiny_vaes

from crepa_kernels.families import family_of
from crepa_kernels.teachers.latents import LatentDecoder

CPU = torch.device("cpu")
NO_TEXT = {"tokenizer": None, "text_encoder": None}
NO_TEXTS = {**NO_TEXT, "tokenizer_2": None, "text_encoder_2": None}


def clean_latents(batch: int, frames: int, height: int = 4, width: int = 6) -> torch.Tensor:
    shape = (batch, CHANNELS, frames, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def as_stored(pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, T, H, W) as this pipeline keeps them while it denoises."""
    if isinstance(pipeline, LTXPipeline):
        return pipeline._pack_latents(latents)
    if isinstance(pipeline, Kandinsky5T2VPipeline):
        return latents.permute(0, 2, 3, 4, 1).clone()
    return latents.transpose(1, 2) if isinstance(pipeline, CogVideoXPipeline) else latents


def pipeline_pixels(pipeline: Any, latents: torch.Tensor, pixels: tuple[int, int, int], **options: Any) -> torch.Tensor:
    """What a pipeline shows after one step of denoising, whose result is replaced by ``latents``."""
    batch, (frames, height, width) = len(latents), pixels
    text = torch.zeros(batch, TEXT_TOKENS, TEXT_DIM)
    mask = torch.ones(batch, TEXT_TOKENS, dtype=torch.int64)
    arguments: dict[str, Any] = {"prompt_embeds": text, "num_frames": frames, "guidance_scale": 1.0}
    if isinstance(pipeline, LTXPipeline | SanaVideoPipeline | HunyuanVideoPipeline):
        arguments["prompt_attention_mask"] = mask
    if isinstance(pipeline, HunyuanVideoPipeline):
        arguments["pooled_prompt_embeds"] = text[:, 0]
    if isinstance(pipeline, SanaVideoPipeline):
        arguments["frames"] = arguments.pop("num_frames")
        arguments["use_resolution_binning"] = False
    if isinstance(pipeline, Kandinsky5T2VPipeline):
        arguments["prompt_embeds_qwen"] = arguments.pop("prompt_embeds")
        arguments["prompt_embeds_clip"] = text[:, 0]
        arguments["prompt_cu_seqlens"] = torch.arange(batch + 1) * TEXT_TOKENS
    stored = as_stored(pipeline, latents)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        **arguments,
        **options,
        height=height,
        width=width,
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=lambda *_: {"latents": stored},
        output_type="pt",
    ).frames


def flow() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def pipeline_of(name: str, vae: Any) -> Any:
    transformer = FAMILIES[name].make().eval()
    if name == "wan":
        return WanPipeline(**NO_TEXT, transformer=transformer, vae=vae, scheduler=flow())
    if name == "ltxvideo":
        return LTXPipeline(**NO_TEXT, transformer=transformer, vae=vae, scheduler=flow())
    if name == "sanavideo":
        return SanaVideoPipeline(**NO_TEXT, transformer=transformer, vae=vae, scheduler=flow())
    if name == "kandinsky5_video":
        return Kandinsky5T2VPipeline(**NO_TEXTS, transformer=transformer, vae=vae, scheduler=flow())
    if name == "hunyuan_video":
        return HunyuanVideoPipeline(**NO_TEXTS, transformer=transformer, vae=vae, scheduler=flow())
    return CogVideoXPipeline(**NO_TEXT, transformer=transformer, vae=vae, scheduler=CogVideoXDDIMScheduler())


# Family or variant, VAE, its settings, latent frames, and (frames, height, width) in pixels.
CASES: dict[str, tuple[str, str, dict[str, Any], int, tuple[int, int, int]]] = {
    "wan": ("wan", "wan", {}, 3, (9, 32, 48)),
    "ltxvideo": ("ltxvideo", "ltxvideo", {"scaling_factor": 0.7}, 3, (17, 128, 192)),
    "ltxvideo with a decode timestep": ("ltxvideo", "ltxvideo", {"timestep_conditioning": True}, 3, (17, 128, 192)),
    "sanavideo": ("sanavideo", "wan", {}, 3, (9, 32, 64)),
    "sanavideo with LTX 2's VAE": ("sanavideo", "ltx2", {}, 3, (17, 128, 192)),
    "kandinsky5_video": ("kandinsky5_video", "kandinsky5_video", {}, 3, (9, 32, 48)),
    "cogvideox": ("cogvideox", "cogvideox", {}, 3, (9, 32, 48)),
    "cogvideox of an even number": ("cogvideox", "cogvideox", {}, 4, (16, 32, 48)),
    "hunyuan_video": ("hunyuan_video", "hunyuan_video", {}, 6, (21, 32, 48)),
}


def found_pixels(name: str, source: Any, latents: torch.Tensor) -> torch.Tensor:
    transformer = FAMILIES[name].make()
    family = family_of(transformer)
    decoder = LatentDecoder(source, family)
    return decoder.decode(latents, family.layout(transformer, tuple(latents.shape[2:])), CPU)


@pytest.mark.parametrize("case", CASES)
def test_latents_are_decoded_as_the_familys_pipeline_does_it(case: str, tmp_path: Path) -> None:
    name, vae_name, settings, frames, pixels = CASES[case]
    vae = tiny_vaes(vae_name, **settings)
    scale = 32 if "ltx" in vae_name else 8
    latents = clean_latents(2, frames, pixels[1] // scale, pixels[2] // scale)
    expected = pipeline_pixels(pipeline_of(name, vae), latents, pixels)
    assert expected.shape == (2, pixels[0], 3, *pixels[1:])
    vae.save_pretrained(tmp_path / "vae")
    for source in (vae, tmp_path):
        # Dividing by 1/std and multiplying by std round differently.
        torch.testing.assert_close(found_pixels(name, source, latents), expected, rtol=1e-4, atol=2e-5)
    # The statistics, scales and the decode timestep matter.
    assert (found_pixels(name, vae, latents * 1.1) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("frames", [3, 4])
def test_latents_padded_at_the_front_are_decoded_without_their_padding(frames: int) -> None:
    transformer, vae = FAMILIES["cogvideox 1.5"].make(), tiny_vaes("cogvideox")
    family, latents = family_of(transformer), clean_latents(1, frames)
    layout = family.layout(transformer, (4, 4, 6))  # of the forward, whose latents were padded to 4
    pixels = 9 if frames == 3 else 16
    padded = torch.cat([latents[:, :, :1]] * (4 - frames) + [latents], dim=2)
    expected = pipeline_pixels(pipeline_of("cogvideox 1.5", vae), padded, (4 * frames - 3, 32, 48))
    found = LatentDecoder(vae, family).decode(latents, layout, CPU)
    assert found.shape[1] == pixels
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    with pytest.raises(ValueError, match=r"\(T, H, W\) = \(4, 4, 6\).*got \(1, 4, 2, 4, 6\)"):
        LatentDecoder(vae, family).decode(latents[:, :, :2], layout, CPU)


def shrink_tiles(vae: Any) -> None:
    """Tiles of a few latents, so that a clip of 4 x 6 latents has several."""
    vae.enable_tiling()
    scale = 32 if isinstance(vae, AutoencoderKLLTXVideo) else 8
    for axis in ("height", "width"):
        setattr(vae, f"tile_sample_min_{axis}", 3 * scale)
        setattr(vae, f"tile_sample_stride_{axis}", 2 * scale)
        # CogVideoX has its own names.
        setattr(vae, f"tile_latent_min_{axis}", 3)
        setattr(vae, f"tile_overlap_factor_{axis}", 1 / 3)


@pytest.mark.parametrize("name", ["wan", "ltxvideo", "kandinsky5_video", "cogvideox", "hunyuan_video"])
def test_tiling_and_slicing_are_the_vaes_own(name: str) -> None:
    vae, latents = tiny_vaes(name), clean_latents(2, 3)
    whole = found_pixels(name, vae, latents)
    vae.enable_slicing()
    torch.testing.assert_close(found_pixels(name, vae, latents), whole, rtol=1e-4, atol=1e-5)  # other batch sizes
    shrink_tiles(vae)
    tiled = found_pixels(name, vae, latents)
    assert (tiled - whole).abs().max() > 1e-3, "tiles see less around them"
    expected = pipeline_pixels(pipeline_of(name, vae), latents, (whole.shape[1], *whole.shape[3:]))
    torch.testing.assert_close(tiled, expected, rtol=1e-4, atol=2e-5)


def test_slicing_gives_each_clip_its_decode_timestep() -> None:
    # diffusers' own decode() fails for other than two clips here, and mixes two up.
    vae, latents = tiny_vaes("ltxvideo", timestep_conditioning=True), clean_latents(3, 2)
    whole = found_pixels("ltxvideo", vae, latents)
    vae.enable_slicing()
    torch.testing.assert_close(found_pixels("ltxvideo", vae, latents), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ltxvideo", "kandinsky5_video", "cogvideox", "hunyuan_video"])
def test_freeing_the_encoder_leaves_each_familys_decoding_as_it_was(name: str) -> None:
    vae, latents = tiny_vaes(name), clean_latents(1, 2)
    transformer = FAMILIES[name].make()
    family = family_of(transformer)
    layout = family.layout(transformer, (2, 4, 6))
    before = sum(parameter.nbytes for parameter in vae.parameters())
    expected = LatentDecoder(vae, family).decode(latents, layout, CPU)
    assert torch.equal(LatentDecoder(vae, family, drop_encoder=True).decode(latents, layout, CPU), expected)
    assert sum(parameter.nbytes for parameter in vae.parameters()) < 0.7 * before


def test_another_familys_vae_is_refused(tmp_path: Path) -> None:
    sana = family_of(FAMILIES["sanavideo"].make())
    with pytest.raises(
        ValueError, match="an AutoencoderKLWan or AutoencoderKLLTX2Video for sanavideo, got AutoencoderKLHunyuanVideo"
    ):
        LatentDecoder(tiny_vaes("hunyuan_video"), sana)
    tiny_vaes("hunyuan_video").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds an AutoencoderKLHunyuanVideo; ltxvideo needs an AutoencoderKLLTXVideo"):
        found_pixels("ltxvideo", tmp_path, clean_latents(1, 2))
    with pytest.raises(ValueError, match="5 channels, the VAE decodes 4"):
        found_pixels("kandinsky5_video", tiny_vaes("kandinsky5_video"), torch.zeros(1, 5, 2, 4, 6))
