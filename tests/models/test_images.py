"""Families of images: grids of the stock pipelines' own calls, what is given without frames, and what is refused."""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import Any

import pytest
import torch
from image_pipelines import PIPELINES, calls_of, pipeline_of, run
from tiny import CHANNELS
from tiny_families import FAMILIES, crepa_on, on_grid, tiny_vaes

from crepa_kernels import CrepaConfig, CrepaRegularizer, image_to_video_mask
from crepa_kernels.models.families import FAMILIES as ROWS
from crepa_kernels.models.families import family_of
from crepa_kernels.models.layouts import raster_layout
from crepa_kernels.models.vaes import VAES, encode
from crepa_kernels.teachers import TeacherFeatures
from crepa_kernels.teachers.latents import LatentDecoder

IMAGES = [row.name for row in ROWS if row.images]
CPU = torch.device("cpu")
# Heights and widths in tokens: 2 : 1, as many tokens as a square has, and 16 : 9.
GRIDS = {"2:1": (4, 8), "square number": (2, 8), "16:9": (9, 16)}

every_image = pytest.mark.parametrize("name", IMAGES)


def pixels_a_latent(name: str, vae: Any) -> int:
    return VAES[family_of(FAMILIES[name].make()).vaes[0]].compression(vae.config)[1]


