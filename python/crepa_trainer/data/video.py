"""A video file as a player shows it: its frames, upright and with square pixels, and when each is shown."""

from __future__ import annotations

import heapq
import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.format import Flags
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import VideoReformatter

from ..terminal import several
from .color import to_rgb, transfer
from .whole import boxes, what_is_cut_off

# Demuxers of text that names other files.
PLAYLISTS = frozenset({"concat", "dash", "hls", "imf", "sdp", "rtsp"})
# Each of their packets is a frame, in the containers that are told apart below.
_FRAME_A_PACKET = frozenset(
    {"av1", "dnxhd", "ffv1", "h264", "hevc", "libaom-av1", "libdav1d", "mjpeg", "prores", "rawvideo", "vp9"}
)
_MOV, _MATROSKA = "mov", "matroska"
_MOST_REORDERED = 16  # frames, of H.264 and H.265
_SLACK = 1e-3  # seconds: some containers count in milliseconds


class DataError(ValueError):
    """No training data can be had from what was given; the message is one line for the user."""


class VideoError(DataError):
    """One video file cannot be used; the message says why."""


class EndsEarly(VideoError):
    """A video can be decoded without an error, and shows but `frames` frames."""

    def __init__(self, frames: int, needed: int) -> None:
        super().__init__(f"ends after {several(frames, 'frame')}, a clip of it needs {needed}")
        self.frames = frames


