"""Every family's stock transformer under CREPA: what is captured, where gradients go, and what is refused."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import clip_pixels, tiny_dinov2
from tiny_families import FAMILIES, SPARSE_KANDINSKY, WIDTH, TinyFamily
from torch.utils.checkpoint import checkpoint

from crepa_kernels import CrepaRegularizer
from crepa_kernels.attach import PROJECTOR_NAME
from crepa_kernels.families import family_of, image_to_video_mask, supported_families

STUDENT, TEACHER = 1, 2
CONFIG: dict[str, Any] = {"crepa_enabled": True, "crepa_block_index": STUDENT, "crepa_encoder_image_size": 70}
BACKBONE: dict[str, Any] = {"crepa_feature_source": "backbone", "crepa_teacher_block_index": TEACHER}

every_family = pytest.mark.parametrize("name", FAMILIES)


def regularizer(transformer: Any, **settings: Any) -> CrepaRegularizer:
    torch.manual_seed(0)  # the projector's weights
    backbone = "crepa_feature_source" in settings
    return CrepaRegularizer({**CONFIG, **settings}, transformer, encoder=None if backbone else tiny_dinov2())


def pixels_of(tiny: TinyFamily, batch: int) -> torch.Tensor:
    frames, height, width = tiny.latents
    return clip_pixels(batch, 1 + 4 * (frames - 1), 8 * height, 8 * width)


def video_output(transformer: Any, path: str) -> list[torch.Tensor]:
    """A list that gets the video tokens (B, tokens, D) of the block at ``path`` of each forward."""
    seen: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    transformer.get_submodule(path).register_forward_hook(keep)
    return seen


# The table


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
    assert {type(block).__name__ for block in blocks} <= set(family.block_classes)
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: ran.append(module))
    transformer(**tiny.inputs(model=transformer))
    assert ran == blocks


@every_family
def test_the_weights_that_come_after_the_last_block_are_those_of_the_row(name: str) -> None:
    tiny = FAMILIES[name]
    transformer = tiny.make()
    seen = video_output(transformer, tiny.blocks[-1])
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


def by_hand(tokens: torch.Tensor, tiny: TinyFamily, tile: int = 1) -> torch.Tensor:
    """(B, tokens, D) in the transformer's order -> (B, T, P, D), token by token."""
    frames, (height, width) = tiny.frames, tiny.grid
    result = tokens.new_empty(len(tokens), frames, height * width, tokens.shape[-1])
    for frame in range(frames):
        for y in range(height):
            for x in range(width):
                square = (y // tile) * (width // tile) + x // tile
                place = square * tile * tile + (y % tile) * tile + x % tile
                result[:, frame, y * width + x] = tokens[:, frame * height * width + place]
    return result


@every_family
def test_states_are_the_blocks_output_by_frame_and_raster_position(name: str) -> None:
    tiny = FAMILIES[name]
    for index, path in enumerate(tiny.blocks):
        transformer = tiny.make()
        seen = video_output(transformer, path)
        crepa = regularizer(transformer, crepa_block_index=index)
        transformer(**tiny.inputs(2, model=transformer))
        states, layout = crepa._capture.states(index)
        assert (layout.frames, layout.grid, layout.latent_shape) == (tiny.frames, tiny.grid, tiny.latents)
        assert torch.equal(states, by_hand(seen[0], tiny))
        assert states.requires_grad


@every_family
def test_arguments_may_be_given_by_position(name: str) -> None:
    tiny = FAMILIES[name]
    transformer = tiny.make()
    crepa = regularizer(transformer)
    inputs = tiny.inputs(2, model=transformer)
    transformer(**inputs)
    expected = crepa._capture.states(STUDENT)
    leading = itertools.takewhile(inputs.__contains__, inspect.signature(transformer.forward).parameters)
    by_position = [inputs.pop(argument) for argument in list(leading)]
    assert len(by_position) >= 3
    transformer(*by_position, **inputs)
    found = crepa._capture.states(STUDENT)
    assert found.layout == expected.layout
    assert torch.equal(found.hidden_states, expected.hidden_states)


@every_family
@pytest.mark.parametrize("return_dict", [True, False])
def test_the_prediction_does_not_change(name: str, return_dict: bool) -> None:
    tiny = FAMILIES[name]
    plain, transformer = tiny.make(), tiny.make()
    regularizer(transformer)
    inputs = tiny.inputs(model=plain)
    outputs = [model(**inputs, return_dict=return_dict) for model in (plain, transformer)]
    assert type(outputs[0]) is type(outputs[1])
    assert torch.equal(outputs[0][0], outputs[1][0])


def test_the_token_order_of_sparse_attention_is_undone() -> None:
    tiny = SPARSE_KANDINSKY
    transformer = tiny.make().requires_grad_(False)
    seen = video_output(transformer, tiny.blocks[STUDENT])
    crepa = regularizer(transformer)
    with attention_backend("flex"):
        transformer(**tiny.inputs(model=transformer))
    states, layout = crepa._capture.states(STUDENT)
    assert (layout.frames, layout.grid) == (2, (8, 16))
    assert torch.equal(states, by_hand(seen[0], tiny, tile=8))
    assert not torch.equal(states, by_hand(seen[0], tiny))


# Where gradients go


def training_step(name: str, settings: dict[str, Any], prepare: Callable[[Any], None]) -> dict[str, torch.Tensor]:
    """Gradients of the prediction's square and the CREPA loss, "states" and every weight, with frame 0 masked."""
    tiny = FAMILIES[name]
    transformer = tiny.make()
    prepare(transformer)
    crepa = regularizer(transformer, **settings)
    inputs = tiny.inputs(2, model=transformer)
    # A reentrant checkpoint passes gradients only to inputs that ask for them.
    inputs["hidden_states"].requires_grad_(True)
    prediction = transformer(**inputs)[0]
    states = crepa._capture._slots[STUDENT].output
    assert states is not None
    mask = torch.ones(2, tiny.frames, dtype=torch.bool)
    mask[:, 0] = False
    pixels = None if "crepa_feature_source" in settings else pixels_of(tiny, 2)
    aux, logs = crepa.loss(step=0, pixels=pixels, frame_mask=mask)
    assert -1 <= logs["crepa_similarity"] <= 1
    (to_states,) = torch.autograd.grad(aux, states, retain_graph=True)
    (prediction.square().mean() + aux).backward()
    assert crepa._capture._slots[STUDENT].output is states, "the recomputation in the backward was captured"
    gradients = {n: p.grad for n, p in transformer.named_parameters() if p.grad is not None}
    return {"states": to_states, **gradients}


def leave(transformer: Any) -> None:
    """Trains it as it is."""


@every_family
@pytest.mark.parametrize("settings", [{}, BACKBONE], ids=["dinov2", "backbone"])
def test_the_gradient_reaches_every_token_of_every_unmasked_frame(name: str, settings: dict[str, Any]) -> None:
    tiny = FAMILIES[name]
    gradients = training_step(name, settings, leave)
    reached = by_hand(gradients["states"], tiny).abs().sum(-1) > 0
    assert not reached[:, 0].any()
    assert reached[:, 1:].all()
    for parameter in ("0.weight", "0.bias", "1.weight", "1.bias"):
        assert gradients[f"{PROJECTOR_NAME}.{parameter}"].any()


def reentrant(module: torch.nn.Module, *args: Any) -> Any:
    return checkpoint(module.__call__, *args, use_reentrant=True)


@every_family
@pytest.mark.parametrize("settings", [{}, BACKBONE], ids=["dinov2", "backbone"])
@pytest.mark.parametrize("mode", [None, reentrant], ids=["not reentrant", "reentrant"])
def test_checkpointing_gives_the_same_gradients(name: str, settings: dict[str, Any], mode: Any) -> None:
    expected = training_step(name, settings, leave)
    if mode is None:
        found = training_step(name, settings, lambda transformer: transformer.enable_gradient_checkpointing())
    else:
        found = training_step(name, settings, lambda transformer: transformer.enable_gradient_checkpointing(mode))
    assert expected.keys() == found.keys()
    for key, gradient in expected.items():
        # The same operations in the same order; a reentrant backward adds up in another one.
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)


