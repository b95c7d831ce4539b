"""Every family's stock transformer: the rows of the table, what is captured, and what is refused."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel, WanTransformer3DModel
from diffusers.models.attention_dispatch import attention_backend
from tiny_families import FAMILIES, SPARSE_KANDINSKY, WIDTH, TinyFamily, by_frame, crepa_on, pixels_of

from crepa_kernels import image_to_video_mask, supported_families
from crepa_kernels.models.families import family_of
from crepa_kernels.models.layouts import TokenLayout

STUDENT = 1

every_family = pytest.mark.parametrize("name", FAMILIES)


def video_output(transformer: Any, tiny: TinyFamily, path: str) -> list[torch.Tensor]:
    """A list that gets the video or image tokens (B, tokens, D) of the block at ``path`` of each forward."""
    seen: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        seen.append(tiny.tokens(output))

    transformer.get_submodule(path).register_forward_hook(keep)
    return seen


# The table

BLOCK_CLASSES = {
    "wan": ("WanTransformerBlock",),
    "ltxvideo": ("LTXVideoTransformerBlock",),
    "sanavideo": ("SanaVideoTransformerBlock",),
    "kandinsky5_video": ("Kandinsky5TransformerDecoderBlock",),
    "cogvideox": ("CogVideoXBlock",),
    "hunyuan_video": (
        "HunyuanVideoTransformerBlock",
        "HunyuanVideoSingleTransformerBlock",
        "HunyuanVideoTokenReplaceTransformerBlock",
        "HunyuanVideoTokenReplaceSingleTransformerBlock",
    ),
    "flux": ("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    "flux2": ("Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
    "sd3": ("JointTransformerBlock",),
    "qwen_image": ("QwenImageTransformerBlock",),
    "chroma": ("ChromaTransformerBlock", "ChromaSingleTransformerBlock"),
    "sana": ("SanaTransformerBlock",),
    "pixart": ("BasicTransformerBlock",),
}


def test_every_family_is_tested_here() -> None:
    assert {tiny.name for tiny in FAMILIES.values()} == set(supported_families())


@every_family
def test_a_row_names_the_blocks_in_the_order_in_which_they_run(name: str) -> None:
    tiny = FAMILIES[name]
    transformer, ran = tiny.make(), []
    family = family_of(transformer)
    assert family.name == tiny.name
    assert family.hidden_size(transformer.config) == WIDTH
    blocks = family.blocks(transformer)
    assert blocks == [transformer.get_submodule(path) for path in tiny.blocks]
    assert {type(block).__name__ for block in blocks} <= set(BLOCK_CLASSES[family.name])
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: ran.append(module))
    transformer(**tiny.inputs(model=transformer))
    assert ran == blocks


@every_family
def test_the_weights_that_come_after_the_last_block_are_those_of_the_row(name: str) -> None:
    tiny = FAMILIES[name]
    transformer = tiny.make()
    seen = video_output(transformer, tiny, tiny.blocks[-1])
    transformer(**tiny.inputs(model=transformer))
    seen[0].square().sum().backward()
    top = {n.split(".", 1)[0]: [] for n, _ in transformer.named_parameters()}
    for parameter_name, parameter in transformer.named_parameters():
        top[parameter_name.split(".", 1)[0]].append(parameter.grad is not None)
    family = family_of(transformer)
    # A norm without weights is in the row as well. Of the last block, what acts on its text is not reached.
    assert {n for n, reached in top.items() if not any(reached)} == set(family.after_blocks) & set(top)
    assert all(hasattr(transformer, n) for n in family.after_blocks)


# What is captured


@every_family
def test_states_are_the_blocks_output_by_frame_and_raster_position(name: str) -> None:
    tiny = FAMILIES[name]
    for index, path in enumerate(tiny.blocks):
        transformer = tiny.make()
        seen = video_output(transformer, tiny, path)
        crepa = crepa_on(transformer, crepa_block_index=index)
        transformer(**tiny.inputs(2, model=transformer))
        states, layout = crepa.captured(index)
        assert (layout.frames, layout.grid, layout.latent_shape) == (tiny.frames, tiny.grid, tiny.latents)
        assert torch.equal(states, by_frame(seen[0], tiny))
        assert states.requires_grad


@every_family
def test_arguments_may_be_given_by_position(name: str) -> None:
    tiny = FAMILIES[name]
    transformer = tiny.make()
    crepa = crepa_on(transformer)
    inputs = tiny.inputs(2, model=transformer)
    transformer(**inputs)
    expected = crepa.captured(STUDENT)
    leading = itertools.takewhile(inputs.__contains__, inspect.signature(transformer.forward).parameters)
    by_position = [inputs.pop(argument) for argument in list(leading)]
    assert len(by_position) >= 3
    transformer(*by_position, **inputs)
    found = crepa.captured(STUDENT)
    assert found.layout == expected.layout
    assert torch.equal(found.hidden_states, expected.hidden_states)


def test_arguments_reach_a_forward_that_only_passes_them_on() -> None:
    class Passing(WanTransformer3DModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    transformer = FAMILIES["wan"].make()
    transformer.__class__ = Passing
    crepa = crepa_on(transformer)
    inputs = FAMILIES["wan"].inputs(model=transformer)
    transformer(inputs["hidden_states"], inputs["timestep"], inputs["encoder_hidden_states"])
    assert crepa.captured(STUDENT).layout.latent_shape == (3, 4, 6)


@every_family
@pytest.mark.parametrize("return_dict", [True, False])
def test_the_prediction_does_not_change(name: str, return_dict: bool) -> None:
    tiny = FAMILIES[name]
    plain, transformer = tiny.make(), tiny.make()
    crepa_on(transformer)
    inputs = tiny.inputs(model=plain)
    outputs = [model(**inputs, return_dict=return_dict) for model in (plain, transformer)]
    assert type(outputs[0]) is type(outputs[1])
    assert torch.equal(outputs[0][0], outputs[1][0])


def test_the_token_order_of_sparse_attention_is_undone() -> None:
    tiny = SPARSE_KANDINSKY
    transformer = tiny.make().requires_grad_(False)
    seen = video_output(transformer, tiny, tiny.blocks[STUDENT])
    crepa = crepa_on(transformer)
    with attention_backend("flex"):
        transformer(**tiny.inputs(model=transformer))
    states, layout = crepa.captured(STUDENT)
    assert (layout.frames, layout.grid) == (2, (8, 16))
    assert torch.equal(states, by_frame(seen[0], tiny, tile=8))
    assert not torch.equal(states, by_frame(seen[0], tiny))


def test_the_gradient_of_reordered_tokens_goes_back_to_their_own_place() -> None:
    layout = TokenLayout(frames=2, grid=(4, 6), patch=1, latent_shape=(2, 8, 12), tile=2)
    tokens = torch.zeros(1, layout.tokens, 1, requires_grad=True)
    # Frame 1, row 2, column 5: the third square of the second row of squares, its second token.
    (gradient,) = torch.autograd.grad(layout.by_frame(tokens)[0, 1, 2 * 6 + 5, 0], tokens)
    assert gradient.flatten().nonzero().tolist() == [[24 + 5 * 4 + 1]]


# What is refused


@pytest.mark.parametrize("missing", [("num_frames",), ("height", "width")])
def test_a_packed_forward_without_its_sizes_is_named_at_the_loss(missing: tuple[str, ...]) -> None:
    tiny = FAMILIES["ltxvideo"]
    transformer = tiny.make()
    crepa = crepa_on(transformer)
    inputs = tiny.inputs(model=transformer)
    # Coordinates of its own stand in for the sizes, which the model then does without.
    for argument in missing:
        del inputs[argument]
    inputs["video_coords"] = torch.zeros(1, 3, inputs["hidden_states"].shape[1])
    transformer(**inputs)
    with pytest.raises(ValueError, match=f"called without an integer {', '.join(missing)}: CREPA needs num_frames="):
        crepa.loss(step=0, pixels=pixels_of(tiny, 1))


def test_tokens_beside_the_clips_are_refused() -> None:
    tiny = FAMILIES["ltxvideo"]
    transformer = tiny.make()
    crepa = crepa_on(transformer)
    inputs = tiny.inputs(model=transformer)
    # As with conditioning tokens in front of the clip's.
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"][:, :24], inputs["hidden_states"]], dim=1)
    inputs["video_coords"] = torch.zeros(1, 3, 96)
    transformer(**inputs)
    with pytest.raises(ValueError, match=r"block 1 returned \(1, 96, 32\), expected \(B, 72, D\): 3 frames of 4 x 6"):
        crepa.loss(step=0, pixels=pixels_of(tiny, 1))


def test_latents_that_the_forward_was_not_given_are_named() -> None:
    class Keeping(WanTransformer3DModel):
        def forward(self, hidden_states: Any = None, **kwargs: Any) -> Any:
            return super().forward(self.kept if hidden_states is None else hidden_states[:, :, None], **kwargs)

    transformer = FAMILIES["wan"].make()
    transformer.__class__ = Keeping
    crepa = crepa_on(transformer)
    inputs = FAMILIES["wan"].inputs(model=transformer)
    transformer.kept = inputs.pop("hidden_states")
    transformer(**inputs)
    with pytest.raises(ValueError, match=r"without hidden_states \(B, C, T, H, W\).*none were given"):
        crepa.loss(step=0, pixels=pixels_of(FAMILIES["wan"], 1))
    transformer(hidden_states=transformer.kept[:, :, 0], **inputs)
    with pytest.raises(ValueError, match=r"got \(1, 4, 4, 6\)"):
        crepa.loss(step=0, pixels=pixels_of(FAMILIES["wan"], 1))


@every_family
def test_a_block_index_out_of_range_says_which_are_valid(name: str) -> None:
    tiny = FAMILIES[name]
    count = len(tiny.blocks)
    message = rf"crepa_block_index = {count}: this \w+ has {count} blocks, valid are 0 to {count - 1}"
    with pytest.raises(ValueError, match=message):
        crepa_on(tiny.make(), crepa_block_index=count)


def test_another_class_says_which_families_are_supported() -> None:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32,),
        norm_num_groups=8,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    with pytest.raises(ValueError, match="UNet2DModel is not a supported transformer") as error:
        family_of(unet)
    assert all(name in str(error.value) for name in supported_families())
    with pytest.raises(ValueError, match="UNet2DModel is not a supported transformer"):
        image_to_video_mask(unet, 1, 3)
