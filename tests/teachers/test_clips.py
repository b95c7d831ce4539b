"""Which frames of a clip are encoded, and what the caller may give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import clip_pixels, tiny_dinov2
from tiny_families import FAMILIES, crepa_on, tiny_vaes

from crepa_kernels.frames import frame_indices
from crepa_kernels.models.layouts import TokenLayout
from crepa_kernels.teachers import TeacherFeatures
from crepa_kernels.teachers.clips import ClipLengths, check_pixels, encode_clips, given_features
from crepa_kernels.teachers.encoding import FrameEncoder

CPU = torch.device("cpu")
GRID = (2, 3)
LAYOUT = TokenLayout(frames=3, grid=GRID, patch=1, latent_shape=(3, 4, 6))  # 9 pixel frames


@pytest.fixture(scope="module")
def teacher() -> FrameEncoder:
    return FrameEncoder(tiny_dinov2(), resize="grid")


@pytest.mark.parametrize("rule", ["last", "center", "mean"])
def test_a_clips_features_are_those_of_the_frames_that_the_rule_names(teacher: FrameEncoder, rule: str) -> None:
    pixels = clip_pixels(2)
    before = teacher.frames_encoded
    found = encode_clips(teacher, pixels, ClipLengths.of(None, 2, 9, LAYOUT), rule, CPU)
    assert teacher.frames_encoded - before == (18 if rule == "mean" else 6)
    every = torch.stack([teacher.encode(clip, GRID, CPU).features for clip in pixels])  # [B, P, N, E]
    if rule == "mean":
        expected = torch.stack([every[:, :1].mean(1), every[:, 1:5].mean(1), every[:, 5:].mean(1)], dim=1)
    else:
        expected = every[:, {"last": [0, 4, 8], "center": [0, 2, 6]}[rule]]
    assert found.grid == GRID
    # Batches of other sizes add up in another order.
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["last", "center", "mean"])
def test_a_padded_clip_is_encoded_as_if_it_were_alone(teacher: FrameEncoder, rule: str) -> None:
    pixels = clip_pixels(2)
    pixels[1, 5:] = 0  # padding
    before = teacher.frames_encoded
    lengths = ClipLengths.of([9, 5], 2, 9, LAYOUT)
    assert (lengths.latents, lengths.mask(CPU) is None) == ((3, 2), False)
    mask = lengths.mask(CPU)
    assert mask is not None
    assert mask.tolist() == [[True, True, True], [True, True, False]]
    found = encode_clips(teacher, pixels, lengths, rule, CPU).features
    assert teacher.frames_encoded - before == (14 if rule == "mean" else 5)
    alone = TokenLayout(2, GRID, 1, (2, 4, 6))
    expected = encode_clips(teacher, pixels[1:, :5], ClipLengths.of(None, 1, 5, alone), rule, CPU).features
    torch.testing.assert_close(found[1:, :2], expected, rtol=1e-4, atol=1e-5)  # other batch sizes


def test_latents_that_pad_the_front_of_a_batch_count_to_its_first_token_frame(teacher: FrameEncoder) -> None:
    # 17 pixel frames are 5 latents, which a temporal patch of 2 pads to 6: token frames of latent 0, 1-2 and 3-4.
    layout = TokenLayout(3, GRID, 2, (6, 4, 6), temporal_ratio=4)
    pixels = clip_pixels(2, 17)
    lengths = ClipLengths.of([17, 5], 2, 17, layout)
    assert (lengths.latents, lengths.tokens, lengths.layout.front_padding) == ((5, 2), (3, 2), 1)
    found = encode_clips(teacher, pixels, lengths, "last", CPU).features
    every = torch.stack([teacher.encode(clip, GRID, CPU).features for clip in pixels])  # [B, P, N, E]
    # The second clip's token frame of latents 1-2 has latent 1 alone.
    expected = torch.stack([every[0, [0, 8, 16]], every[1, [0, 4, 4]]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # other batch sizes
    given, _ = given_features(every, None, [17, 5], "last", 2, layout)
    assert torch.equal(given.features, expected)


def test_one_number_of_frames_crops_the_pixels(teacher: FrameEncoder) -> None:
    pixels = clip_pixels(1, 12)
    lengths = ClipLengths.of(9, 1, 12, LAYOUT)
    assert lengths.mask(CPU) is None
    assert lengths.mask(CPU) is None
    found = encode_clips(teacher, pixels, lengths, "last", CPU).features
    expected = teacher.encode(pixels[0, frame_indices("last", 9, 3)], GRID, CPU).features
    assert torch.equal(found[0], expected)


def test_frames_that_groups_share_are_encoded_once(teacher: FrameEncoder) -> None:
    before = teacher.frames_encoded
    found = encode_clips(teacher, clip_pixels(1, 1), ClipLengths.of(None, 1, 1, LAYOUT), "last", CPU)
    assert teacher.frames_encoded - before == 1
    assert found.features.shape == (1, 3, 6, 32)


@pytest.mark.parametrize("num_frames", [[9], [9, 10], [9, 0], 10, 0, True, [9, 5.0]])
def test_lengths_that_do_not_fit_are_refused(num_frames: Any) -> None:
    with pytest.raises(ValueError, match="num_frames must"):
        ClipLengths.of(num_frames, 2, 9, LAYOUT)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(9, 3, 32, 48), r"\(B, P, 3, H, W\) with B = 2, got \(9, 3, 32, 48\)"),
        (torch.zeros(1, 9, 3, 32, 48), "with B = 2"),
        (torch.zeros(2, 3, 9, 32, 48), r"got \(2, 3, 9, 32, 48\)"),
        (torch.zeros(2, 0, 3, 32, 48), r"got \(2, 0, 3, 32, 48\)"),
        (torch.zeros(2, 9, 3, 4, 4, dtype=torch.int64), "torch.int64"),
        (torch.full((2, 9, 3, 4, 4), -0.5), r"\[0, 1\].*reaches from -0.5 to -0.5.*pixels / 2"),
        (torch.full((2, 9, 3, 4, 4), 255.0), "reaches from 255 to 255"),
    ],
)
def test_pixels_that_are_not_what_they_should_be_are_refused(pixels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pixels(pixels, 2, look=True)


def test_only_the_first_batch_of_pixels_is_looked_at() -> None:
    check_pixels(torch.full((2, 9, 3, 4, 4), 255.0), 2, look=False)
    check_pixels(torch.ones(2, 9, 3, 4, 4, dtype=torch.float16), 2, look=True)


def test_given_features_are_taken_by_student_frame_or_by_pixel_frame() -> None:
    every = torch.randn(2, 9, 20, 8, generator=torch.Generator().manual_seed(6))
    chosen = every[:, [0, 4, 8]]
    for features, grid, num_frames in (
        (chosen, (4, 5), None),
        (chosen.unflatten(2, (4, 5)), None, None),
        (TeacherFeatures(chosen, (4, 5)), None, None),
        (every, (4, 5), 9),
        (every.unflatten(2, (4, 5)), None, [9, 9]),
    ):
        found, _ = given_features(features, grid, num_frames, "last", 2, LAYOUT)
        assert found.grid == (4, 5)
        assert torch.equal(found.features, chosen)


@pytest.mark.parametrize("stored", [3, 9])
def test_padded_clips_of_given_features_have_their_lengths(stored: int) -> None:
    _, lengths = given_features(torch.randn(2, stored, 6, 8), None, [9, 5], "last", 2, LAYOUT)
    assert lengths is not None
    assert lengths.latents == (3, 2)


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((3, 6, 8), None, r"\(B, S, N, E\).*got \(3, 6, 8\)"),
        ((1, 3, 6, 8), None, "with B = 2"),
        ((2, 4, 6, 8), None, "4 frames, the student 3.*num_frames"),
        ((2, 3, 20, 8), None, "20 tokens a frame, the student's grid is 2 x 3: give feature_grid"),
    ],
)
def test_given_features_that_do_not_fit_are_refused(shape: tuple[int, ...], grid: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        given_features(torch.zeros(shape), grid, None, "last", 2, LAYOUT)


# The numbers of pixel frames that each family's VAE makes of so many latent frames, and some that it does not.
COUNTS: list[tuple[str, set[int], set[int]]] = [
    ("wan", {9, 3}, {8, 10, 12, 17}),
    ("ltxvideo", {17, 3}, {9, 16, 18, 24}),
    ("sanavideo", {9, 17, 3}, {10, 16}),
    ("kandinsky5_video", {9, 3}, {8, 12}),
    ("hunyuan_video", {9, 3}, {8, 12}),
    ("cogvideox", {9, 10, 12, 3}, {8, 13}),
    # 6 latent frames, of which one may pad the front.
    ("cogvideox 1.5", {17, 20, 21, 24, 3}, {16, 25, 6}),
]


@pytest.mark.parametrize(("name", "right", "wrong"), COUNTS, ids=[name for name, *_ in COUNTS])
def test_pixels_are_the_frames_that_the_latents_were_made_of(name: str, right: set[int], wrong: set[int]) -> None:
    tiny = FAMILIES[name]
    transformer = tiny.make()
    crepa = crepa_on(transformer)
    transformer(**tiny.inputs(model=transformer))
    for frames in sorted(right | wrong):
        pixels = clip_pixels(1, frames, 28, 28)
        if frames in right:
            crepa.loss(step=0, pixels=pixels)
        else:
            with pytest.raises(ValueError, match=f"{frames} frames, but the {tiny.latents[0]} latent frames"):
                crepa.loss(step=0, pixels=pixels)


def test_a_vae_of_another_temporal_factor_says_how_many_pixel_frames() -> None:
    tiny = FAMILIES["ltxvideo"]
    transformer = tiny.make()
    vae = tiny_vaes("ltxvideo", temporal_compression_ratio=4)
    crepa = crepa_on(transformer, vae=vae)
    transformer(**tiny.inputs(model=transformer))
    crepa.loss(step=0, pixels=clip_pixels(1, 9, 28, 28))
    with pytest.raises(ValueError, match=r"17 frames, but the 3 latent frames .* made of 9"):
        crepa.loss(step=0, pixels=clip_pixels(1, 17, 28, 28))
    # Decoded frames are right by themselves, however many these are.
    crepa.loss(step=0, latents=torch.randn(1, 4, 3, 4, 6))
    crepa.loss(step=0, pixels=clip_pixels(2, 9, 28, 28)[:1], num_frames=[7])
