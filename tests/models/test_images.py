"""Families of images: grids of the stock pipelines' own calls, what is given without frames, and what is refused."""

from __future__ import annotations

import copy
import logging
import pickle
from argparse import Namespace
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from image_pipelines import PIPELINES, calls_of, pipeline_of, run
from tiny import CHANNELS
from tiny_families import FAMILIES, TinyFamily, crepa_on, on_grid, tiny_vaes

from crepa_kernels import CrepaConfig, CrepaRegularizer, image_to_video_mask
from crepa_kernels.models.families import FAMILIES as ROWS
from crepa_kernels.models.families import family_of
from crepa_kernels.models.image_ids import image_grid
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


# References beside the image


def with_references(name: str, tiny: TinyFamily) -> dict[str, Any]:
    """A pipeline's call with the tokens of a smaller image after the image's own."""
    transformer = tiny.make()
    inputs = tiny.inputs(2, model=transformer)
    more = torch.randn(2, 6, inputs["hidden_states"].shape[2], generator=torch.Generator().manual_seed(1))
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], more], dim=1)
    if name == "qwen_image":
        inputs["img_shapes"] = [[*shapes, (1, 2, 3)] for shapes in inputs["img_shapes"]]
    else:
        ids = inputs["img_ids"]
        places = torch.cartesian_prod(torch.arange(2), torch.arange(3))
        added = torch.zeros(6, ids.shape[-1])
        added[:, 0], added[:, 1:3] = 10 if name == "flux2" else 1, places
        inputs["img_ids"] = torch.cat([ids, added.expand(*ids.shape[:-2], -1, -1)], dim=-2)
    return inputs


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("name", ["flux", "flux2", "chroma", "qwen_image"])
def test_reference_tokens_after_the_image_are_left_out(name: str, block: int) -> None:
    tiny = on_grid(name, (2, 8))
    transformer, seen = tiny.make(), []
    transformer.get_submodule(tiny.blocks[block]).register_forward_hook(lambda *given: seen.append(given[2]))
    crepa = crepa_on(transformer, crepa_block_index=block)
    transformer(**with_references(name, tiny))
    states, layout = crepa.captured(block)
    assert layout.grid == (2, 8)
    assert torch.equal(states[:, 0], tiny.tokens(seen[0])[:, :16])
    crepa.loss(step=0, pixels=torch.rand(2, 3, 32, 128))[0].backward()


def test_reference_tokens_without_an_index_of_their_own_are_an_error() -> None:
    tiny = on_grid("flux", (2, 8))
    transformer = tiny.make()
    crepa = crepa_on(transformer)
    inputs = with_references("flux", tiny)
    inputs["img_ids"][16:, 0] = 0
    inputs["img_ids"][16:, 2] -= 8
    transformer(**inputs)
    with pytest.raises(
        ValueError, match=r"img_ids of the 22 tokens with index 0 .*those of reference images come after"
    ):
        crepa.captured()


@pytest.mark.parametrize("block", [1, 2])
def test_reference_tokens_before_the_image_are_left_out(block: int) -> None:
    # As Flux 2 has them where it fills its cache of them.
    tiny = on_grid("flux2", (2, 8))
    transformer, seen = tiny.make(), []
    transformer.get_submodule(tiny.blocks[block]).register_forward_hook(lambda *given: seen.append(given[2]))
    crepa = crepa_on(transformer, crepa_block_index=block)
    inputs = with_references("flux2", tiny)
    for key in ("hidden_states", "img_ids"):
        inputs[key] = inputs[key].roll(6, dims=1)
    transformer(**inputs, kv_cache_mode="extract", num_ref_tokens=6)
    states, layout = crepa.captured(block)
    assert layout.grid == (2, 8)
    assert torch.equal(states[:, 0], tiny.tokens(seen[0])[:, 6:])


# Where tokens lie


@pytest.mark.parametrize("name", ["flux", "flux2", "chroma"])
def test_ids_are_read_once_a_grid_and_recognized_from_then_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = FAMILIES[name]
    transformer = tiny.make()
    crepa = crepa_on(transformer)
    read: list[torch.Size] = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: read.append(self.shape) or cpu(self))
    # All of 144 tokens, which no shape of ids tells apart.
    for grid in ((9, 16), (16, 9), (12, 12), (9, 16), (16, 9), (12, 12), (9, 16)):
        transformer(**on_grid(name, grid).inputs(model=transformer))
        assert crepa.captured().layout.grid == grid
    assert len(read) == 3
    inputs = on_grid(name, (9, 16)).inputs(model=transformer)
    transformer(**inputs)
    # The same tensor, written to.
    inputs["img_ids"] = inputs["img_ids"].clone()
    transformer(**inputs)
    assert crepa.captured().layout.grid == (9, 16)
    inputs["img_ids"].copy_(on_grid(name, (16, 9)).inputs(model=transformer)["img_ids"])
    transformer(**inputs)
    assert crepa.captured().layout.grid == (16, 9)
    assert len(read) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("grid", [(1, 8), (8, 1), (1, 1), (3, 300), (300, 2)])