def compile_blocks(transformer: Any) -> None:
    """As the family's documentation says: diffusers' own way, or block by block where it has none."""
    if transformer._repeated_blocks:
        transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    else:
        for block in family_of(transformer).blocks(transformer):
            block.compile(backend="aot_eager", fullgraph=True)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@every_family
def test_compiled_blocks_give_the_same_gradients_and_are_not_recompiled(name: str, checkpointing: bool) -> None:
    expected = training_step(name, {}, leave)
    made: list[Any] = []

    def compiled(transformer: Any) -> None:
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        compile_blocks(transformer)
        made.append(transformer)

    torch._dynamo.reset()
    try:
        found = training_step(name, {}, compiled)
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5)  # fused chains round elsewhere
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in range(3):
                inputs = FAMILIES[name].inputs(2, seed=seed, model=made[0])
                inputs["hidden_states"].requires_grad_(True)
                made[0](**inputs)[0].sum().backward()
    finally:
        torch._dynamo.reset()


# Adapters


def add_lora(transformer: Any, tiny: TinyFamily, blocks: tuple[str, ...]) -> None:
    transformer.requires_grad_(False)
    targets = [f"{path}.{tiny.query}" for path in blocks]
    transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


@every_family
def test_gradients_reach_the_adapters_up_to_the_block_and_no_further(name: str) -> None:
    tiny = FAMILIES[name]
    transformer = tiny.make()
    add_lora(transformer, tiny, tiny.blocks)
    crepa = regularizer(transformer)
    transformer.enable_gradient_checkpointing()
    transformer(**tiny.inputs(model=transformer))
    crepa.loss(step=0, pixels=pixels_of(tiny, 1))[0].backward()
    reached = {n for n, parameter in transformer.named_parameters() if "lora" in n and parameter.grad is not None}
    expected = {
        n for n, _ in transformer.named_parameters() if "lora" in n and n.startswith(tiny.blocks[: STUDENT + 1])
    }
    assert reached == expected
    assert all(transformer.get_parameter(n).grad.any() for n in reached)


