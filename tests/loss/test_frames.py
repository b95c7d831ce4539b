from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crepa_kernels.frames import frame_groups, frame_indices, patch_groups, select_frames

COUNTS = st.tuples(st.integers(1, 60), st.integers(1, 20))


def latent_of_pixel(pixel: int, pixel_frames: int, latent_frames: int) -> int:
    """The first latent frame whose group reaches as far as this pixel frame."""
    for latent in range(latent_frames - 1):
        if pixel * (latent_frames - 1) <= latent * (pixel_frames - 1):
            return latent
    return latent_frames - 1


def slow_groups(pixel_frames: int, latent_frames: int) -> list[list[int]]:
    groups: list[list[int]] = [[] for _ in range(latent_frames)]
    for pixel in range(pixel_frames):
        groups[latent_of_pixel(pixel, pixel_frames, latent_frames)].append(pixel)
    for latent in range(latent_frames):
        if not groups[latent]:
            reached = [p for p in range(pixel_frames) if p * (latent_frames - 1) <= latent * (pixel_frames - 1)]
            groups[latent] = [reached[-1]]
    return groups


def test_81_pixel_frames_need_every_fourth() -> None:
    assert frame_indices("last", 81, 21) == list(range(0, 81, 4))
    assert frame_indices("center", 81, 21) == [0, *range(2, 81, 4)]
    assert frame_indices("mean", 81, 21) == list(range(81))


@pytest.mark.parametrize("factor", [1, 4, 8])
@pytest.mark.parametrize("latent_frames", [2, 3, 21])
def test_causal_vae_groups(factor: int, latent_frames: int) -> None:
    groups = frame_groups(1 + factor * (latent_frames - 1), latent_frames)
    assert groups == [(0, 0), *((factor * (f - 1) + 1, factor * f) for f in range(1, latent_frames))]


@settings(deadline=None)
@given(COUNTS)
def test_groups_are_the_per_pixel_definition(counts: tuple[int, int]) -> None:
    assert [list(range(start, end + 1)) for start, end in frame_groups(*counts)] == slow_groups(*counts)


@settings(deadline=None)
@given(COUNTS)
def test_groups_cover_every_frame_in_order_and_the_last_latent_ends_the_clip(counts: tuple[int, int]) -> None:
    groups = frame_groups(*counts)
    assert {p for start, end in groups for p in range(start, end + 1)} == set(range(counts[0]))
    assert groups[0][0] == 0
    assert groups[-1][1] == counts[0] - 1
    assert all(start <= end for start, end in groups)
    assert sorted(groups) == groups


def test_a_clip_shorter_than_its_latents_repeats_frames() -> None:
    assert frame_groups(1, 3) == [(0, 0)] * 3
    assert frame_indices("last", 3, 5) == [0, 0, 1, 1, 2]


def test_one_latent_frame_covers_the_clip() -> None:
    assert frame_groups(9, 1) == [(0, 8)]
    assert frame_indices("last", 9, 1) == [8]
    assert frame_indices("center", 9, 1) == [4]


