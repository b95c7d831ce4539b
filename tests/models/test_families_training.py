"""Every family trains with CREPA: gradients, checkpointing, compiled blocks, adapters and what is exported."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crepa_trainer.state import compile_blocks
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from tiny_families import FAMILIES, TinyFamily, by_frame, crepa_on, pixels_of
from torch.utils.checkpoint import checkpoint

from crepa_kernels.models.families import family_of
from crepa_kernels.regularizer.attach import CREPA

STUDENT, TEACHER = 1, 2
BACKBONE: dict[str, Any] = {"crepa_feature_source": "backbone", "crepa_teacher_block_index": TEACHER}

every_family = pytest.mark.parametrize("name", FAMILIES)


def training_step(name: str, settings: dict[str, Any], prepare: Callable[[Any], None]) -> dict[str, torch.Tensor]:
    """Gradients of the prediction's square and the CREPA loss, "states" and each weight; a clip's frame 0 is masked."""
    tiny = FAMILIES[name]
    transformer = tiny.make()
    prepare(transformer)
    crepa = crepa_on(transformer, **settings)
    inputs = tiny.inputs(2, model=transformer)
    # A reentrant checkpoint passes gradients only to inputs that ask for them.
    inputs["hidden_states"].requires_grad_(True)
    family, index = family_of(transformer), crepa.config.crepa_block_index
    outputs: list[torch.Tensor] = []
    hook = family.blocks(transformer)[index].register_forward_hook(
        lambda module, args, output: outputs.append(family.video_tokens(output))
    )
    prediction = transformer(**inputs)[0]
    hook.remove()
    (states,) = outputs
    mask = torch.ones(2, tiny.frames, dtype=torch.bool)
    mask[:, : tiny.masked] = False
    pixels = None if "crepa_feature_source" in settings else pixels_of(tiny, 2)
    aux, logs = crepa.loss(step=0, pixels=pixels, frame_mask=mask)
    assert -1 <= logs["crepa_similarity"] <= 1
    (to_states,) = torch.autograd.grad(aux, states, retain_graph=True)
    if (text := to_states.shape[1] - tiny.frames * tiny.grid[0] * tiny.grid[1]) > 0:
        assert not to_states[:, :text].any()
        to_states = to_states[:, text:]
    (prediction.square().mean() + aux).backward()
    # An error where the recomputation in the backward was captured: that does not come from these states.
    torch.autograd.grad(crepa.captured(index).hidden_states.sum(), states)
    gradients = {n: p.grad for n, p in transformer.named_parameters() if p.grad is not None}
    return {"states": to_states, **gradients}


def leave(transformer: Any) -> None:
    """Trains it as it is."""


def reentrant(module: torch.nn.Module, *args: Any) -> Any:
    return checkpoint(module.__call__, *args, use_reentrant=True)


def checkpointed(transformer: Any, mode: Any) -> None:
    """With gradient checkpointing: diffusers' own when ``mode`` is None."""
    transformer.enable_gradient_checkpointing(*([] if mode is None else [mode]))


@every_family
@pytest.mark.parametrize("settings", [{}, BACKBONE], ids=["dinov2", "backbone"])
def test_the_gradient_reaches_every_token_of_every_unmasked_frame(name: str, settings: dict[str, Any]) -> None:
    tiny = FAMILIES[name]
    gradients = training_step(name, settings, leave)
    reached = by_frame(gradients["states"], tiny).abs().sum(-1) > 0
    assert not reached[:, : tiny.masked].any()
    assert reached[:, tiny.masked :].all()
    for parameter in ("0.weight", "0.bias", "1.weight", "1.bias"):
        assert gradients[f"{CREPA.projector}.{parameter}"].any()


@pytest.mark.parametrize("mode", [None, reentrant], ids=["not reentrant", "reentrant"])
def test_single_stream_blocks_are_aligned_as_well(mode: Any) -> None:
    # Their video tokens are a part of a longer tensor, with the text after them.
    settings = {**BACKBONE, "crepa_block_index": 2, "crepa_teacher_block_index": 3}
    expected = training_step("hunyuan_video", settings, leave)
    assert (expected["states"].unflatten(1, (3, -1))[:, 1:].abs().sum(-1) > 0).all()
    found = training_step("hunyuan_video", settings, lambda transformer: checkpointed(transformer, mode))
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)  # a reentrant backward adds up otherwise