@every_family
def test_a_lora_after_the_captured_block_is_warned_about_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    tiny = FAMILIES[name]
    transformer = tiny.make()
    add_lora(transformer, tiny, tiny.blocks[STUDENT + 1 :])
    crepa = regularizer(transformer)
    with caplog.at_level(logging.WARNING, logger="crepa_kernels"):
        for _ in range(2):
            transformer(**tiny.inputs(model=transformer))
            aux, _ = crepa.loss(step=0, pixels=pixels_of(tiny, 1))
            aux.backward()
    assert [r.getMessage() for r in caplog.records if "only CREPA's projector learns" in r.getMessage()] == [
        f"no trainable weight acts on block {STUDENT} or before it (no adapter reaches a block up to it): "
        "only CREPA's projector learns from CREPA"
    ]
    assert all(parameter.grad is not None for parameter in transformer.crepa_projector.parameters())


@every_family
def test_a_saved_model_is_the_stock_one_without_the_projector(name: str, tmp_path: Path) -> None:
    tiny = FAMILIES[name]
    transformer = tiny.make()
    crepa = regularizer(transformer)
    transformer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert not [key for key in weights if PROJECTOR_NAME in key]
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == type(transformer).__name__
    loaded, report = type(transformer).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    crepa.remove()
    inputs = tiny.inputs(model=transformer)
    # A copy's weights are aligned in memory as those of the other one.
    assert torch.equal(copy.deepcopy(loaded).train()(**inputs)[0], transformer(**inputs)[0])


# Image to video


@pytest.mark.parametrize(
    ("name", "settings", "clean"),
    [
        ("wan", {}, True),  # Wan 2.2 5B
        ("wan", {"in_channels": 12}, False),  # the image and its mask in channels
        ("ltxvideo", {}, True),
        ("sanavideo", {}, True),
        ("kandinsky5_video", {"visual_cond": True}, True),
        ("cogvideox", {"in_channels": 8}, False),
        ("hunyuan_video", {"image_condition_type": "latent_concat"}, False),
        ("hunyuan_video", {"image_condition_type": "token_replace"}, True),
    ],
)
def test_frame_0_is_masked_where_its_tokens_are_clean(name: str, settings: dict[str, Any], clean: bool) -> None:
    mask = image_to_video_mask(FAMILIES[name].make(**settings), 2, 3)
    assert (None if mask is None else mask.tolist()) == ([[False, True, True]] * 2 if clean else None)


# What is refused


@pytest.mark.parametrize("missing", [("num_frames",), ("height", "width")])
def test_a_packed_forward_without_its_sizes_is_named_at_the_loss(missing: tuple[str, ...]) -> None:
    tiny = FAMILIES["ltxvideo"]
    transformer = tiny.make()
    crepa = regularizer(transformer)
    inputs = tiny.inputs(model=transformer)
    # Coordinates of its own stand in for the sizes, which the model then does without.
    for argument in missing:
        del inputs[argument]
    inputs["video_coords"] = torch.zeros(1, 3, inputs["hidden_states"].shape[1])
    transformer(**inputs)
    with pytest.raises(ValueError, match=f"called without {', '.join(missing)}: CREPA needs num_frames="):
        crepa.loss(step=0, pixels=pixels_of(tiny, 1))


def test_tokens_beside_the_clips_are_refused() -> None:
    tiny = FAMILIES["ltxvideo"]
    transformer = tiny.make()
    crepa = regularizer(transformer)
    inputs = tiny.inputs(model=transformer)
    # As with conditioning tokens in front of the clip's.
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"][:, :24], inputs["hidden_states"]], dim=1)
    inputs["video_coords"] = torch.zeros(1, 3, 96)
    transformer(**inputs)
    with pytest.raises(ValueError, match=r"block 1 returned \(1, 96, 32\), expected \(B, 72, D\): 3 frames of 4 x 6"):
        crepa.loss(step=0, pixels=pixels_of(tiny, 1))


@every_family
def test_a_block_index_out_of_range_says_which_are_valid(name: str) -> None:
    tiny = FAMILIES[name]
    count = len(tiny.blocks)
    message = rf"crepa_block_index = {count}: this \w+ has {count} blocks, valid are 0 to {count - 1}"
    with pytest.raises(ValueError, match=message):
        regularizer(tiny.make(), crepa_block_index=count)


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
