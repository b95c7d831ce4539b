"""Latents to pixels."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, WanPipeline
from tiny import tiny_pipeline, tiny_vae, tiny_wan
from tiny_families import FAMILIES, tiny_vaes

from crepa_kernels import CrepaRegularizer
from crepa_kernels.models.families import family_of
from crepa_kernels.models.layouts import TokenLayout
from crepa_kernels.models.vaes import statistics
from crepa_kernels.regularizer.monitor import LatentMonitor
from crepa_kernels.teachers.latents import LatentDecoder, free_vae_encoder

CPU = torch.device("cpu")
LAYOUT = TokenLayout(frames=3, grid=(2, 3), patch=1, latent_shape=(3, 4, 6))


def latents(batch: int = 2, frames: int = 3) -> torch.Tensor:
    return torch.randn(batch, 4, frames, 4, 6, generator=torch.Generator().manual_seed(5))


def decoder(vae: Any, **options: Any) -> LatentDecoder:
    return LatentDecoder(vae, family_of(tiny_wan()), **options)


def pipeline_pixels(pipeline: WanPipeline, latents: torch.Tensor) -> torch.Tensor:
    """The end of WanPipeline.__call__."""
    config = pipeline.vae.config
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    inverse = 1.0 / torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        video = pipeline.vae.decode(latents / inverse + mean, return_dict=False)[0]
    return pipeline.video_processor.postprocess_video(video, output_type="pt")


def test_latents_are_decoded_as_the_pipeline_does_it(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(tmp_path)
    expected = pipeline_pixels(pipeline, latents())
    # The VAE by itself, by its folder, by the pipeline's folder, and by a callable.
    for source in (pipeline.vae, tmp_path / "vae", str(tmp_path), tiny_vae):
        one = decoder(source)
        found = one.decode(latents(), LAYOUT, CPU)
        assert found.shape == (2, 9, 3, 32, 48)
        assert one.frames_decoded == 18
        # Dividing by 1/std and multiplying by std round differently.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert 0 <= found.min() < found.max() <= 1
    assert not found.requires_grad


def test_without_a_vae_the_error_says_what_to_pass() -> None:
    with pytest.raises(ValueError, match=r"CrepaRegularizer\(vae=\.\.\.\).*pixels= or features="):
        decoder(None).decode(latents(), LAYOUT, CPU)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 3, 4), r"\(T, H, W\) = \(3, 4, 6\).*got \(2, 4, 3, 4\)"),
        ((2, 4, 4, 4, 6), r"\(T, H, W\) = \(3, 4, 6\).*got \(2, 4, 4, 4, 6\)"),
        ((2, 5, 3, 4, 6), "5 channels, the VAE decodes 4"),
    ],
)
def test_latents_of_another_shape_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder(tiny_vae()).decode(torch.zeros(shape), LAYOUT, CPU)


def test_another_vae_is_refused(tmp_path: Path) -> None:
    image_vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4)
    with pytest.raises(ValueError, match="must be an AutoencoderKLWan for wan, got AutoencoderKL"):
        decoder(image_vae)
    with pytest.raises(ValueError, match="got AutoencoderKL"):
        decoder(lambda: image_vae).decode(latents(), LAYOUT, CPU)
    with pytest.raises(ValueError, match="got int"):
        decoder(3)
    with pytest.raises(ValueError, match=r"neither config.json nor vae/config.json"):
        decoder(tmp_path).decode(latents(), LAYOUT, CPU)


def test_freeing_the_vae_encoder_leaves_decoding_as_it_was() -> None:
    vae = tiny_vae()
    expected = decoder(vae).decode(latents(), LAYOUT, CPU)
    size = sum(parameter.nbytes for parameter in vae.parameters())
    encoder = sum(p.nbytes for part in (vae.encoder, vae.quant_conv) for p in part.parameters())
    freeing = decoder(vae, drop_encoder=True)
    assert sum(parameter.nbytes for parameter in vae.parameters()) == size  # not before it decodes
    assert torch.equal(freeing.decode(latents(), LAYOUT, CPU), expected)
    assert sum(parameter.nbytes for parameter in vae.parameters()) == size - encoder < size
    assert torch.equal(freeing.decode(latents(), LAYOUT, CPU), expected)
    with pytest.raises(ValueError, match="freed by crepa_drop_vae_encoder"):
        vae.encode(torch.zeros(1, 3, 5, 32, 48))
    assert free_vae_encoder(vae) == 0


def test_a_construction_that_fails_leaves_the_callers_vae_whole() -> None:
    vae = tiny_vae()
    config = {"crepa_enabled": True, "crepa_block_index": 1, "crepa_drop_vae_encoder": True}
    with pytest.raises(ValueError, match=r"config\.json"):
        CrepaRegularizer(config | {"crepa_encoder": "/no/such/encoder"}, tiny_wan(), vae=vae)
    vae.encode(torch.zeros(1, 3, 5, 32, 48))


# What latents do not look like


def clean(seed: int = 0) -> torch.Tensor:
    """(1, 4, 4, 12, 16) as of a video: smooth in space, slow in time, of unit variance in each channel."""
    coarse = torch.randn(1, 4, 2, 4, 5, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (4, 12, 16), mode="trilinear", align_corners=True)
    return (smooth - smooth.mean((2, 3, 4), keepdim=True)) / smooth.std((2, 3, 4), keepdim=True)


def statistics_of(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std, scale = statistics(vae, CPU)
    return mean, std / scale


def raw_of(vae: Any, x: torch.Tensor) -> torch.Tensor:
    mean, std = statistics_of(vae)
    return x * std + mean


WRONG: dict[str, Callable[[Any], tuple[torch.Tensor, str]]] = {
    "clean": lambda vae: (clean(), ""),
    "a batch": lambda vae: (torch.cat([clean(1), 0.6 * clean(2), 1.3 * clean(3)]), ""),
    "in bf16": lambda vae: (clean().bfloat16(), ""),
    "noise": lambda vae: (torch.randn(clean().shape), "as unlike as in noise"),
    "noisy": lambda vae: (0.05 * clean() + 0.95 * torch.randn(clean().shape), "as unlike as in noise"),
    "not normalised": lambda vae: (raw_of(vae, clean()), "not normalised as the transformer sees them"),
    "of another scale": lambda vae: (0.01 * clean(), r"root mean square is 0\.0"),
    "of 8 bits": lambda vae: (100 * clean() + 127, r"root mean square is 16"),
    "frames for channels": lambda vae: (clean().transpose(1, 2), r"are they \(B, T, C, H, W\)"),
}


@pytest.mark.parametrize("name", ["wan", "ltxvideo", "cogvideox", "hunyuan_video"])
@pytest.mark.parametrize("kind", WRONG)
def test_latents_that_are_not_clean_are_told_of_once(kind: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    # A released factor far from 1. Of CogVideoX's nothing can be told: what its VAE makes is of about unit variance.
    vae = tiny_vaes(name, **({"scaling_factor": 0.3} if name == "hunyuan_video" else {}))
    torch.manual_seed(0)
    given, message = WRONG[kind](vae)
    if kind == "not normalised" and name == "cogvideox":
        message = ""
    monitor = LatentMonitor()
    for _ in range(2):
        monitor.watch(given, *statistics_of(vae), torch.rand(1, 5, 3, 8, 8))
    assert_told(caplog, message)


def assert_told(caplog: pytest.LogCaptureFixture, message: str) -> None:
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(found) == bool(message)
    assert all(re.search(message, line) and "said once" in line for line in found)


def test_a_picture_of_black_and_white_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    mean, std = statistics_of(tiny_vae())
    LatentMonitor().watch(clean(), mean, std, (4 * torch.randn(1, 5, 3, 8, 8)).clamp(0, 1))
    assert_told(caplog, "is black and as much is white")
    caplog.clear()
    LatentMonitor().watch(clean(), mean, std, torch.zeros(1, 5, 3, 8, 8))
    assert_told(caplog, "")


def test_decoding_looks_at_its_first_latents(caplog: pytest.LogCaptureFixture) -> None:
    layout = TokenLayout(frames=4, grid=(2, 3), patch=1, latent_shape=(4, 4, 6))
    one = LatentDecoder(tiny_vaes("cogvideox"), family_of(FAMILIES["cogvideox"].make()))
    for _ in range(2):
        one.decode(clean()[..., :4, :6].transpose(1, 2), layout, CPU)
    assert_told(caplog, r"are they \(B, T, C, H, W\)")


def test_latents_in_another_order_are_refused_with_the_right_one() -> None:
    layout = TokenLayout(frames=3, grid=(2, 3), patch=1, latent_shape=(3, 4, 6))
    for wrong, cure in ((latents().transpose(1, 2), "(B, T, C, H, W)"), (latents().movedim(1, -1), "(B, T, H, W, C)")):
        with pytest.raises(ValueError, match=re.escape(f"looks like {cure}: give latents.")):
            decoder(tiny_vae()).decode(wrong, layout, CPU)