@every_family
@pytest.mark.parametrize("how", ["autocast", "bf16 weights"])
def test_states_and_gradients_in_bf16(name: str, how: str, tmp_path: Path) -> None:
    tiny = FAMILIES[name]
    transformer = tiny.make()
    inputs = tiny.inputs(2, model=transformer)
    if how == "bf16 weights":
        # Loaded as users do it: Kandinsky's time embedding stays fp32 this way and not by .to().
        transformer.save_pretrained(tmp_path)
        transformer = type(transformer).from_pretrained(tmp_path, torch_dtype=torch.bfloat16).train()
        inputs = {k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    crepa = crepa_on(transformer)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        prediction = transformer(**inputs)[0]
        aux, _ = crepa.loss(step=0, pixels=pixels_of(tiny, 2))
    assert aux.dtype == torch.float32
    (prediction.float().square().mean() + aux).backward()
    first = transformer.get_submodule(f"{tiny.blocks[0]}.{tiny.query}").weight.grad
    assert first.isfinite().all()
    assert first.any()
    assert crepa.projector[1].weight.grad.dtype == torch.float32


@pytest.mark.every(2)
@every_family
@pytest.mark.parametrize("settings", [{}, BACKBONE], ids=["dinov2", "backbone"])
@pytest.mark.parametrize("mode", [None, reentrant], ids=["not reentrant", "reentrant"])
def test_checkpointing_gives_the_same_gradients(name: str, settings: dict[str, Any], mode: Any) -> None:
    expected = training_step(name, settings, leave)
    found = training_step(name, settings, lambda transformer: checkpointed(transformer, mode))
    for key, gradient in expected.items():
        # The same operations in the same order; a reentrant backward adds up in another one.
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)
    # A reentrant one also reaches the text that the last block writes for nobody.
    extra = found.keys() - expected.keys()
    assert mode is not None or not extra
    assert not any(found[key].any() for key in extra)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@every_family
def test_compiled_blocks_give_the_same_gradients_and_are_not_recompiled(name: str, checkpointing: bool) -> None:
    expected = training_step(name, {}, leave)
    made: list[Any] = []

    def compiled(transformer: Any) -> None:
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        compile_blocks(transformer, backend="aot_eager", fullgraph=True)
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


@pytest.mark.slow
@every_family
def test_a_compiled_model_is_captured(name: str) -> None:
    tiny = FAMILIES[name]
    plain, transformer = tiny.make(), tiny.make()
    expected, crepa = crepa_on(plain), crepa_on(transformer)
    inputs = tiny.inputs(2, model=plain)
    torch._dynamo.reset()
    try:
        plain(**inputs)
        torch.compile(transformer, backend="aot_eager")(**inputs)
        losses = [one.loss(step=0, pixels=pixels_of(tiny, 2))[0] for one in (expected, crepa)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)  # fused chains round elsewhere
        losses[1].backward()
        assert transformer.get_submodule(f"{tiny.blocks[0]}.{tiny.query}").weight.grad.any()
    finally:
        torch._dynamo.reset()


# Adapters


def add_lora(transformer: Any, tiny: TinyFamily, blocks: tuple[str, ...]) -> None:
    transformer.requires_grad_(False)
    config = LoraConfig(r=2, target_modules=[tiny.query_of(path) for path in blocks], init_lora_weights=False)
    # PixArt's class has no add_adapter().
    inject_adapter_in_model(config, transformer)


@every_family
def test_gradients_reach_the_adapters_up_to_the_block_and_no_further(name: str) -> None:
    tiny = FAMILIES[name]
    transformer = tiny.make()
    add_lora(transformer, tiny, tiny.blocks)
    crepa = crepa_on(transformer)
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
    crepa = crepa_on(transformer)
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
    crepa = crepa_on(transformer)
    transformer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert not [key for key in weights if CREPA.projector in key]
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == type(transformer).__name__
    loaded, report = type(transformer).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    crepa.remove()
    inputs = tiny.inputs(model=transformer)
    # A copy's weights are aligned in memory as those of the other one.
    assert torch.equal(copy.deepcopy(loaded).train()(**inputs)[0], transformer(**inputs)[0])