def test_ids_of_every_type_and_of_long_sides(grid: tuple[int, int], dtype: torch.dtype) -> None:
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(grid[0]), torch.arange(grid[1])).to(dtype)
    assert image_grid(ids.double()) == grid


def test_a_batch_axis_of_ids_is_taken_as_the_model_takes_it() -> None:
    tiny = on_grid("flux", (2, 8))
    transformer = tiny.make()
    crepa = crepa_on(transformer)
    inputs = tiny.inputs(2, model=transformer)
    inputs["img_ids"] = inputs["img_ids"].expand(2, -1, -1)
    transformer(**inputs)
    assert crepa.captured().layout.grid == (2, 8)


def wrong_ids(change: Any) -> dict[str, Any]:
    tiny = on_grid("flux", (2, 8))
    inputs = tiny.inputs(model=tiny.make())
    inputs["img_ids"] = change(inputs["img_ids"])
    return inputs


@pytest.mark.parametrize(
    "change",
    [
        torch.zeros_like,
        lambda ids: ids[torch.arange(16) ^ 1],
        lambda ids: ids.roll(1, 0),
        lambda ids: ids[:, [0, 2, 1]],
    ],
    ids=["zeros", "another order", "turned", "columns for rows"],
)
def test_ids_of_no_grid_are_named(change: Any) -> None:
    transformer = FAMILIES["flux"].make()
    crepa = crepa_on(transformer)
    transformer(**wrong_ids(change))
    with pytest.raises(ValueError, match="img_ids of the 16 tokens with index 0 are not rows and columns of a grid"):
        crepa.loss(step=0, pixels=torch.rand(1, 3, 32, 128))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([[(1, 2, 8)], [(1, 8, 2)]], "the same for the whole batch"),
        ([[(2, 2, 4)]] * 2, r"every sample must begin with its image's \(1, height, width\)"),
        ([[(1, 4, 8)]] * 2, r"hidden_states of shape \(2, 16, 16\), expected .* at least the 4 x 8 tokens"),
    ],
)
def test_img_shapes_of_no_image_are_named(shapes: Any, message: str) -> None:
    class Correcting(QwenImageTransformer2DModel):
        def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
            return super().forward(hidden_states, **{**kwargs, "img_shapes": [[(1, 2, 8)]] * 2})

    tiny = on_grid("qwen_image", (2, 8))
    transformer = tiny.make()
    transformer.__class__ = Correcting
    crepa = crepa_on(transformer)
    transformer(**{**tiny.inputs(2, model=transformer), "img_shapes": shapes})
    with pytest.raises(ValueError, match=message):
        crepa.loss(step=0, pixels=torch.rand(2, 3, 32, 128))


def test_img_shapes_in_one_list_are_those_of_the_samples() -> None:
    tiny = on_grid("qwen_image", (2, 8))
    transformer = tiny.make()
    crepa = crepa_on(transformer)
    transformer(**{**tiny.inputs(2, model=transformer), "img_shapes": [(1, 2, 8), (1, 2, 8)]})
    assert crepa.captured().layout.grid == (2, 8)


def test_images_in_layers_are_refused() -> None:
    tiny = on_grid("qwen_image", (2, 8))
    transformer = tiny.make(use_layer3d_rope=True)
    crepa = crepa_on(transformer)
    transformer(**tiny.inputs(model=transformer))
    with pytest.raises(ValueError, match="images in layers are not supported"):
        crepa.captured()


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


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_a_copy_of_a_model_that_has_run_captures_nothing_of_the_first(name: str) -> None:
    tiny = FAMILIES[name]
    transformer = tiny.make()
    crepa = crepa_on(transformer)
    inputs = tiny.inputs(model=transformer)
    transformer(**inputs)
    layout = crepa.captured().layout
    for other in (copy.deepcopy(transformer), pickle.loads(pickle.dumps(transformer))):
        other(**inputs)
    assert crepa.captured().layout == layout
