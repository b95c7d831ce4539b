"""Where an image's tokens lie: what a forward's own ids and shapes say, with references beside the image."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from tiny_families import FAMILIES, TinyFamily, crepa_on, on_grid

from crepa_kernels.models.image_ids import ImageIds, image_grid


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


def test_ids_that_are_others_in_every_step_do_not_pile_up() -> None:
    ids, kept = torch.cartesian_prod(torch.arange(1), torch.arange(2), torch.arange(3)).double(), ImageIds()
    read = [weakref.ref(kept.read(ids + step)) for step in range(100)]
    gc.collect()
    alive = [each() for each in read]
    assert alive[:36] == [None] * 36
    assert all(each is not None and each.grid(0) == (2, 3) for each in alive[36:])
    assert kept.read(ids + 50) is alive[50]


@pytest.mark.parametrize("column", [0, 1, 2])
def test_ids_that_are_nan_lie_on_no_grid(column: int) -> None:
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(2), torch.arange(3)).double()
    ids[:, column] = float("nan")
    with pytest.raises(ValueError, match="are not rows and columns of a grid"):
        image_grid(ids)


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
