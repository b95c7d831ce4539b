"""The whole system of every family on clips whose content says where it is: tokens and patches lie at one place."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from tiny import CHANNELS, tiny_dinov2
from tiny_families import FAMILIES, SPARSE_KANDINSKY, TinyFamily, on_grid
from transformers import Dinov2Model

from crepa_kernels import CrepaRegularizer
from crepa_kernels.models.families import family_of
from crepa_kernels.teachers.dinov2 import IMAGENET_MEAN, IMAGENET_STD

BLOCK = 1
# Of 4 x 6 tokens at least, so that corners are apart; without position embeddings, which would be part of a token.
SIZED: dict[str, TinyFamily] = {
    **{name: replace(tiny, latents=(tiny.latents[0], 8, 12)) for name, tiny in FAMILIES.items() if tiny.frames > 1},
    "kandinsky5_video sparse": SPARSE_KANDINSKY,
    # 9 x 16 tokens are as many as 12 x 12.
    **{
        f"{name} {height}x{width}": on_grid(name, (height, width))
        for name, tiny in FAMILIES.items()
        for height, width in ((4, 8), (9, 16))
        if tiny.frames == 1
    },
}
SIZED["cogvideox"] = replace(SIZED["cogvideox"], overrides={"use_rotary_positional_embeddings": True})


def patterns(count: int) -> torch.Tensor:
    """(32, count) orthogonal directions of zero mean, which LayerNorm leaves alone but for their length."""
    rows = torch.zeros(32, count)
    for channel in range(count):
        rows[2 * channel, channel], rows[2 * channel + 1, channel] = 1.0, -1.0
    return rows


@torch.no_grad()
def seeing_student(tiny: TinyFamily) -> Any:
    """A transformer whose hidden states are each patch's mean latents, in one direction for each channel."""
    transformer = tiny.make()
    for block in family_of(transformer).blocks(transformer):
        for parameter in block.parameters():
            parameter.zero_()  # every branch of a block then adds 0
    embedding = transformer.get_submodule(tiny.embedding)
    places = embedding.weight[0].numel() // CHANNELS
    means = patterns(CHANNELS)[:, :, None].expand(-1, -1, places) / places  # [D, C, places]
    means = means if tiny.channels_first else means.transpose(1, 2)
    embedding.weight.copy_(means.reshape(embedding.weight.shape))
    if embedding.bias is not None:
        embedding.bias.zero_()
    if hasattr(transformer, "pos_embed") and hasattr(transformer.pos_embed, "pos_embed"):
        transformer.pos_embed.pos_embed = None
    return transformer.requires_grad_(tiny is not SPARSE_KANDINSKY)


@torch.no_grad()
def brightness_teacher() -> Dinov2Model:
    """A DINOv2 whose patch features are brightness in one direction and darkness in another."""
    model = tiny_dinov2(num_hidden_layers=0)
    model.embeddings.position_embeddings.zero_()
    projection = model.embeddings.patch_embeddings.projection
    bright, dark = patterns(2).unbind(1)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    weight = (bright - dark)[:, None] * std / 3
    projection.weight.copy_(weight[:, :, None, None].expand(-1, -1, 14, 14) / 14**2)
    projection.bias.copy_(dark + (bright - dark) * mean.mean())
    return model


def forward(transformer: Any, tiny: TinyFamily, latents: torch.Tensor) -> None:
    inputs = tiny.call(latents, torch.Generator().manual_seed(0), transformer)
    with attention_backend("flex") if tiny is SPARSE_KANDINSKY else nullcontext():
        transformer(**inputs)


def regularizer(transformer: Any, **settings: Any) -> CrepaRegularizer:
    config = {
        "crepa_enabled": True,
        "crepa_block_index": BLOCK,
        "crepa_encoder_image_size": 14 * 12,
        "crepa_adjacent_distance": 0,
    }
    crepa = CrepaRegularizer({**config, **settings}, transformer, encoder=brightness_teacher())
    with torch.no_grad():
        crepa.projector[1].weight.copy_(torch.eye(32))
        crepa.projector[1].bias.zero_()
    return crepa


