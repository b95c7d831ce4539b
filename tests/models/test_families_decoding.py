"""Every family's latents to pixels: what its own pipeline shows for the same latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKLLTXVideo, LTXPipeline
from family_pipelines import pipeline_of, run
from tiny import CHANNELS
from tiny_families import FAMILIES, crepa_on, tiny_vaes

from crepa_kernels.models.families import family_of
from crepa_kernels.models.layouts import raster_layout
from crepa_kernels.teachers.latents import LatentDecoder

CPU = torch.device("cpu")
DC_AE = {"block_out_channels": (8, 8), "layers_per_block": (1, 1), "qkv_multiscales": ((), ())}


def clean_latents(batch: int, frames: int, height: int = 4, width: int = 6) -> torch.Tensor:
    shape = (batch, CHANNELS, frames, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def as_stored(name: str, latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, T, H, W) as the family's pipeline keeps them while it denoises."""
    if name == "ltxvideo":
        return LTXPipeline._pack_latents(latents)
    if name == "kandinsky5_video":
        return latents.permute(0, 2, 3, 4, 1).clone()
    return latents.transpose(1, 2) if name == "cogvideox" else latents


def pipeline_pixels(variant: str, vae: Any, latents: torch.Tensor, pixels: tuple[int, int, int]) -> torch.Tensor:
    """What the variant's pipeline shows after one step of denoising, whose result is replaced by ``latents``."""
    tiny = FAMILIES[variant]
    stored = as_stored(tiny.name, latents)
    callback = {"num_inference_steps": 1, "callback_on_step_end": lambda *_: {"latents": stored}}
    return run(tiny.name, pipeline_of(tiny.name, tiny.make().eval(), vae), len(latents), pixels, **callback)


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
    return decoder.decode(latents, raster_layout(transformer.config, tuple(latents.shape[2:])), CPU)


@pytest.mark.parametrize("case", CASES)
def test_latents_are_decoded_as_the_familys_pipeline_does_it(case: str, tmp_path: Path) -> None:
    name, vae_name, settings, frames, pixels = CASES[case]
    vae = tiny_vaes(vae_name, **settings)
    scale = 32 if "ltx" in vae_name else 8
    latents = clean_latents(2, frames, pixels[1] // scale, pixels[2] // scale)
    expected = pipeline_pixels(name, vae, latents, pixels)
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
    layout = raster_layout(transformer.config, (4, 4, 6))  # of the forward, whose latents were padded to 4
    pixels = 9 if frames == 3 else 16
    padded = torch.cat([latents[:, :, :1]] * (4 - frames) + [latents], dim=2)
    expected = pipeline_pixels("cogvideox 1.5", vae, padded, (4 * frames - 3, 32, 48))
    found = LatentDecoder(vae, family).decode(latents, layout, CPU)
    assert found.shape[1] == pixels
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    with pytest.raises(ValueError, match=r"\(T, H, W\) = \(4, 4, 6\).*got \(1, 4, 2, 4, 6\)"):
        LatentDecoder(vae, family).decode(latents[:, :, :2], layout, CPU)


@pytest.mark.parametrize("variant", FAMILIES)
def test_the_loss_of_latents_is_that_of_their_pixels(variant: str) -> None:
    tiny = FAMILIES[variant]
    transformer, vae = tiny.make(), tiny_vaes(tiny.name)
    # With a temporal patch of 2, 5 latent frames were padded at the front to the forward's 6.
    latents = clean_latents(2, 1 + tiny.frames * tiny.patch[0] - tiny.patch[0], *tiny.latents[1:])
    crepa = crepa_on(transformer, vae=vae)
    transformer(**tiny.inputs(2, model=transformer))
    losses = [crepa.loss(step=0, latents=latents)[0]]
    frames = 1 if tiny.frames == 1 else 17 if "ltx" in variant or "1.5" in variant else 9
    assert crepa.frames_decoded == 2 * frames
    assert crepa.frames_encoded == 2 * tiny.frames
    losses.append(crepa.loss(step=0, pixels=found_pixels(variant, vae, latents))[0])
    assert torch.equal(*losses)
    losses.append(crepa.loss(step=0, latents=latents.flip(-1))[0])
    assert not torch.equal(losses[0], losses[2])


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
    expected = pipeline_pixels(name, vae, latents, (whole.shape[1], *whole.shape[3:]))
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
    layout = raster_layout(transformer.config, (2, 4, 6))
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
    settings = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in DC_AE.items()}
    with pytest.raises(ValueError, match="for sanavideo, got AutoencoderDC"):
        LatentDecoder(AutoencoderDC(latent_channels=CHANNELS, **settings), sana)
    tiny_vaes("hunyuan_video").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds an AutoencoderKLHunyuanVideo; ltxvideo needs an AutoencoderKLLTXVideo"):
        found_pixels("ltxvideo", tmp_path, clean_latents(1, 2))
    with pytest.raises(ValueError, match="5 channels, the VAE decodes 4"):
        found_pixels("kandinsky5_video", tiny_vaes("kandinsky5_video"), torch.zeros(1, 5, 2, 4, 6))