def stored(name: str, latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, H, W) as the family's pipeline keeps them while it denoises."""
    batch, channels, height, width = latents.shape
    if name == "flux2":
        return latents.flatten(2).transpose(1, 2)
    if name in ("flux", "chroma", "qwen_image"):
        squares = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        return squares.reshape(batch, height * width // 4, 4 * channels)
    return latents


def test_every_family_of_images_is_tested_here() -> None:
    assert set(IMAGES) == set(PIPELINES)
    assert all(image_to_video_mask(FAMILIES[name].make(), 2, 1) is None for name in IMAGES)


@every_image
@pytest.mark.parametrize("shape", GRIDS)
def test_the_pipelines_call_says_the_grid_and_its_decoding_is_ours(name: str, shape: str) -> None:
    grid = GRIDS[shape]
    tiny, vae = on_grid(name, grid), tiny_vaes(name)
    transformer = tiny.make()
    latents = torch.randn(2, CHANNELS, *tiny.latents[1:], generator=torch.Generator().manual_seed(5))
    size = tuple(pixels_a_latent(name, vae) * side for side in tiny.latents[1:])
    calls = calls_of(transformer)
    if name == "sana":  # its pipeline takes multiples of 32 alone
        size = tuple(-(-side // 32) * 32 for side in size)
        latents = torch.randn(2, CHANNELS, *(side // 8 for side in size), generator=torch.Generator().manual_seed(5))
    expected = run(name, pipeline_of(name, transformer, vae), 2, size, stored(name, latents))
    assert expected.shape == (2, 3, *size)
    grid = tuple(side // tiny.patch[1] for side in latents.shape[2:])
    layout = raster_layout(_Patch(tiny.patch), (1, *latents.shape[2:]))
    found = LatentDecoder(vae, family_of(transformer)).decode(latents[:, :, None], layout, CPU)
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-4, atol=2e-5)
    assert (found[:, 0] - expected.flip(-1)).abs().max() > 1e-3

    crepa = crepa_on(transformer)
    (call, *_) = calls
    transformer.train()(**call)
    states, layout = crepa.captured()
    assert (layout.frames, layout.grid, layout.latent_shape) == (1, grid, (1, *latents.shape[2:]))
    assert states.shape[:3] == (2, 1, grid[0] * grid[1])
    _, logs = crepa.loss(step=0, pixels=torch.rand(2, 3, *size))
    assert -1 <= logs["crepa_similarity"] <= 1


class _Patch:
    def __init__(self, patch: tuple[int, int, int]) -> None:
        self.patch_size = patch


@every_image
def test_encoding_is_the_inverse_that_the_pipeline_has(name: str) -> None:
    vae = tiny_vaes(name)
    side = pixels_a_latent(name, vae)
    pixels = torch.randint(0, 256, (2, 1, 3, 2 * side, 4 * side), dtype=torch.uint8)
    found = encode(vae, pixels, None)
    assert found.shape == (2, CHANNELS, 1, 2, 4)
    images = pixels[:, 0].float() / 127.5 - 1
    # As diffusers' own image-to-image pipelines and training scripts write it.
    if name == "flux2":
        expected = pipeline_of(name, None, vae)._encode_vae_image(images, None)
    elif name == "qwen_image":
        mean, std = (torch.tensor(getattr(vae.config, f"latents_{key}")).view(1, -1, 1, 1) for key in ("mean", "std"))
        expected = (vae.encode(images[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std
    elif name == "sana":
        expected = vae.encode(images).latent * vae.config.scaling_factor
    else:
        shift = vae.config.shift_factor or 0.0
        expected = (vae.encode(images).latent_dist.mode() - shift) * vae.config.scaling_factor
    torch.testing.assert_close(found[:, :, 0], expected, rtol=1e-4, atol=1e-5)  # division and product round differently
    if name != "sana":
        drawn = encode(vae, pixels, torch.Generator().manual_seed(0))
        assert not torch.equal(drawn, found)


@every_image
def test_what_is_given_without_frames_is_what_is_given_with_one(name: str) -> None:
    tiny = FAMILIES[name]
    transformer, vae = tiny.make(), tiny_vaes(name)
    crepa = crepa_on(transformer, vae=vae)
    transformer(**tiny.inputs(2, model=transformer))
    tokens = tiny.grid[0] * tiny.grid[1]
    pixels = torch.rand(2, 3, 32, 48)
    latents = torch.randn(2, CHANNELS, *tiny.latents[1:])
    features = torch.randn(2, tokens, 32)
    on_own_grid = torch.randn(2, 5, 7, 32)
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"pixels": pixels}, {"pixels": pixels[:, None]}),
        ({"latents": latents}, {"latents": latents[:, :, None]}),
        ({"features": features}, {"features": features[:, None]}),
        ({"features": features, "feature_grid": tiny.grid}, {"features": features.unflatten(1, tiny.grid)}),
        ({"features": on_own_grid}, {"features": on_own_grid[:, None]}),
        ({"features": on_own_grid, "feature_grid": (5, 7)}, {"features": on_own_grid}),
        ({"features": on_own_grid}, {"features": TeacherFeatures(on_own_grid.flatten(1, 2), (5, 7))}),
        ({"pixels": pixels}, {"pixels": pixels, "frame_mask": torch.ones(2, 1, dtype=torch.bool)}),
    ]
    for without, with_one in pairs:
        losses = [crepa.loss(step=0, **given)[0] for given in (without, with_one)]
        assert torch.equal(*losses), without.keys()
        assert losses[0].requires_grad
    assert crepa.similarity_matrix(pixels=pixels).shape == (2, 1, 1)


@pytest.mark.parametrize("distance", [{}, {"crepa_adjacent_distance": 2, "crepa_cumulative_neighbors": True}])
def test_a_distance_is_taken_as_0_and_said_once(distance: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    tiny = FAMILIES["flux"]
    transformer = tiny.make()
    with caplog.at_level(logging.INFO, logger="crepa_kernels"):
        crepa = crepa_on(transformer, **distance)
        for step in range(2):
            transformer(**tiny.inputs(model=transformer))
            _, logs = crepa.loss(step=step, pixels=torch.rand(1, 3, 32, 48))
    (said,) = [record.getMessage() for record in caplog.records if "adjacent_distance" in record.getMessage()]
    asked = distance.get("crepa_adjacent_distance", 1)
    assert said == f"crepa_adjacent_distance = {asked} is taken as 0: flux makes images, which have no neighbours"
    assert crepa.config.crepa_adjacent_distance == 0
    for other in ("crepa_alignment_score", "crepa_similarity_self"):
        torch.testing.assert_close(logs[other], logs["crepa_similarity"])


def test_relations_between_frames_that_an_image_has_not_are_an_error() -> None:
    transformer = FAMILIES["flux"].make()
    with pytest.raises(ValueError, match='crepa_relational_pairs = "cross": flux makes images, whose one frame has no'):
        crepa_on(transformer, crepa_relational_weight=1.0, crepa_relational_pairs="cross")
    assert not transformer._forward_hooks
    crepa_on(transformer, crepa_relational_pairs="cross")


def test_nothing_is_said_of_a_distance_of_0(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="crepa_kernels"):
        crepa_on(FAMILIES["sana"].make(), crepa_adjacent_distance=0)
    assert "distance" not in caplog.text


@pytest.mark.parametrize(("name", "block"), [("flux", 8), ("sana", 10), ("wan", 8), ("sanavideo", 10)])
def test_a_preset_takes_the_block_of_the_transformer_that_it_meets(
    name: str, block: int, caplog: pytest.LogCaptureFixture
) -> None:
    depth = {"num_single_layers": 9} if name == "flux" else {"num_layers": 11}
    presets = (
        CrepaConfig.preset("solid_background"),
        CrepaConfig.preset("solid_background").replace(crepa_lambda=0.2),
        CrepaConfig.from_args(Namespace(), CrepaConfig.preset("solid_background")),
    )
    for config in presets:
        with caplog.at_level(logging.INFO, logger="crepa_kernels"):
            crepa = CrepaRegularizer(config, FAMILIES[name].make(**depth), feature_size=8)
        assert crepa.config.crepa_block_index == block
        assert f"crepa_block_index = {block}, the recommended block for {name}" in caplog.text
        assert crepa.config.block_is_of is None or crepa.config.block_is_of == name
    with pytest.raises(ValueError, match=rf'for cogvideox, and the transformer is of {name}: give family="{name}"'):
        CrepaRegularizer(CrepaConfig.preset("i2v", family="cogvideox"), FAMILIES[name].make(**depth))
    given = CrepaConfig.preset("i2v", crepa_block_index=1)
    crepa = CrepaRegularizer(given, FAMILIES[name].make(**depth), feature_size=8)
    assert crepa.config.crepa_block_index == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pixels": torch.rand(3, 32, 48)}, r"pixels of images must be \(B, 3, H, W\), got \(3, 32, 48\)"),
        ({"pixels": torch.rand(1, 2, 3, 32, 48)}, r"pixels of images must be \(B, 3, H, W\), got \(1, 2, 3, 32, 48\)"),
        ({"latents": torch.rand(1, 6, 16)}, r"latents of images must be \(B, C, H, W\), got \(1, 6, 16\)"),
        (
            {"latents": torch.rand(1, 4, 6, 4)},
            r"latents must be \(B, C, H, W\) with \(H, W\) = \(4, 6\) as in .*, got \(1, 4, 6, 4\)",
        ),
        ({"latents": torch.rand(1, 5, 4, 6)}, "latents have 5 channels, the VAE decodes 4"),
        ({"features": torch.rand(1, 7, 32)}, "7 tokens a frame, the student's grid is 2 x 3"),
        ({"features": torch.tensor(1.0)}, r"features of images must be \(B, N, E\) or .*, got \(\)"),
        ({"features": torch.rand(1, 32)}, r"features of images must be \(B, N, E\) or .*, got \(1, 32\)"),
        ({"features": torch.rand(1, 5, 7, 32), "feature_grid": (7, 5)}, r"feature_grid = \(7, 5\), but .* on 5 x 7"),
        ({"pixels": torch.rand(1, 4, 32, 48)}, r"pixels of images must be \(B, 3, H, W\), got \(1, 4, 32, 48\)"),
    ],
)
def test_shapes_of_other_things_than_images_are_named(given: dict[str, Any], message: str) -> None:
    tiny = FAMILIES["flux"]
    transformer = tiny.make()
    crepa = crepa_on(transformer, vae=tiny_vaes("flux"))
    transformer(**tiny.inputs(model=transformer))
    with pytest.raises(ValueError, match=message):
        crepa.loss(step=0, **given)


def test_a_vae_of_another_family_is_named() -> None:
    with pytest.raises(ValueError, match="must be an AutoencoderKLFlux2 for flux2, got AutoencoderKL"):
        crepa_on(FAMILIES["flux2"].make(), vae=tiny_vaes("flux"))
