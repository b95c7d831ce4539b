"""The whole system on a clip that says where each pixel is: patches and frames of both sides line up."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel
from tiny import tiny_dinov2, tiny_wan, wan_inputs

from crepa_kernels import CrepaRegularizer
from crepa_kernels.teachers.dinov2 import IMAGENET_MEAN, IMAGENET_STD


def angles(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(T, 3, height, width): a direction that says where in the frame, and at which time in [0, 1], a pixel is."""
    y = (torch.arange(height) + 0.5) / height
    x = (torch.arange(width) + 0.5) / width
    turn = 2.0 * x + 2.5 * frames[:, None, None]
    tilt = 3.0 * y[None, :, None].expand(len(frames), height, width)
    turn = turn.expand(len(frames), height, width)
    return torch.stack([turn.cos(), turn.sin(), tilt.cos()], dim=1)


def patterns() -> torch.Tensor:
    """(32, 3) orthogonal directions of zero mean, which LayerNorm leaves alone but for their length."""
    rows = torch.zeros(32, 3)
    for channel in range(3):
        rows[2 * channel, channel], rows[2 * channel + 1, channel] = 1.0, -1.0
    return rows


@torch.no_grad()
def seeing_student() -> WanTransformer3DModel:
    """A transformer whose hidden states are the mean of each patch's latents, in the three directions."""
    transformer = tiny_wan()
    for parameter in transformer.condition_embedder.time_proj.parameters():
        parameter.zero_()
    for block in transformer.blocks:
        block.scale_shift_table.zero_()
        for parameter in block.attn2.to_out.parameters():
            parameter.zero_()
    embedding = transformer.patch_embedding
    embedding.bias.zero_()
    embedding.weight.zero_()
    embedding.weight[:, :3] = patterns()[:, :, None, None, None] / 4
    return transformer


@torch.no_grad()
def seeing_teacher() -> torch.nn.Module:
    """A DINOv2 whose patch features are the mean of the patch's pixels, in the same directions."""
    model = tiny_dinov2(num_hidden_layers=0)
    model.embeddings.position_embeddings.zero_()
    projection = model.embeddings.patch_embeddings.projection
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    # Pixels are (direction + 1) / 2, then normalised.
    projection.weight.copy_((patterns() * 2 * std)[:, :, None, None].expand(-1, -1, 14, 14) / 14**2)
    projection.bias.copy_(patterns() @ (2 * mean - 1))
    return model


@pytest.mark.parametrize("align", ["student", "teacher", "smaller"])
@pytest.mark.parametrize("resize", ["square", "grid"])
def test_patches_and_frames_of_student_and_teacher_line_up(align: str, resize: str) -> None:
    height, width, frames = 12, 20, 5  # latents; 6 x 10 tokens
    transformer = seeing_student()
    config = {
        "crepa_enabled": True,
        "crepa_block_index": 1,
        "crepa_spatial_align": align,
        "crepa_encoder_resize": resize,
        "crepa_encoder_image_size": 14 * 12,
        "crepa_adjacent_distance": 0,
    }
    crepa = CrepaRegularizer(config, transformer, encoder=seeing_teacher())
    with torch.no_grad():
        crepa.projector[1].weight.copy_(torch.eye(32))
        crepa.projector[1].bias.zero_()
    inputs = wan_inputs(frames=frames, height=height, width=width)
    inputs["hidden_states"].zero_()
    inputs["hidden_states"][0, :3] = angles(torch.linspace(0, 1, frames), height, width).transpose(0, 1)
    transformer(**inputs)

    video = (angles(torch.linspace(0, 1, 17), 8 * height, 8 * width) + 1) / 2
    noise = torch.rand(video.shape, generator=torch.Generator().manual_seed(0))
    needed = [0, 4, 8, 12, 16]
    noise[needed] = video[needed]  # what the rule "last" does not take is noise

    def similarity(pixels: torch.Tensor) -> float:
        return float(crepa.loss(step=0, pixels=pixels[None])[1]["crepa_similarity_self"])

    # Short of 1: other patches average over another area. Measured: 0.99984 and more.
    assert similarity(noise) > 0.9995
    shuffled = noise.clone()
    shuffled[needed] = video[[4, 0, 12, 16, 8]]
    for wrong in (noise.flip(-1), noise.flip(-2), shuffled, noise.flip(0)):
        assert similarity(wrong) < 0.9
    # Half a token in 10 is seen.
    assert similarity(noise.roll(8 * width // 20, -1)) < 0.98
