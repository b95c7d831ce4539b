"""iREPA: the convolution, the teacher's norm, and the step of both against the loss written out."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny import clip_pixels, tiny_dinov2, tiny_wan, wan_inputs
from tiny_families import FAMILIES
from tiny_unets import tiny_unet, unet_inputs
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional

from crepa_kernels import CrepaConfig, CrepaRegularizer, UrepaConfig, UrepaRegularizer
from crepa_kernels.projector import ConvolutionProjector
from crepa_kernels.teachers import spatially_normalized

ALPHA = 0.6  # the default, as the paper's
CONFIG: dict[str, Any] = {
    "crepa_enabled": True,
    "crepa_block_index": 1,
    "crepa_encoder_image_size": 70,
    "irepa_enabled": True,
}


def regularizer(transformer: nn.Module, **options: Any) -> CrepaRegularizer:
    settings = {key: options.pop(key) for key in list(options) if key.startswith(("crepa_", "irepa_"))}
    torch.manual_seed(0)
    return CrepaRegularizer({**CONFIG, **settings}, transformer, **options)


def features(batch: int = 1, frames: int = 3, tokens: int = 6, size: int = 8) -> torch.Tensor:
    # Far from centered, as real features are: without the norm the mean is most of them.
    generator = torch.Generator().manual_seed(6)
    return torch.randn(batch, frames, tokens, size, generator=generator) + 3 * torch.randn(size, generator=generator)


# The plain definitions, from the paper's equations


def normalized(features: torch.Tensor, alpha: float) -> torch.Tensor:
    mean, std = features.mean(-2, keepdim=True), features.std(-2, keepdim=True)  # over patches, unbiased
    return (features - alpha * mean) / (std + 1e-6)


def convolved(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B, T, P, D) -> (B, T, P, E): every frame on its own, every token from its neighbours on the grid."""
    side = weight.shape[-1]
    frames = []
    for clip in states:
        for frame in clip:
            image = functional.pad(frame.unflatten(0, grid), (0, 0, *[side // 2] * 4))
            tokens = [
                torch.einsum("yxd,edyx->e", image[y : y + side, x : x + side], weight) + bias
                for y in range(grid[0])
                for x in range(grid[1])
            ]
            frames.append(torch.stack(tokens))
    return torch.stack(frames).unflatten(0, states.shape[:2])


def aligned(p: torch.Tensor, teacher: torch.Tensor, distance: int = 1) -> torch.Tensor:
    """CREPA's loss of rows that are on one grid, with tau 1."""
    p, teacher = (functional.normalize(x, dim=-1) for x in (p, teacher))
    similarity = torch.einsum("bfme,bkme->bfk", p, teacher) / p.shape[2]
    total = similarity.diagonal(dim1=1, dim2=2)
    for offset in (distance, -distance) if distance else ():
        own = [f for f in range(p.shape[1]) if 0 <= f + offset < p.shape[1]]
        weight = torch.zeros_like(total)
        for f in own:
            weight[:, f] = similarity[:, f, f + offset] * torch.exp(torch.tensor(-1.0 * distance))
        total = total + weight
    return -total.mean()


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, gradient in expected.items():
        # fp32 sums in another order.
        torch.testing.assert_close(found[name], gradient, rtol=2e-4, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")


# The parts


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_the_projector_is_a_convolution_over_each_frame(kernel: int) -> None:
    torch.manual_seed(0)
    projector = ConvolutionProjector(5, 4, kernel).double()
    assert not projector[0].bias.any()
    nn.init.normal_(projector[0].bias)
    states = torch.randn(2, 3, 8, 5, dtype=torch.float64, requires_grad=True)
    found, expected = (
        projector.of_tokens(states, (2, 4)),
        convolved(states, projector[0].weight, projector[0].bias, (2, 4)),
    )
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(found)
    inputs = [states, *projector.parameters()]
    for one, other in zip(*(torch.autograd.grad(p, inputs, direction) for p in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_convolution_is_in_the_states_type_and_gradients_in_the_weights(dtype: torch.dtype) -> None:
    projector = ConvolutionProjector(8, 4)
    states = torch.randn(1, 2, 6, 8, dtype=dtype, requires_grad=True)
    p = projector.of_tokens(states, (2, 3))
    assert p.dtype == dtype
    p.float().square().sum().backward()
    assert states.grad.dtype == dtype
    assert all(weight.grad.dtype == torch.float32 for weight in projector.parameters())
    exact = convolved(states.double(), *(x.double() for x in projector[0].parameters()), (2, 3))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(p.double(), exact, rtol=4 * eps, atol=8 * eps)  # of sums of 72 terms around 1
    with torch.autocast("cpu", torch.bfloat16):
        assert projector.of_tokens(states, (2, 3)).dtype == torch.bfloat16


def test_its_state_dict_is_that_of_the_plain_layers_and_its_slices_are_plain() -> None:
    projector = ConvolutionProjector(8, 4, 5)
    shapes = {name: tuple(tensor.shape) for name, tensor in projector.state_dict().items()}
    assert shapes == {"0.weight": (4, 8, 5, 5), "0.bias": (4,)}
    nn.Sequential(nn.Conv2d(8, 4, 5, padding=2)).load_state_dict(projector.state_dict())
    assert type(projector[:1]) is nn.Sequential
    assert projector.sizes == ConvolutionProjector.sizes_in(projector.state_dict()) == (8, 4, 5)
    copied = copy.deepcopy(projector)
    assert copied.sizes == projector.sizes


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((8, 4, 2), "kernel_size must be odd, got 2"),
        ((8, 4, 0), "kernel_size must be positive integers, got 8 and 4 and 0"),
        ((8, 0), "must be positive integers, got 8 and 0"),
        ((2**31, 2**31, 5), "too large for 64 bits"),
    ],
)
def test_a_projector_of_wrong_sizes_is_an_error(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvolutionProjector(*sizes)


def test_a_grid_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"grid \(2, 2\) does not have the 6 tokens"):
        ConvolutionProjector(8, 4).of_tokens(torch.zeros(1, 2, 6, 8), (2, 2))


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_teacher_is_normalized_over_the_patches_of_each_frame(dtype: torch.dtype, alpha: float) -> None:
    given = features(2).to(dtype)
    found = spatially_normalized(given, alpha)
    assert found.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    expected = normalized(given.double(), alpha)
    eps = max(torch.finfo(found.dtype).eps, 1e-15)
    torch.testing.assert_close(found.double(), expected, rtol=8 * eps, atol=16 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_frame_becomes_nan(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    one_patch = torch.randn(2, 3, 1, 8, generator=generator).to(dtype)
    assert torch.equal(spatially_normalized(one_patch, 1.0).to(dtype), one_patch)
    constant = one_patch.expand(2, 3, 6, 8)
    for alpha in (0.0, 0.6, 1.0):
        assert spatially_normalized(constant, alpha).isfinite().all()
        assert not spatially_normalized(torch.zeros(1, 2, 6, 8, dtype=dtype), alpha).any()


# The step


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_the_loss_written_out(name: str) -> None:
    tiny = FAMILIES[name]
    plain, transformer = tiny.make(), tiny.make()
    outputs: list[Any] = []
    plain.get_submodule(tiny.blocks[1]).register_forward_hook(lambda module, args, output: outputs.append(output))
    crepa = regularizer(transformer, feature_size=8)
    teacher = features(2, tiny.frames, tiny.grid[0] * tiny.grid[1])
    inputs = tiny.inputs(2)

    prediction = plain(**inputs)[0]
    output = tiny.tokens(outputs[0])
    convolution = copy.deepcopy(crepa.projector)
    p = convolved(output.unflatten(1, (tiny.frames, -1)), convolution[0].weight, convolution[0].bias, tiny.grid)
    expected = 0.5 * aligned(p, normalized(teacher, ALPHA))
    (prediction.square().mean() + expected).backward()

    prediction = transformer(**inputs)[0]
    aux, logs = crepa.loss(step=0, features=teacher)
    (prediction.square().mean() + aux).backward()
    torch.testing.assert_close(aux.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert -1 <= logs["crepa_similarity"] <= 1
    wanted = gradients(plain) | {f"crepa_projector.{name}": grad for name, grad in gradients(convolution).items()}
    assert_same(gradients(transformer), wanted)


def test_other_grids_masks_kernels_and_alphas() -> None:
    transformer = tiny_wan()
    outputs: list[torch.Tensor] = []
    transformer.blocks[1].register_forward_hook(lambda module, args, output: outputs.append(output))
    options = {"irepa_spatial_norm_alpha": 0.9, "irepa_projector_kernel_size": 5, "crepa_adjacent_distance": 0}
    crepa = regularizer(transformer, feature_size=8, **options)
    transformer(**wan_inputs(batch=2))
    teacher = features(2, 3, 20)
    mask = torch.tensor([[False, True, True], [True, True, True]])
    found, _ = crepa.loss(step=0, features=teacher, feature_grid=(4, 5), frame_mask=mask)
    p = convolved(outputs[0].unflatten(1, (3, 6)), *crepa.projector[0].parameters(), (2, 3))
    images = normalized(teacher, 0.9).flatten(0, 1).unflatten(1, (4, 5)).movedim(-1, 1)
    # First the norm, then the student's grid.
    smaller = functional.interpolate(images, (2, 3), mode="bilinear", antialias=True)
    rows = smaller.flatten(2).transpose(1, 2).unflatten(0, (2, 3))
    first = aligned(p[:1, 1:], rows[:1, 1:], 0)
    expected = 0.5 * (first + aligned(p[1:], rows[1:], 0)) / 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    matrix = crepa.similarity_matrix(features=teacher, feature_grid=(4, 5), frame_mask=mask)
    torch.testing.assert_close(-matrix[0].diagonal()[1:].mean(), first, rtol=1e-5, atol=1e-6)


def test_raw_features_give_the_loss_of_the_pixels_that_they_are_of() -> None:
    transformer, encoder = tiny_wan(), tiny_dinov2()
    crepa = regularizer(transformer, encoder=encoder)
    transformer(**wan_inputs())
    pixels = clip_pixels()
    aux, _ = crepa.loss(step=0, pixels=pixels)
    images = functional.interpolate(pixels[0, [0, 4, 8]].float() / 255, (70, 70), mode="bilinear", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        raw = encoder((images - mean[:, None, None]) / std[:, None, None]).last_hidden_state[:, 1:]
    again, _ = crepa.loss(step=0, features=raw[None], feature_grid=(5, 5))
    torch.testing.assert_close(again, aux, rtol=1e-5, atol=1e-6)


def test_a_deeper_block_that_teaches_is_normalized_too() -> None:
    transformer = tiny_wan()
    outputs: list[torch.Tensor] = []
    for block in transformer.blocks[1:]:
        block.register_forward_hook(lambda module, args, output: outputs.append(output.unflatten(1, (3, 6))))
    crepa = regularizer(transformer, crepa_use_backbone_features=True, crepa_teacher_block_index=2)
    transformer(**wan_inputs())
    found, _ = crepa.loss(step=0)
    p = convolved(outputs[0], *crepa.projector[0].parameters(), (2, 3))
    expected = 0.5 * aligned(p, normalized(outputs[1].detach(), ALPHA))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_training_raises_the_similarity() -> None:
    transformer = tiny_wan()
    crepa = regularizer(transformer, feature_size=8)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=3e-3)
    crepa.check_optimizer(optimizer)
    found = []
    for step in range(12):
        prediction = transformer(**wan_inputs())[0]
        aux, logs = crepa.loss(step=step, features=features())
        (prediction.square().mean() + aux).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(logs["crepa_similarity"]))
    assert found[-1] > found[0] + 0.1


# Attached, watched, saved and sharded as the other projector


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: model.crepa_projector.to(torch.bfloat16), "must stay fp32, but 0.weight was cast"),
        (lambda model: model.requires_grad_(False), "must be trainable, but 0.weight is frozen"),
        (lambda model: setattr(model.crepa_projector, "0", nn.Linear(1, 1)), "was wrapped by an adapter"),
        (lambda model: delattr(model, "crepa_projector"), "is gone from the transformer"),
    ],
)
def test_what_is_done_to_it_afterwards_is_an_error(spoil: Any, message: str) -> None:
    transformer = tiny_wan()
    crepa = regularizer(transformer, feature_size=8)
    transformer(**wan_inputs())
    spoil(transformer)
    with pytest.raises(ValueError, match=f"crepa_projector {message}"):
        crepa.loss(step=0, features=features())


def test_a_projector_that_no_optimizer_changes_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    transformer = tiny_wan()
    crepa = regularizer(transformer, feature_size=8)
    for step in range(8):
        transformer(**wan_inputs())
        crepa.loss(step=step, features=features())
    assert [record.levelno for record in caplog.records if "has not changed" in record.message] == [logging.WARNING]


def test_it_is_saved_and_loaded_with_its_settings(tmp_path: Path) -> None:
    transformer = tiny_wan()
    crepa = regularizer(transformer, feature_size=8, irepa_projector_kernel_size=5)
    crepa.save_pretrained(tmp_path)
    assert {n: tuple(t.shape) for n, t in load_file(tmp_path / "crepa_projector.safetensors").items()} == {
        "0.weight": (8, 32, 5, 5),
        "0.bias": (8,),
    }
    other = tiny_wan()
    loaded = CrepaRegularizer.from_pretrained(tmp_path, other)
    assert loaded.config == crepa.config
    for model, each in ((transformer, crepa), (other, loaded)):
        model(**wan_inputs())
        each.aux = each.loss(step=0, features=features())[0]
    assert torch.equal(crepa.aux, loaded.aux)
    loaded.load_state_dict(crepa.state_dict())
    three = regularizer(tiny_wan(), feature_size=8)
    with pytest.raises(ValueError, match=r"from 32 to 8 by a kernel of 5, this one goes from 32 to 8 by a kernel of 3"):
        three.load_state_dict(crepa.state_dict())
    linear = regularizer(tiny_wan(), feature_size=8, irepa_enabled=False)
    with pytest.raises(ValueError, match=r"does not hold a projector's weights \(LayerNorm '0\.\*', Linear '1\.\*'\)"):
        linear.load_state_dict(crepa.state_dict())
    with pytest.raises(ValueError, match=r"does not hold a projector's weights \(Conv2d '0\.\*', iREPA's\)"):
        three.load_state_dict(linear.state_dict())


def test_a_sharded_convolution_gives_the_same_gradients() -> None:
    whole = tiny_wan()
    crepa = regularizer(whole, feature_size=8)
    whole(**wan_inputs())
    crepa.loss(step=0, features=features())[0].backward()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        transformer = tiny_wan()
        crepa = regularizer(transformer, feature_size=8)
        fully_shard(transformer.crepa_projector)
        fully_shard(transformer)
        assert all(type(p) is DTensor for p in transformer.crepa_projector.parameters())
        transformer(**wan_inputs())
        crepa.loss(step=0, features=features())[0].backward()
        found = {name: grad.full_tensor() for name, grad in gradients(transformer).items()}
        # A unit that shards has a gradient for every weight.
        found = {name: grad for name, grad in found.items() if name in gradients(whole)}
        assert_same(found, gradients(whole))
        assert all(type(tensor) is torch.Tensor for tensor in crepa.state_dict()["projector"].values())
        crepa.load_state_dict(crepa.state_dict())
    finally:
        dist.destroy_process_group()


# U-REPA


@pytest.mark.parametrize("manifold", [0.0, 3.0])
def test_urepas_alignment_and_relations_are_of_the_convolution_and_the_normalized_teacher(manifold: float) -> None:
    unet = tiny_unet()
    middles: list[torch.Tensor] = []
    unet.mid_block.register_forward_hook(lambda module, args, output: middles.append(output))
    torch.manual_seed(0)
    settings = {"urepa_enabled": True, "irepa_enabled": True, "urepa_manifold_weight": manifold}
    urepa = UrepaRegularizer(settings, unet, feature_size=8)
    unet(**unet_inputs())
    teacher = features(2, 1, 30)[:, 0]
    convolutions: list[torch.Tensor] = []
    urepa.projector.register_forward_hook(lambda module, args, output: convolutions.append(output))
    found, logs = urepa.loss(step=0, features=teacher, feature_grid=(5, 6))
    assert len(convolutions) == 1, "p is made once for both parts"

    convolution = copy.deepcopy(urepa.projector)
    states = middles[0].flatten(2).transpose(1, 2)[:, None]
    p = convolved(states, *convolution[0].parameters(), (4, 4)).squeeze(1)
    larger = functional.interpolate(p.transpose(1, 2).unflatten(2, (4, 4)), (5, 6), mode="bilinear")
    p, y = (functional.normalize(x, dim=-1) for x in (larger.flatten(2).transpose(1, 2), normalized(teacher, ALPHA)))
    relations = (p @ p.transpose(1, 2) - y @ y.transpose(1, 2)).square().mean()
    expected = 0.5 * (manifold * relations - (p * y).sum(-1).mean())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert ("urepa_manifold_loss" in logs) == (manifold > 0)
    inner = [*unet.mid_block.parameters()]
    ours, theirs = (torch.autograd.grad(loss, inner, retain_graph=True) for loss in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6 + 1e-4 * float(other.abs().max()))
    own = torch.autograd.grad(found, [*urepa.projector.parameters()])
    for one, other in zip(own, torch.autograd.grad(expected, [*convolution.parameters()]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_urepas_convolution_is_saved_and_loaded(tmp_path: Path) -> None:
    unet = tiny_unet("sd15")
    settings = {"urepa_enabled": True, "irepa_enabled": True, "irepa_projector_kernel_size": 1}
    urepa = UrepaRegularizer(settings, unet, feature_size=8)
    urepa.save_pretrained(tmp_path)
    loaded = UrepaRegularizer.from_pretrained(tmp_path, tiny_unet("sd15"))
    assert loaded.config == urepa.config
    assert loaded.projector.sizes == (16, 8, 1)
    for one, other in zip(loaded.projector.parameters(), urepa.projector.parameters(), strict=True):
        assert torch.equal(one, other)


def test_it_needs_what_it_modifies() -> None:
    for config, switch in ((CrepaConfig, "crepa_enabled"), (UrepaConfig, "urepa_enabled")):
        with pytest.raises(ValueError, match=rf"irepa_enabled = true: .*CREPA or U-REPA, so it needs {switch} = true"):
            config.from_dict({"irepa_enabled": True, switch: False})
    with pytest.raises(ValueError, match=r"irepa_projector_kernel_size = 2: .*an integer >= 1 and odd"):
        UrepaConfig.from_dict({"urepa_enabled": True, "irepa_enabled": True, "irepa_projector_kernel_size": 2})
