"""Clips that are turned, trimmed, timed, cut off or damaged, that have company, and files that are no clips at all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from corner_videos import write
from video_kinds import EVERY, FRAMES, FULL, HEIGHT, WIDTH, Kind, kind, of, pictures, written
from video_surgery import (
    copied,
    cut_off,
    damaged,
    edited,
    jpeg_file,
    through_a_pipe,
    with_cover,
    with_display_size,
    with_orientation_message,
    with_other_streams,
    with_rotation,
    with_zeros,
    write_animated_webp,
    write_audio,
)


def _stored(shown: np.ndarray, matrix: Sequence[int]) -> np.ndarray:
    """The picture of which a player shows `shown`: a stored point (x, y) is shown at (a x + c y, b x + d y)."""
    a, b, c, d = matrix
    height, width = shown.shape[:2] if b == 0 else shown.shape[1::-1]
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    x, y = a * across + c * down, b * across + d * down
    return shown[y - y.min(), x - x.min()]


def _turned(path: Path, matrix: Sequence[int], **how: Any) -> Path:
    return write(path, [_stored(each, matrix) for each in pictures()], matrix=matrix, **how)


def _narrow(aspect: Fraction) -> list[np.ndarray]:
    """Stored so wide that pixels of this aspect give them their width back."""
    columns = ((np.arange(round(WIDTH / aspect)) + 0.5) * float(aspect)).astype(int)
    return [each[:, columns] for each in pictures()]


def _squeezed(path: Path, aspect: Fraction, **how: Any) -> Path:
    return write(path, _narrow(aspect), aspect=aspect, **how)


TURNS = [m for m in itertools.product((-1, 0, 1), repeat=4) if sum(map(abs, m)) == 2 and m[0] * m[3] != m[1] * m[2]]
SHAPES = [
    *(
        Kind(f"matrix {' '.join(map(str, matrix))}.{suffix}", partial(_turned, matrix=matrix))
        for matrix, suffix in zip(TURNS, itertools.cycle(("mp4", "mov")), strict=False)
    ),
    *(
        Kind(f"turned {degrees}.{suffix}", of(with_rotation, degrees=degrees, codec=codec))
        for suffix, codec in (("mkv", "libx264"), ("webm", "libvpx-vp9"))
        for degrees in (90, -90, 180)
    ),
    kind("cropped by its stream.mp4", size=(44, 60)),
    Kind(
        "display size.webm",
        lambda path: with_display_size(path, _narrow(Fraction(2)), (HEIGHT, WIDTH), codec="libvpx-vp9"),
    ),
    Kind("turned by its stream.h264", of(with_orientation_message)),
    *(
        Kind(f"pixels {aspect.numerator} to {aspect.denominator}.{suffix}", partial(_squeezed, aspect=aspect, **how))
        for aspect, suffix, how in (
            (Fraction(4, 3), "mp4", {}),
            (Fraction(2), "mkv", {}),
            (Fraction(1, 2), "ts", {}),
            (Fraction(4, 3), "avi", {"codec": "mpeg4"}),
            (Fraction(2), "mov", {"codec": "prores_ks", "pixels": "yuv422p10le"}),
            (Fraction(4, 3), "mpg", {"codec": "mpeg2video"}),
        )
    ),
]

OPEN = "open-gop=1:keyint=4:min-keyint=4:bframes=2:b-adapt=0:scenecut=0"
CLOSED = {"g": "3", "bf": "0"}


VARIABLE = (0, 1, 2, 3, 10, 11, 20, 24, 25)


def _timed(name: str, ticks: Sequence[int], rate: int, **how: Any) -> Kind:
    """ticks: when each frame is shown and, last, when the last one ends, in units of 1 / rate."""
    make = partial(written, times=list(ticks[:-1]), rate=rate, **how)
    return Kind(name, make, times=tuple(tick / rate for tick in ticks))


TIMES = [
    *(_timed(f"60 fps.{suffix}", range(FRAMES + 1), 60) for suffix in ("mp4", "mkv", "ts")),
    _timed("12 fps.mov", range(FRAMES + 1), 12),
    # A player shows the last frame as long as the one before it.
    *(_timed(f"variable.{suffix}", (*VARIABLE, 26), 25) for suffix in ("mp4", "mov", "mkv", "flv", "ts")),
    _timed("variable.webm", (*VARIABLE, 26), 25, codec="libvpx-vp9"),
    _timed("variable.gif", (*VARIABLE, 26), 25, codec="gif", pixels="rgb8"),
    *(
        Kind(f"stream copy from frame 4.{suffix}", of(copied, start=4, options=CLOSED), tuple(range(4, FRAMES)))
        for suffix in ("mp4", "mov")
    ),
    *(
        Kind(f"stream copy with B-frames.{suffix}", of(copied, start=4, options={"g": "6", "bf": "2"}), EVERY[4:])
        for suffix in ("mp4", "mov")
    ),
    # Others have no edit lists: a copy begins at the key frame before.
    *(
        Kind(f"stream copy from frame 4.{suffix}", of(copied, start=3, options=CLOSED), tuple(range(3, FRAMES)))
        for suffix in ("mkv", "ts")
    ),
    *(
        Kind(
            f"copy at an open group.{suffix}",
            of(copied, start=None, options={"x264-params": OPEN}),
            tuple(range(4, FRAMES)),
        )
        for suffix in ("mp4", "mkv", "ts")
    ),
    Kind("delayed.mp4", of(edited, edits=[(200, -1), (360, 0)])),
    Kind("end cut by an edit list.mp4", of(edited, edits=[(240, 0)]), EVERY[:6]),
    Kind("begin cut by an edit list.mov", of(edited, edits=[(240, 3)]), EVERY[3:]),
    Kind("middle cut by edit lists.mp4", of(edited, edits=[(120, 0), (120, 6)]), (0, 1, 2, 6, 7, 8)),
]

STREAMS = [
    *(
        Kind(f"with sound.{suffix}", of(with_other_streams, sound=sound))
        for suffix, sound in (
            ("mp4", "aac"),
            ("mkv", "flac"),
            ("avi", "pcm_s16le"),
            ("ts", "mp2"),
            ("mov", "pcm_s16le"),
        )
    ),
    Kind("sound that lasts longer.mkv", of(with_other_streams, sound="flac", seconds=1.0)),
    Kind("sound that lasts longer.mp4", of(with_other_streams, sound="aac", seconds=1.0)),
    Kind("two videos.mp4", of(with_other_streams, second=True)),
    Kind("two videos.mkv", of(with_other_streams, second=True)),
    Kind("two videos.ts", of(with_other_streams, second=True)),
    Kind("cover.mp4", of(with_cover)),
    Kind("cover.mkv", of(with_cover)),
]

WHOLE_FRAMES = {"g": "1"}
M2TS = {"format": "mpegts", "mux": {"mpegts_m2ts_mode": "1"}}
JPEGS = {"codec": "mjpeg", "pixels": "yuvj420p", "tags": FULL}
# Nothing is missing at their ends, whatever they say.
WHOLE = [
    *(
        Kind(f"through a pipe.{suffix}", of(through_a_pipe, codec=codec))
        for suffix, codec in (
            ("mkv", "libx264"),
            ("webm", "libvpx-vp9"),
            ("avi", "mpeg4"),
            ("flv", "libx264"),
            ("ts", "libx264"),
            ("ogv", "libvpx"),
        )
    ),
    Kind("zeros after its end.gif", of(with_zeros, codec="gif", pixels="rgb8")),
    Kind("zeros after its end.mp4", of(with_zeros)),
    Kind("zeros after its end.mkv", of(with_zeros)),
]
# What is left of them is trained on.
CUT = [
    Kind(f"cut off.{suffix}", of(cut_off, frames=6, **how), EVERY[:6], said=f"cut off.{suffix} {said}")
    for suffix, said, how in (
        ("mkv", "has ", {"options": WHOLE_FRAMES}),
        ("webm", "has ", {"codec": "libvpx-vp9"}),
        ("ts", "ends before", {"options": WHOLE_FRAMES}),
        ("m2ts", "ends before", {"options": WHOLE_FRAMES, **M2TS}),
        ("avi", "has ", {"share": 0, **JPEGS}),
        ("ogv", "ends before", {"codec": "libvpx", "mux": {"page_duration": "1"}}),
        ("gif", "ends before", {"codec": "gif", "pixels": "rgb8", "share": 0}),
    )
]
# The container says where a frame is damaged that a clip would have. An MP4's index is read before its frames.
CUT_IN_A_FRAME = [
    Kind(f"cut in a frame.{suffix}", of(cut_off, frames=6, **how), (), why=why)
    for suffix, why, how in (
        ("avi", "damaged or cut off after frame 6", JPEGS),
        ("flv", "damaged or cut off after frame 6", {"codec": "flv", "options": WHOLE_FRAMES}),
        ("mxf", "damaged or cut off after frame 6", {"codec": "mpeg2video", "options": WHOLE_FRAMES}),
        ("ivf", "damaged or cut off after frame 6", {"codec": "libvpx"}),
        ("mpg", "damaged or cut off after frame", {"codec": "mpeg2video", "options": WHOLE_FRAMES}),
        ("wmv", "corrupt", {"codec": "wmv2", "options": WHOLE_FRAMES}),
    )
] + [
    Kind(
        f"cut in a frame.{suffix}",
        of(cut_off, frames=6, **how),
        (),
        why="damaged or cut off after frame 6",
        late=True,
        said=f"cut in a frame.{suffix} has ",
    )
    for suffix, how in (
        ("mp4", {"options": WHOLE_FRAMES, "mux": {"movflags": "faststart"}}),
        ("mov", {**JPEGS, "mux": {"movflags": "faststart"}}),
        ("m4v", {"options": WHOLE_FRAMES, "format": "mp4", "mux": {"movflags": "frag_keyframe+empty_moov"}}),
    )
]

PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nts.ts\n#EXT-X-ENDLIST\n"
REFUSED = [
    Kind("without its index.mp4", of(cut_off, frames=6, options=WHOLE_FRAMES), (), why="cannot be decoded"),
    *(
        Kind(f"damaged in the middle.{suffix}", of(damaged, frame=5, **how), (), why=why, late=late)
        for suffix, late, why, how in (
            ("mp4", True, "frame [0-9] is corrupt", {"options": {"g": "4"}}),
            ("mkv", True, "frame [0-9] is corrupt", {"options": {"g": "4"}}),
            ("avi", False, "frame 5 is corrupt", {"codec": "mpeg4", "options": {"g": "4"}}),
            ("ts", False, "damaged after frame [45]", {"options": WHOLE_FRAMES}),
        )
    ),
    Kind("one frame.mp4", lambda path: write(path, pictures(frames=1)), (), why="1 frame, the shortest clip needs 5"),
    Kind("sound alone.mp4", write_audio, (), why="no video stream"),
    Kind("empty.mp4", lambda path: path.touch(), (), why="cannot be decoded"),
    Kind("text.mp4", lambda path: path.write_text("a red square\n" * 99), (), why="cannot be decoded"),
    Kind("playlist.mp4", lambda path: path.write_text(PLAYLIST), (), why="playlist|cannot be decoded"),
]
# Known by their names; the plan counts them.
PASSED_OVER = {
    "._mp4.mp4": (lambda path: path.write_bytes(bytes.fromhex("0005160700020000")), "AppleDouble (._*)"),
    ".hidden.mp4": (written, "hidden"),
    "folder.mp4": (lambda path: path.mkdir(), "folders with a video's name"),
    "animated.webp": (of(write_animated_webp), "files of other kinds"),
    "picture.jpg": (jpeg_file, "files of other kinds"),
    "sound.m4a": (write_audio, "files of other kinds"),
    "notes.json": (lambda path: path.write_text("{}"), "files of other kinds"),
    "alone.txt": (lambda path: path.write_text("a caption"), "captions without a video"),
}
CHANGED = [*SHAPES, *TIMES, *STREAMS, *WHOLE, *CUT, *CUT_IN_A_FRAME, *REFUSED]
