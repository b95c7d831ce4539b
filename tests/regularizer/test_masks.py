"""Frames that are not in the loss: padding and conditioning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import clip_pixels, pixel_frames, tiny_dinov2, tiny_wan, wan_inputs

from crepa_kernels import CrepaRegularizer

CONFIG: dict[str, Any] = {"crepa_enabled": True, "crepa_block_index": 1, "crepa_encoder_image_size": 70}


def test_a_padded_clip_gives_its_own_unpadded_loss() -> None:
    pixels = clip_pixels(2)
    inputs = wan_inputs(batch=2)
    transformer = tiny_wan()
    instead: list[torch.Tensor] = []
    transformer.blocks[1].register_forward_hook(lambda module, args, output: instead.pop() if instead else None)
    crepa = CrepaRegularizer({**CONFIG, "crepa_adjacent_distance": 2}, transformer, encoder=tiny_dinov2())
    transformer(**inputs)
    # The states of the padded batch, in which attention saw the padding.
    whole = crepa.captured().hidden_states
    found, _ = crepa.loss(step=0, pixels=pixels, num_frames=[9, 5])
    losses = []
    for clip, length in ((0, 3), (1, 2)):
        one = {key: value[clip : clip + 1] for key, value in inputs.items()}
        instead.append(whole[clip : clip + 1, :length].flatten(1, 2))
        transformer(**one | {"hidden_states": one["hidden_states"][:, :, :length]})
        losses.append(crepa.loss(step=0, pixels=pixels[clip : clip + 1, : pixel_frames(length)])[0])
    torch.testing.assert_close(found, (losses[0] + losses[1]) / 2, rtol=1e-4, atol=1e-6)  # other batch sizes
    transformer(**inputs)
    inside = torch.tensor([[True, True, True], [True, True, False]])
    masked, _ = crepa.loss(step=0, pixels=pixels, frame_mask=inside, teacher_mask=inside)
    torch.testing.assert_close(masked, found, rtol=1e-4, atol=1e-6)


def test_a_frame_mask_leaves_conditioning_frames_out() -> None:
    transformer = tiny_wan()
    crepa = CrepaRegularizer(CONFIG, transformer, feature_size=8)
    outputs: list[torch.Tensor] = []
    transformer.blocks[1].register_forward_hook(lambda module, args, output: outputs.append(output))
    transformer(**wan_inputs())
    outputs[0].retain_grad()
    crepa.loss(step=0, features=torch.randn(1, 3, 6, 8), frame_mask=torch.tensor([[False, True, True]]))[0].backward()
    reached = outputs[0].grad.unflatten(1, (3, 6)).abs().sum((0, 2, 3)) > 0
    assert reached.tolist() == [False, True, True]


def test_padding_and_a_given_mask_add_up() -> None:
    transformer = tiny_wan()
    crepa = CrepaRegularizer(CONFIG, transformer, encoder=tiny_dinov2())
    transformer(**wan_inputs(batch=2))
    pixels = clip_pixels(2)
    not_the_first = torch.tensor([[False, True, True]] * 2)
    both = torch.tensor([[False, True, True], [False, True, False]])
    inside = torch.tensor([[True, True, True], [True, True, False]])
    found, _ = crepa.loss(step=0, pixels=pixels, num_frames=[9, 5], frame_mask=not_the_first)
    expected, _ = crepa.loss(step=0, pixels=pixels, frame_mask=both, teacher_mask=inside)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)  # other batch sizes


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 3), torch.ones(2, 4, dtype=torch.bool), torch.ones(3, dtype=torch.bool), [[True] * 3] * 2],
    ids=["float", "four-frames", "one-axis", "list"],
)
@pytest.mark.parametrize("name", ["frame_mask", "teacher_mask"])
def test_a_wrong_mask_of_a_padded_batch_is_named(name: str, mask: Any) -> None:
    transformer = tiny_wan()
    crepa = CrepaRegularizer(CONFIG, transformer, encoder=tiny_dinov2())
    transformer(**wan_inputs(batch=2))
    with pytest.raises(ValueError, match=rf"{name} must be .* \(2, 3\)"):
        crepa.loss(step=0, pixels=clip_pixels(2), num_frames=[9, 5], **{name: mask})


def test_lengths_may_be_another_librarys_integers() -> None:
    transformer = tiny_wan()
    crepa = CrepaRegularizer(CONFIG, transformer, encoder=tiny_dinov2())
    transformer(**wan_inputs(batch=2))
    plain, _ = crepa.loss(step=0, pixels=clip_pixels(2), num_frames=[9, 5])
    other, _ = crepa.loss(step=0, pixels=clip_pixels(2), num_frames=torch.tensor([9, 5]))
    assert torch.equal(plain, other)
