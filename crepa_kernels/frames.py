"""Pixel frames and latent frames: which frame of the clip teaches which latent frame.

A causal video VAE maps P pixel frames to T latent frames: latent 0 is pixel frame 0, each further latent
covers a group of frames. All of it is integer arithmetic on the host.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

RULES = ("last", "center", "mean")


def _at_least_one(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return value


def _check_rule(rule: str) -> None:
    if rule not in RULES:
        raise ValueError(f"frame rule must be one of {', '.join(RULES)}, got {rule!r}")


def patch_groups(latent_frames: int, patch: int) -> list[tuple[int, int]]:
    """Latent frames of each student frame of a DiT with temporal patch `patch`, as inclusive (start, end).

    Latents that pad the count at the front belong to the first group, which is then shorter than `patch`.
    """
    _at_least_one("latent_frames", latent_frames)
    _at_least_one("patch", patch)
    groups = -(-latent_frames // patch)
    padding = groups * patch - latent_frames
    return [(max(g * patch - padding, 0), (g + 1) * patch - padding - 1) for g in range(groups)]


def frame_groups(pixel_frames: int, latent_frames: int, *, patch: int = 1) -> list[tuple[int, int]]:
    """Pixel frames of each latent frame, as inclusive (start, end); with `patch` > 1 of each latent group.

    Group f ends at e_f = f(P-1)//(T-1) (T = 1: P-1) and starts after e_(f-1). It has at least one frame:
    where there are fewer pixel frames than latent frames, neighbouring groups share one.
    ValueError: a count below 1.
    """
    _at_least_one("pixel_frames", pixel_frames)
    _at_least_one("latent_frames", latent_frames)
    last = pixel_frames - 1
    ends = [f * last // (latent_frames - 1) for f in range(latent_frames)] if latent_frames > 1 else [last]
    starts = [0, *(min(before + 1, end) for before, end in itertools.pairwise(ends))]
    return [(starts[first], ends[final]) for first, final in patch_groups(latent_frames, patch)]


def frame_indices(rule: str, pixel_frames: int, latent_frames: int, *, patch: int = 1) -> list[int]:
    """The pixel frames whose features `rule` needs: nothing else has to be encoded.

    "last" and "center": the teacher frame of each student frame, in order: T numbers, or one a group of
    `patch` latents, repeated only where groups share a frame. "mean": every frame, for `select_frames`.
    """
    _check_rule(rule)
    groups = frame_groups(pixel_frames, latent_frames, patch=patch)
    if rule == "mean":
        return list(range(pixel_frames))
    return [teacher_frame(rule, group) for group in groups]


def teacher_frame(rule: str, group: tuple[int, int]) -> int:
    """The pixel frame that teaches a student frame of the inclusive (start, end): "last" or "center"."""
    start, end = group
    return end if rule == "last" else start + (end - start) // 2


def select_frames(
    features: Tensor,
    rule: str,
    latent_frames: int,
    *,
    num_frames: int | Sequence[int] | None = None,
    num_latents: int | Sequence[int] | None = None,
    patch: int = 1,
) -> Tensor:
    """Features of each student frame (B, T, ...) from features of every pixel frame (B, K, ...).

    `num_frames`: each clip's own pixel frames, at most K, where clips are padded at the end (default K).
    `num_latents`: each clip's own latent frames, at most T = `latent_frames` (default T); the padded frames
    after them repeat the last one. `patch` > 1 gives one frame for each group of `patch` latents.
    "mean" accumulates in fp32 at least and returns the features' type.
    ValueError: a rule, count or shape that does not fit.
    """
    _check_rule(rule)
    if features.ndim < 2:
        raise ValueError(f"features must be (B, K, ...), got shape {tuple(features.shape)}")
    if rule == "mean" and not features.is_floating_point():
        raise ValueError(f"rule 'mean' needs floating-point features, got {features.dtype}")
    batch, stored = features.shape[:2]
    pixel_counts = _per_clip("num_frames", num_frames, batch, stored, "frames in features")
    latent_counts = _per_clip("num_latents", num_latents, batch, latent_frames, "latent_frames")
    clips = list(zip(pixel_counts, latent_counts, strict=True))
    if len(set(clips)) == 1:
        return _select(features, rule, clip_groups(*clips[0], latent_frames, patch))
    parts = [
        _select(features[b : b + 1], rule, clip_groups(pixels, latents, latent_frames, patch))
        for b, (pixels, latents) in enumerate(clips)
    ]
    return torch.cat(parts)


def _per_clip(name: str, counts: int | Sequence[int] | None, batch: int, most: int, what: str) -> list[int]:
    _at_least_one(what, most)
    if counts is None:
        counts = most
    listed = [counts] * batch if isinstance(counts, int) else list(counts)
    if len(listed) != batch:
        raise ValueError(f"{name} must have one number for each of {batch} clips, got {len(listed)}")
    for count in listed:
        if _at_least_one(name, count) > most:
            raise ValueError(f"{name} = {count} is more than the {most} {what}")
    return listed


def clip_groups(pixels: int, latents: int, padded_latents: int, patch: int) -> list[tuple[int, int]]:
    """Pixel groups of a clip whose `latents` latent frames are padded at the end to `padded_latents`."""
    groups = frame_groups(pixels, latents)
    last = latents - 1
    return [
        (groups[min(first, last)][0], groups[min(final, last)][1])
        for first, final in patch_groups(padded_latents, patch)
    ]


def _select(features: Tensor, rule: str, groups: list[tuple[int, int]]) -> Tensor:
    # Slices instead of an index tensor: a list copied to a GPU would make the host wait.
    if rule != "mean":
        return torch.stack([features[:, teacher_frame(rule, group)] for group in groups], dim=1)
    return torch.stack([features[:, start : end + 1].mean(dim=1) for start, end in groups], dim=1)
