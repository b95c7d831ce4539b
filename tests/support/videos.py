"""Real video files for tests, made with PyAV."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
from corner_videos import set_matrix
from crepa_trainer.data.clips import sample_videos
from crepa_trainer.data.video import Upright, frames_of, opened

# The display matrix of an MP4 that has a player turn the stored picture counterclockwise by as many degrees.
TURNS = {90: (0, -1, 1, 0), 180: (-1, 0, 0, -1), -90: (0, 1, -1, 0)}


def write_video(path: Path, frames: Iterable[np.ndarray], *, faststart: bool = False, rotation: int = 0) -> Path:
    """H.264 of RGB frames (height, width, 3) uint8. `faststart` puts the index at the front, as on the web.

    `rotation`: degrees by which players turn the stored picture, as a phone writes it.
    """
    options = {"movflags": "faststart"} if faststart else {}
    frames = list(frames)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "10"}
        stream.height, stream.width = frames[0].shape[:2]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    if rotation:
        set_matrix(path, TURNS[rotation])
    return path


def write_with_empty_samples(path: Path, frames: Iterable[np.ndarray]) -> Path:
    """H.265 in which every other sample shows nothing: it has twice as many by its index, and no error in it."""
    whole = path.with_name(f"{path.stem}-whole.mp4")
    with av.open(str(whole), "w") as container:
        stream = container.add_stream("libx265", rate=25)
        stream.pix_fmt, stream.options = "yuv420p", {"x265-params": "log-level=none:bframes=0"}
        frames = list(frames)
        stream.height, stream.width = frames[0].shape[:2]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream, number = target.add_stream_from_template(source.streams.video[0]), 0
        for packet in source.demux(video=0):
            if packet.dts is None:
                continue
            # The second is an access unit delimiter alone. Muxing changes a packet's time base to the target's.
            base = packet.time_base
            for each in (packet, av.Packet(bytes.fromhex("00000003460150"))):
                each.time_base, each.stream = base, stream
                each.pts = each.dts = 512 * number
                each.duration = 512
                number += 1
                target.mux(each)
    whole.unlink()
    return path


def moving_square(frames: int, height: int = 48, width: int = 80, seed: int = 0) -> list[np.ndarray]:
    """A bright square that wanders over a coloured pattern: something to see, and different for each seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 200, (height // 16, width // 16, 3))
    background = coarse.repeat(16, 0).repeat(16, 1).astype(np.uint8)
    corner, step = rng.integers(0, (height - 16, width - 16)), rng.integers(1, 4, 2)
    pictures = []
    for f in range(frames):
        top, left = (corner + f * step) % (height - 16, width - 16)
        picture = background.copy()
        picture[top : top + 16, left : left + 16] = 255
        pictures.append(picture)
    return pictures


def captioned_squares(folder: Path, count: int, height: int = 128, width: int = 144) -> Path:
    """A folder of videos of 18 frames, each with its caption beside it."""
    folder.mkdir()
    for seed in range(count):
        write_video(folder / f"{seed}.mp4", moving_square(18, height, width, seed))
        (folder / f"{seed}.txt").write_text("a red square moves over a blue pattern")
    return folder


def captioned_films(folder: Path) -> Path:
    """The sample videos, which were filmed and drawn, each with a caption beside it."""
    folder.mkdir()
    for video in sample_videos():
        (folder / video.name).symlink_to(video)
        (folder / video.name).with_suffix(".txt").write_text(f"a video of {video.stem}")
    return folder


def read_frames(path: Path, height: int, width: int, limit: int) -> torch.Tensor:
    """The first `limit` frames (or all, if fewer) as (F, 3, height, width) uint8, as clips are read."""
    with opened(path) as (container, stream):
        frames = list(islice(frames_of(container, stream), limit))
        upright = Upright(frames[0], stream, height, width)
        return torch.from_numpy(np.stack([upright(frame) for frame in frames])).permute(0, 3, 1, 2).contiguous()