@dataclass(frozen=True)
class VideoInfo:
    """A video's length in frames, and the size of its upright picture in square pixels.

    Attributes:
        rate: frames a second on average, 0 where the file does not say.
        constant: whether all frames are shown equally long.
        hdr: "PQ", "HLG" or None.
        cut: what the file lacks at its end, where that can be known.
    """

    frames: int
    height: int
    width: int
    rate: float = field(default=0.0, compare=False)
    constant: bool = field(default=True, compare=False)
    hdr: str | None = field(default=None, compare=False)
    cut: str | None = field(default=None, compare=False)


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream. Whatever the decoder raises inside is a VideoError."""
    if not path.is_file():
        # A pipe would be waited for, without an end.
        raise VideoError("no such file" if not path.exists() else "not a regular file")
    try:
        # The name is a path, whatever it looks like, and what is in the file reaches no network.
        whole = f"file:{path.absolute()}"
        with av.open(whole, metadata_errors="replace", container_options={"protocol_whitelist": "file"}) as container:
            if PLAYLISTS.intersection(container.format.name.split(",")):
                raise VideoError(f"a playlist ({container.format.name}), not a video")
            # Not the picture on the cover.
            stream = container.streams.best("video")
            if stream is None:
                raise VideoError("no video stream")
            stream.thread_type = "AUTO"
            yield container, stream
    except VideoError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(f"cannot be decoded ({reason})") from error


def frames_of(container: Any, stream: Any, fps: float | None = None) -> Iterator[av.VideoFrame]:
    """The frames that are shown, in order; with `fps` those at its times, some left out or repeated."""
    frames = _intact_frames(container, stream)
    return frames if fps is None else _at_rate(frames, fps, stream)


def probe_video(path: Path, fps: float | None = None) -> VideoInfo:
    """How long a video is and how large, of which one frame is decoded where the container can be believed.

    It can be in MP4 and MOV, whose index is read (fragments: their packets), and in Matroska, whose packets are
    counted; elsewhere, where codecs hide frames in packets, and after a beginning that shows nothing, all is decoded.

    Raises VideoError where there is no first frame. A damage further in shows only when that is decoded.
    """
    with opened(path) as (container, stream):
        kind = container.format.name.split(",")[0]
        times = _indexed_times(path, stream) if kind == _MOV else None
        sure = kind in (_MOV, _MATROSKA) and stream.codec_context.name in _FRAME_A_PACKET
        shown: list[Any] = []
        first, begun = None, False
        for packet in container.demux(stream):
            if packet.size:
                sure, begun = sure and (begun or (packet.is_keyframe and not packet.is_corrupt)), True
                # Edit lists leave out packets that others still need.
                if not packet.is_discard:
                    # What is shown before the first key frame needs frames that were cut away.
                    sure = sure and not (shown and None not in (packet.pts, shown[0]) and packet.pts < shown[0])
                    shown.append(packet.pts)
            if not sure:
                break
            if first is None:
                first = next(iter(packet.decode()), None)
            elif times is not None:
                break
        times = shown if times is None else times
        base = float(stream.time_base or 0)
        info = None if first is None or not sure or None in times else _info(path, first, stream, times, base, fps)
    return _decoded_info(path, fps) if info is None else info


def _decoded_info(path: Path, fps: float | None) -> VideoInfo:
    with opened(path) as (container, stream):
        first, times = None, []
        for frame in _intact_frames(container, stream):
            first = frame if first is None else first
            times.append(frame.pts)
        if first is None:
            raise VideoError("no frame in its video stream")
        if _is_bare(stream) or None in times or len(set(times)) < len(times):
            times = list(range(len(times)))
            return _info(path, first, stream, times, 1 / _guessed_rate(stream), fps)
        return _info(path, first, stream, times, float(stream.time_base or 0), fps)


def _info(
    path: Path, first: av.VideoFrame, stream: Any, times: Sequence[int], base: float, fps: float | None
) -> VideoInfo:
    """times: of each frame that is shown, in units of `base` seconds, in any order."""
    seconds = [time * base for time in sorted(times)]
    lasts = [after - before for before, after in itertools.pairwise(seconds)] or [1 / _guessed_rate(stream)]
    usual = statistics.median(lasts)
    even = [each for each in lasts if abs(each - usual) <= max(0.1 * usual, 2 * _SLACK)]
    # Where a video was cut, one may last longer.
    constant = len(even) >= 0.95 * len(lasts)
    span = seconds[-1] - seconds[0]
    rate = len(even) / sum(even) if constant else (len(seconds) - 1) / span
    frames = len(seconds) if fps is None else max(math.ceil((span + lasts[-1] - _SLACK) * fps), 1)
    height, width = shown_size(first, stream)
    cut = what_is_cut_off(path, stream)
    return VideoInfo(frames, height, width, rate, constant, transfer(first, stream), cut)


def _is_bare(stream: Any) -> bool:
    """Whether a file is the stream of a codec alone, whose times FFmpeg guesses, and at its end wrongly."""
    return bool(stream.container.format.flags & Flags.no_timestamps.value)


def _guessed_rate(stream: Any) -> float:
    return float(stream.guessed_rate or stream.average_rate or 25)


def _indexed_times(path: Path, stream: Any) -> list[int] | None:
    """When each frame that is shown is decoded, from an MP4's index; None where that is not all of it."""
    entries = list(stream.index_entries)
    if not entries or len(entries) != stream.frames:
        return None
    with path.open("rb") as file:
        if any(name == b"moof" for name, _, _ in boxes(file)):  # fragments: it goes on after its header
            return None
    times = [entry.timestamp for entry in entries if not entry.is_discard]
    lasts = {after - before for before, after in itertools.pairwise(times)}
    # Frames are decoded in another order than they are shown: only of equal steps are the times those of showing.
    return times if lasts and max(lasts) - min(lasts) <= 1 else None


def _intact_frames(container: Any, stream: Any) -> Iterator[av.VideoFrame]:
    decoded = 0
    # A recording of a broadcast begins and ends anywhere.
    recording = container.format.name.split(",")[0] == "mpegts"
    begun = pending = False
    for packet in container.demux(stream):
        # A file that was cut off ends with a damaged packet and decodes without an error up to there.
        if packet.size and (pending or (packet.is_corrupt and not recording)):
            # What the decoder still holds is whole; how much it holds depends on its threads.
            for frame in stream.codec_context.decode(None):
                decoded += 1
                yield frame
            raise VideoError(f"damaged{'' if recording else ' or cut off'} after frame {decoded}")
        if packet.is_corrupt:
            pending = begun
            continue
        begun = begun or packet.is_keyframe
        try:
            frames = packet.decode()
        except av.FFmpegError:
            if recording and decoded == 0:
                continue
            raise
        for frame in frames:
            if frame.is_corrupt:
                if recording and decoded == 0:
                    continue
                raise VideoError(f"frame {decoded} is corrupt")
            decoded += 1
            yield frame


