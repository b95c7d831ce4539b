"""Any frozen network teaches CrepaRegularizer, as features by hand do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import clip_pixels, tiny_wan, wan_inputs
from torch import nn

from crepa_kernels import CrepaRegularizer, FrozenEncoder

CONFIG: dict[str, Any] = {
    "crepa_enabled": True,
    "crepa_block_index": 1,
    "crepa_encoder": "colors",
    "crepa_encoder_image_size": 24,
}


class Colors(nn.Module):
    """Five numbers of each patch of 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 8, 8)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return self.convolution(frames).permute(0, 2, 3, 1)


def means(frames: torch.Tensor) -> torch.Tensor:
    return nn.functional.avg_pool2d(frames, 6).permute(0, 2, 3, 1)


def trained(give: Callable[[torch.Tensor], dict[str, Any]], **options: Any) -> dict[str, torch.Tensor]:
    """The loss of one step and its gradients, with what ``give`` makes of the clip's pixels."""
    transformer = tiny_wan()
    torch.manual_seed(0)  # the projector's weights
    crepa = CrepaRegularizer(CONFIG | options.pop("settings", {}), transformer, **options)
    transformer(**wan_inputs())
    loss, _ = crepa.loss(step=0, **give(clip_pixels(frames=9, height=24, width=24)))
    loss.backward()
    gradients = {name: each.grad for name, each in transformer.named_parameters() if each.grad is not None}
    assert "crepa_projector.1.weight" in gradients
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("make", [Colors, lambda: means], ids=["module", "callable"])
@pytest.mark.parametrize("resize", ["square", "grid"])
def test_the_loss_is_that_of_its_features_given_by_hand(make: Callable[[], Any], resize: str) -> None:
    torch.manual_seed(1)
    encode = make()
    patch = 8 if isinstance(encode, nn.Module) else None
    settings = {"crepa_encoder_resize": resize}
    encoder = FrozenEncoder(encode, patch_size=patch) if resize == "grid" else encode
    found = trained(lambda pixels: {"pixels": pixels}, encoder=encoder, settings=settings)

    def by_hand(pixels: torch.Tensor) -> dict[str, Any]:
        # Frame 0 and the last of each group of four; 24 pixels are 24, or two by three patches of 8.
        frames = pixels[0, ::4].float() / 255
        if patch and resize == "grid":
            frames = nn.functional.interpolate(frames, (16, 24), mode="bilinear", antialias=True)
        with torch.no_grad():
            return {"features": encode(frames)[None]}

    expected = trained(by_hand, feature_size=5 if patch else 3)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Batched convolutions may add up in another order.
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_the_encoder_is_in_no_optimizer_and_has_no_gradient() -> None:
    transformer, encode = tiny_wan(), Colors()
    crepa = CrepaRegularizer(CONFIG, transformer, encoder=encode)
    transformer(**wan_inputs())
    crepa.loss(step=0, pixels=clip_pixels())[0].backward()
    own = {id(each) for each in encode.parameters()}
    assert not own & {id(each) for each in transformer.parameters()}
    assert all(each.grad is None and not each.requires_grad for each in encode.parameters())
    crepa.remove()
    assert encode.convolution.weight is not None


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (
            FrozenEncoder(nn.Conv2d(3, 5, 8, 8), patch_size=8),
            r"the encoder Conv2d, .* got 5 x 3: features are \(n, h, w, E",
        ),
        (nn.Conv2d(3, 5, 8, 8), r"got \(1, 5, 3, 3\), which is \(n, E, h, w\) for a square: permute"),
        (lambda frames: frames.mean(), r"must answer features \(n, h, w, E\) with n = 1, got \(\)"),
    ],
)
def test_an_encoder_that_answers_wrongly_attaches_nothing(encoder: Any, message: str) -> None:
    transformer = tiny_wan()
    found = list(transformer.state_dict())
    with pytest.raises(ValueError, match=message):
        CrepaRegularizer(CONFIG, transformer, encoder=encoder)
    assert list(transformer.state_dict()) == found
