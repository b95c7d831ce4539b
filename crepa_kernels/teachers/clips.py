"""From a batch of clips to one teacher frame for each student frame."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..frames import clip_groups, frame_groups, select_frames, teacher_frame
from ..grid import Grid, as_grid
from ..models.layouts import TokenLayout
from ..transfer import moved
from . import TeacherFeatures
from .encoding import FrameEncoder

# Rounding of pixels that were resized or stored in a 16-bit type.
PIXEL_TOLERANCE = 1e-2


def as_counts(num_frames: Any) -> int | list[int] | None:
    """``num_frames`` in Python's integers, whatever library's integers or arrays of them it comes in.

    Raises:
        ValueError: if it is neither an integer nor integers, or one is below 1.
    """
    if num_frames is None:
        return None
    counts: int | list[int]
    try:
        counts = operator.index(num_frames)
    except TypeError:
        try:
            counts = [operator.index(count) for count in num_frames]
        except TypeError as error:
            raise ValueError(f"num_frames must be an integer, or one for each clip, got {num_frames!r}") from error
    if any(count < 1 for count in ([counts] if isinstance(counts, int) else counts)):
        raise ValueError(f"num_frames must be at least 1, got {num_frames!r}")
    return counts


@dataclass(frozen=True)
class ClipLengths:
    """Each clip's own length: pixel frames, latent frames and student frames, in a batch padded at the end.

    Attributes:
        pixels: P of each clip.
        latents: latent frames of each clip that they map to.
        tokens: student frames of each clip (``latents`` / temporal patch, rounded up).
        layout: of the padded batch, without latents that pad its front.
        stored: P of the padded batch, which all its latents stand for.
    """

    pixels: tuple[int, ...]
    latents: tuple[int, ...]
    tokens: tuple[int, ...]
    layout: TokenLayout
    stored: int

    @classmethod
    def of(cls, num_frames: int | Sequence[int] | None, batch: int, stored: int, layout: TokenLayout) -> ClipLengths:
        """Lengths of ``batch`` clips stored as ``stored`` pixel frames each.

        Args:
            num_frames: None: every clip fills the storage. A number: the pixel frames that all latents of every clip
                stand for. One number a clip: its own length, where clips are padded at the end.

        Raises:
            ValueError: for a count below 1 or above ``stored``, or not one for each clip.
        """
        whole = num_frames if isinstance(num_frames, int) else stored
        layout = layout.of_pixels(whole)
        latent_frames = layout.latent_shape[0]
        given = [num_frames] * batch if num_frames is None or isinstance(num_frames, int) else list(num_frames)
        if len(given) != batch:
            raise ValueError(f"num_frames must have one number for each of {batch} clips, got {len(given)}")
        pixels = [stored if count is None else count for count in given]
        for count in pixels:
            if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= stored:
                raise ValueError(f"num_frames must be 1 to {stored}, the pixel frames given, got {count!r}")
        latents = [latent_frames] * batch
        if num_frames is not None and not isinstance(num_frames, int):
            starts = [start for start, _ in frame_groups(stored, latent_frames)]
            latents = [sum(start < count for start in starts) for count in pixels]
        tokens = [-(-(layout.front_padding + count) // layout.patch) for count in latents]
        return cls(tuple(pixels), tuple(latents), tuple(tokens), layout, whole)

    def mask(self, device: torch.device) -> torch.Tensor | None:
        """(B, T) bool, the student frames that are in each clip; None where all are."""
        if min(self.tokens) == self.layout.frames:
            return None
        ends = moved(torch.tensor(self.tokens), device)
        return torch.arange(self.layout.frames, device=device) < ends[:, None]

    def within(self, mask: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
        """``mask`` (B, T) on ``device``, None for all frames, without the frames that are not in their clip."""
        inside = self.mask(device)
        if inside is None or mask is None:
            return mask if inside is None else inside
        return inside & mask


def check_pixel_frames(what: str, lengths: ClipLengths, allowed: Callable[[int], list[range]]) -> None:
    """ValueError unless the batch has as many pixel frames as its latents were made of.

    Args:
        what: what has the frames, for the message.
        lengths: of the clips.
        allowed: numbers of pixel frames of which the family's VAE makes a number of latent frames.
    """
    frames, layout = lengths.stored, lengths.layout
    most = layout.frames * layout.patch
    # Without and with latents that pad the front. One for each token frame: those that were chosen before.
    ranges = [each for latents in range(most - layout.patch + 1, most + 1) for each in allowed(latents)]
    if frames == layout.frames or any(frames in each for each in ranges):
        return
    right = " or ".join(f"{each[0]}" if len(each) == 1 else f"{each[0]} to {each[-1]}" for each in ranges)
    raise ValueError(
        f"{what} {frames} frames, but the {most} latent frames of the transformer's forward are made "
        f"of {right}: give those, or {layout.frames} frames, one for each of its token frames"
    )


def check_pixels(pixels: torch.Tensor, batch: int, *, look: bool) -> None:
    """Shape and type of pixels (B, P, 3, H, W), and with ``look`` their range, which waits for the device.

    Raises:
        ValueError: naming what is wrong.
    """
    if not isinstance(pixels, torch.Tensor):
        raise ValueError(f"pixels must be a tensor (B, P, 3, H, W), got {type(pixels).__name__}")
    if pixels.dim() != 5 or pixels.shape[0] != batch or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(f"pixels must be (B, P, 3, H, W) with B = {batch}, got {tuple(pixels.shape)}")
    if pixels.dtype == torch.uint8:
        return
    if not pixels.is_floating_point():
        raise ValueError(f"pixels must be uint8, or floating point in [0, 1], got {pixels.dtype}")
    if look:
        low, high = (float(value) for value in pixels.aminmax())
        if low < -PIXEL_TOLERANCE or high > 1 + PIXEL_TOLERANCE:
            raise ValueError(
                f"floating-point pixels must lie in [0, 1], the first batch reaches from {low:.4g} to {high:.4g}: "
                "scale them (from [-1, 1]: pixels / 2 + 0.5), or give uint8"
            )


def encode_clips(
    teacher: FrameEncoder,
    pixels: torch.Tensor,
    lengths: ClipLengths,
    rule: str,
    device: torch.device,
    wanted: range | None = None,
) -> TeacherFeatures:
    """Teacher features (B, T, N, E) of clips' pixels (B, P, 3, H, W); encodes only the frames that ``rule`` needs.

    wanted: student frames whose teacher's are made, (B, len(wanted), N, E); None: all.
    """
    layout = lengths.layout
    wanted = range(layout.frames) if wanted is None else wanted
    clips = [
        clip_groups(*count, layout.latent_shape[0], layout.patch)[wanted.start : wanted.stop]
        for count in zip(lengths.pixels, lengths.latents, strict=True)
    ]
    # Of each student frame the first pixel frame and the last that its teacher's features are the mean of.
    chosen = [groups if rule == "mean" else [(teacher_frame(rule, group),) * 2 for group in groups] for groups in clips]
    needed = [sorted({frame for first, last in own for frame in range(first, last + 1)}) for own in chosen]
    # Slices instead of an index tensor: a list copied to a GPU would make the host wait.
    frames = torch.stack([clip[index] for clip, indices in zip(pixels, needed, strict=True) for index in indices])
    features, grid = teacher.encode(frames, layout.grid, device)
    if rule != "mean" and all(len(indices) == len(wanted) for indices in needed):
        return TeacherFeatures(features.unflatten(0, (len(pixels), len(wanted))), grid)
    rows = [
        torch.stack([clip[indices.index(first) : indices.index(last) + 1].mean(dim=0) for first, last in own])
        for clip, indices, own in zip(features.split([len(each) for each in needed]), needed, chosen, strict=True)
    ]
    return TeacherFeatures(torch.stack(rows), grid)


def given_features(
    features: torch.Tensor | TeacherFeatures,
    grid: Sequence[int] | None,
    num_frames: int | Sequence[int] | None,
    rule: str,
    batch: int,
    layout: TokenLayout,
) -> tuple[TeacherFeatures, ClipLengths | None]:
    """The caller's features as (B, T, N, E) with their grid, and each clip's length where the caller gave it.

    ``features``: (B, S, N, E), on ``grid`` or else on the student's, or (B, S, height, width, E). S = T is one frame
    for each student frame (the longest of ``num_frames`` then fills them); otherwise ``num_frames`` says that they are
    features of every pixel frame.

    Raises:
        ValueError: for another shape or grid, or frames that are neither.
    """
    if isinstance(features, TeacherFeatures):
        features, grid = features
    if not (isinstance(features, torch.Tensor) and features.is_floating_point()):
        what = features.dtype if isinstance(features, torch.Tensor) else type(features).__name__
        raise ValueError(f"features must be a floating-point tensor (B, S, N, E), got {what}")
    if grid is not None:
        grid = _feature_grid(grid)
    if features.dim() == 5:
        own = (features.shape[2], features.shape[3])
        if grid not in (None, own):
            raise ValueError(f"feature_grid = {grid}, but features {tuple(features.shape)} lie on {own[0]} x {own[1]}")
        grid, features = own, features.flatten(2, 3)
    if features.dim() != 4 or features.shape[0] != batch:
        raise ValueError(
            f"features must be (B, S, N, E) or (B, S, height, width, E) with B = {batch}, got {tuple(features.shape)}"
        )
    if grid is None:
        grid = layout.grid
        if features.shape[2] != grid[0] * grid[1]:
            raise ValueError(
                f"features of shape {tuple(features.shape)} have {features.shape[2]} tokens a frame, the student's "
                f"grid is {grid[0]} x {grid[1]}: give feature_grid=(height, width), or (B, S, height, width, E)"
            )
    found = TeacherFeatures(features, (grid[0], grid[1]))
    stored = features.shape[1]
    if stored == layout.frames:
        if num_frames is None or isinstance(num_frames, int):
            return found, None
        return found, ClipLengths.of(num_frames, batch, max(num_frames, default=0), layout)
    if num_frames is None:
        raise ValueError(
            f"features have {stored} frames, the student {layout.frames}: give one for each student frame, or "
            "features of every pixel frame together with num_frames="
        )
    lengths = ClipLengths.of(num_frames, batch, stored, layout)
    selected = select_frames(
        features,
        rule,
        lengths.layout.latent_shape[0],
        num_frames=lengths.pixels,
        num_latents=lengths.latents,
        patch=layout.patch,
    )
    return TeacherFeatures(selected, found.grid), lengths


def _feature_grid(grid: Any) -> Grid:
    """``feature_grid`` in Python's integers, whatever library's they come in."""
    try:
        return as_grid([operator.index(side) for side in grid], "feature_grid")
    except TypeError:
        raise ValueError(f"feature_grid must be (height, width), two positive integers, got {grid!r}") from None