def _at_rate(frames: Iterable[av.VideoFrame], fps: float, stream: Any) -> Iterator[av.VideoFrame]:
    """At each multiple of 1 / fps after the first frame, the one that is shown then."""
    lasts = 1 / _guessed_rate(stream)
    start = time = 0.0
    shown: av.VideoFrame | None = None
    taken = 0
    for frame, said in _timed(frames, stream):
        if shown is None:
            start = time = said or 0.0
        else:
            now = time + lasts if said is None or said <= time else said
            time, lasts = now, now - time
            while start + taken / fps + _SLACK < time:
                yield shown
                taken += 1
        shown = frame
    while shown is not None and start + taken / fps + _SLACK < time + lasts:
        yield shown
        taken += 1


def _timed(frames: Iterable[av.VideoFrame], stream: Any) -> Iterator[tuple[av.VideoFrame, float | None]]:
    """Each frame with the second at which it is shown, or None where the file does not say that."""
    if _is_bare(stream) or stream.container.format.name != "avi":
        yield from ((frame, None if _is_bare(stream) else frame.time) for frame in frames)
        return
    # An AVI has times of decoding alone: frames come in the order in which they are shown, their times do not.
    held: deque[av.VideoFrame] = deque()
    times: list[float] = []
    for frame in frames:
        held.append(frame)
        heapq.heappush(times, math.inf if frame.time is None else frame.time)
        if len(held) > _MOST_REORDERED:
            yield held.popleft(), _known(heapq.heappop(times))
    while held:
        yield held.popleft(), _known(heapq.heappop(times))


def _known(time: float) -> float | None:
    return None if math.isinf(time) else time


def shown_size(frame: av.VideoFrame, stream: Any) -> tuple[int, int]:
    """Height and width of the upright picture in square pixels."""
    height, width = frame.height, max(1, round(frame.width * _pixel_aspect(stream)))
    return (width, height) if _turn(frame)[0] else (height, width)


class Upright:
    """The pictures of a video as they are shown, their aspect kept and their centre cropped to `height` and `width`.

    All are turned as `first` is, its first frame: what a stream itself says of it comes with key frames alone.
    """

    def __init__(self, first: av.VideoFrame, stream: Any, height: int, width: int) -> None:
        self.stream, self.turn, self.scaler = stream, _turn(first), VideoReformatter()
        self.size = (width, height) if self.turn[0] else (height, width)

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """(height, width, 3) uint8."""
        height, width = self.size
        aspect = _pixel_aspect(self.stream)
        scale = max(height / frame.height, width / (frame.width * aspect))
        tall, wide = max(height, round(frame.height * scale)), max(width, round(frame.width * aspect * scale))
        picture = to_rgb(frame, self.stream, self.scaler, tall, wide)
        top, left = (tall - height) // 2, (wide - width) // 2
        picture = picture[top : top + height, left : left + width]
        transposed, flip_down, flip_right = self.turn
        picture = picture.swapaxes(0, 1) if transposed else picture
        return picture[:: -1 if flip_down else 1, :: -1 if flip_right else 1]


def _pixel_aspect(stream: Any) -> float:
    """How much wider than tall a stored pixel is shown."""
    return float(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1)


def _unknown_side_data(cls: Any, value: int) -> Any:
    kind = object.__new__(cls)
    kind._name_, kind._value_ = f"UNKNOWN_{value}", value
    return kind


# PyAV refuses to tell anything of what lies beside a frame with which there is a kind newer than its own list, such as
# the EXIF of JPEGs and TIFFs.
_side_data_types: Any = SideDataType
_side_data_types._missing_ = classmethod(_unknown_side_data)


def _turn(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Whether the stored picture is transposed, and then flipped upside down and left to right.

    From the display matrix: a stored point (x, y) is shown at (a x + c y, b x + d y).
    """
    data = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    if data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, b < 0, c < 0
    return False, d < 0, a < 0