@pytest.mark.parametrize("name", SIZED)
def test_a_captured_token_is_that_of_its_place(name: str) -> None:
    tiny = SIZED[name]
    transformer = seeing_student(tiny)
    crepa = regularizer(transformer)
    axes = [torch.arange(size, dtype=torch.float32) for size in tiny.latents]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"))  # [3, T, H, W]
    forward(transformer, tiny, torch.cat([places, places[:1]])[None])
    states, _ = crepa.captured(BLOCK)
    found = states[0, :, :, [0, 2, 4]]  # [T, P, (frame, row, column)]
    for frame in range(tiny.frames):
        for y in range(tiny.grid[0]):
            for x in range(tiny.grid[1]):
                middle = [place * size + (size - 1) / 2 for place, size in zip((frame, y, x), tiny.patch, strict=True)]
                # Sums of a patch's latents times 1/8, 1/4 or 1.
                torch.testing.assert_close(found[frame, y * tiny.grid[1] + x], torch.tensor(middle))


def square(tiny: TinyFamily, where: tuple[str, str, str]) -> torch.Tensor:
    """(T, H, W) brightness of latents: 1 in one corner of the early or the late frames."""
    frames, height, width = tiny.latents
    vertical, horizontal, time = where
    bright = torch.zeros(frames, height, width)
    rows = slice(0, height // 2) if vertical == "top" else slice(height - height // 2, None)
    columns = slice(0, width // 3) if horizontal == "left" else slice(width - width // 3, None)
    when = slice(0, tiny.patch[0]) if time == "early" else slice(tiny.patch[0], None)
    bright[when, rows, columns] = 1
    return bright


def as_latents(brightness: torch.Tensor) -> torch.Tensor:
    """(T, H, W) -> (1, C, T, H, W): brightness, darkness and nothing."""
    nothing = torch.zeros_like(brightness)
    return torch.stack([brightness, 1 - brightness, nothing, nothing])[None]


def as_clip(brightness: torch.Tensor, scale: int = 8, factor: int = 4) -> torch.Tensor:
    """(T, H, W) of latents -> pixels (1, P, 3, 8H, 8W) of a causal VAE with ``factor`` frames a latent."""
    frames = torch.cat([brightness[:1], brightness[1:].repeat_interleave(factor, dim=0)])
    grey = frames.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    return grey[None, :, None].expand(-1, -1, 3, -1, -1)


def places_of(tiny: TinyFamily) -> list[tuple[str, str, str]]:
    times = ("early", "late") if tiny.frames > 1 else ("early",)
    return [(v, h, t) for v in ("top", "bottom") for h in ("left", "right") for t in times]


@pytest.mark.parametrize("resize", ["square", "grid"])
@pytest.mark.parametrize("name", SIZED)
def test_the_similarity_peaks_at_the_bright_corner_of_the_clip(name: str, resize: str) -> None:
    tiny = SIZED[name]
    transformer = seeing_student(tiny)
    crepa = regularizer(transformer, crepa_encoder_resize=resize)
    (factor, *_) = family_of(transformer).temporal_factors
    places = (("top", "right", places_of(tiny)[-1][2]), ("bottom", "left", "early"))
    clips = {place: as_clip(square(tiny, place), factor=factor) for place in places}
    similarity: dict[Any, dict[Any, float]] = {place: {} for place in clips}
    for place in places_of(tiny):
        forward(transformer, tiny, as_latents(square(tiny, place)))
        for known, clip in clips.items():
            similarity[known][place] = float(crepa.loss(step=0, pixels=clip)[1]["crepa_similarity_self"])
    for known, by_place in similarity.items():
        assert max(by_place, key=lambda place: by_place[place]) == known
        # Short of 1: where a patch crosses the square's edge both sides mix over another area.
        assert by_place[known] > 0.97
        assert max(value for place, value in by_place.items() if place != known) < 0.9


@pytest.mark.parametrize("frames", [5, 6])
def test_latents_padded_at_the_front_meet_the_frames_that_they_stand_for(frames: int) -> None:
    tiny = SIZED["cogvideox 1.5"]
    transformer = seeing_student(tiny)
    crepa = regularizer(transformer)
    # Every latent frame has a brightness of its own; the teacher's frame is the last of a token frame's.
    last = {5: [0, 2, 4], 6: [1, 3, 5]}[frames]
    levels = torch.zeros(frames)
    levels[last[1]] = 1
    brightness = levels[:, None, None].expand(-1, 8, 12)
    seen = torch.zeros(3)
    seen[1] = 1
    # The student's token frames know what their teacher's frames show.
    forward(transformer, tiny, as_latents(seen.repeat_interleave(2)[:, None, None].expand(-1, 8, 12)))
    _, logs = crepa.loss(step=0, pixels=as_clip(brightness))
    torch.testing.assert_close(logs["crepa_similarity_self"], torch.tensor(1.0), rtol=0, atol=1e-4)  # resampling
    _, logs = crepa.loss(step=0, pixels=as_clip(brightness.roll(1, 0)))
    assert logs["crepa_similarity_self"] < 0.7