@settings(deadline=None)
@given(COUNTS, st.sampled_from(["last", "center", "mean"]))
def test_selected_features_are_the_per_pixel_definition(counts: tuple[int, int], rule: str) -> None:
    pixel_frames, latent_frames = counts
    generator = torch.Generator().manual_seed(pixel_frames * 100 + latent_frames)
    features = torch.randn(2, pixel_frames, 3, generator=generator, dtype=torch.float64)
    expected = []
    for group in slow_groups(pixel_frames, latent_frames):
        chosen = {"last": group[-1:], "center": [group[(len(group) - 1) // 2]], "mean": group}[rule]
        expected.append(torch.stack([features[:, pixel] for pixel in chosen]).sum(dim=0) / len(chosen))
    actual = select_frames(features, rule, latent_frames)
    # float64 additions in another order: a few units in the last place.
    torch.testing.assert_close(actual, torch.stack(expected, dim=1), rtol=1e-13, atol=1e-13)


@settings(deadline=None)
@given(COUNTS, st.sampled_from(["last", "center"]))
def test_encoding_only_the_needed_frames_gives_the_same_features(counts: tuple[int, int], rule: str) -> None:
    features = torch.arange(counts[0] * 2.0).reshape(1, counts[0], 2)
    needed = features[:, frame_indices(rule, *counts)]
    assert torch.equal(select_frames(features, rule, counts[1]), needed)


@pytest.mark.parametrize("rule", ["last", "center", "mean"])
@pytest.mark.parametrize("patch", [1, 2])
def test_a_padded_clip_keeps_its_own_frames(rule: str, patch: int) -> None:
    features = torch.randn(3, 17, 2, 4, dtype=torch.float64)
    padded = features.clone()
    padded[1, 9:] = torch.nan
    padded[2, 5:] = torch.nan
    actual = select_frames(padded, rule, 5, num_frames=[17, 9, 5], num_latents=[5, 3, 2], patch=patch)
    assert torch.isfinite(actual).all()
    for clip, pixels, latents in ((0, 17, 5), (1, 9, 3), (2, 5, 2)):
        own = select_frames(features[clip : clip + 1, :pixels], rule, latents)[0]
        for group, (first, last) in enumerate(patch_groups(5, patch)):
            inside = [min(latent, latents - 1) for latent in (first, last)]
            if rule == "last" or inside[0] == inside[1]:
                assert torch.equal(actual[clip, group], own[inside[1]])


def test_mean_of_bfloat16_is_accumulated_in_float32() -> None:
    features = torch.full((1, 513, 1), 1.0, dtype=torch.bfloat16)
    # A bfloat16 sum of ones stays at 256.
    assert select_frames(features, "mean", 1).item() == 1.0
    assert select_frames(features, "mean", 1).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("latent_frames", "patch", "expected"),
    [
        (5, 1, [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]),
        (6, 2, [(0, 1), (2, 3), (4, 5)]),
        (7, 2, [(0, 0), (1, 2), (3, 4), (5, 6)]),
        (7, 3, [(0, 0), (1, 3), (4, 6)]),
        (8, 3, [(0, 1), (2, 4), (5, 7)]),
        (1, 4, [(0, 0)]),
    ],
)
def test_latents_that_pad_the_front_join_the_first_group(
    latent_frames: int, patch: int, expected: list[tuple[int, int]]
) -> None:
    assert patch_groups(latent_frames, patch) == expected


def test_temporal_patches_take_the_last_real_latent() -> None:
    # 25 pixel frames, 7 latents at 0, 4, ..., 24, in patches (0), (1 2), (3 4), (5 6).
    assert frame_groups(25, 7, patch=2) == [(0, 0), (1, 8), (9, 16), (17, 24)]
    assert frame_indices("last", 25, 7, patch=2) == [0, 8, 16, 24]
    assert frame_indices("center", 25, 7, patch=2) == [0, 4, 12, 20]
    features = torch.arange(25.0).reshape(1, 25, 1)
    assert select_frames(features, "mean", 7, patch=2).flatten().tolist() == [0, 4.5, 12.5, 20.5]


FEATURES = torch.zeros(2, 9, 3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: frame_groups(0, 3), ["pixel_frames", "0"]),
        (lambda: frame_groups(9, 0), ["latent_frames", "0"]),
        (lambda: frame_groups(9, -2), ["latent_frames", "-2"]),
        (lambda: frame_groups(9.0, 3), ["pixel_frames", "9.0"]),  # type: ignore[arg-type]
        (lambda: frame_groups(True, 3), ["pixel_frames", "True"]),
        (lambda: patch_groups(4, 0), ["patch", "0"]),
        (lambda: frame_indices("first", 9, 3), ["first", "last, center, mean"]),
        (lambda: select_frames(FEATURES, "middle", 3), ["middle", "last, center, mean"]),
        (lambda: select_frames(FEATURES[0, 0], "last", 3), ["(3,)"]),
        (lambda: select_frames(FEATURES, "last", 0), ["latent_frames", "0"]),
        (lambda: select_frames(FEATURES[:, :0], "last", 3), ["frames in features", "0"]),
        (lambda: select_frames(FEATURES, "last", 3, num_frames=10), ["num_frames = 10", "9"]),
        (lambda: select_frames(FEATURES, "last", 3, num_frames=[9, 0]), ["num_frames", "0"]),
        (lambda: select_frames(FEATURES, "last", 3, num_frames=[9]), ["num_frames", "2 clips", "1"]),
        (lambda: select_frames(FEATURES, "last", 3, num_latents=4), ["num_latents = 4", "3"]),
        (lambda: select_frames(FEATURES.long(), "mean", 3), ["mean", "int64"]),
    ],
)
def test_bad_input_is_named(call: object, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        call()  # type: ignore[operator]
    assert all(word in str(error.value) for word in words), str(error.value)
