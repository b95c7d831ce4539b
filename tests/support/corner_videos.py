"""Videos whose four corners have colours that are known, stored as cameras and tools store them."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

# As a player shows them.
CORNERS = {"red": (220, 40, 40), "green": (40, 200, 60), "yellow": (230, 220, 50), "blue": (50, 60, 220)}
HEIGHT, WIDTH = 96, 160
IDENTITY = (1, 0, 0, 1)
PRIMARIES_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
MATRICES = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}


def corners(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """(height, width, 3) uint8: red and green above blue and yellow."""
    red, green, yellow, blue = (np.array(color, np.uint8) for color in CORNERS.values())
    picture = np.empty((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2], picture[: height // 2, width // 2 :] = red, green
    picture[height // 2 :, width // 2 :], picture[height // 2 :, : width // 2] = yellow, blue
    return picture


def corner_error(pixels: Any) -> float:
    """How far the worst channel of the four corners of (3, H, W) is from what it is shown as, of 255."""
    pixels = np.asarray(pixels, np.float32)
    height, width = pixels.shape[1:]
    near, down, right = slice(3, 11), slice(height - 11, height - 3), slice(width - 11, width - 3)
    places = ((near, near), (near, right), (down, right), (down, near))
    means = [pixels[(slice(None), *place)].mean((1, 2)) for place in places]
    return float(max(np.abs(mean - color).max() for mean, color in zip(means, CORNERS.values(), strict=True)))


def write(
    path: Path,
    pictures: Sequence[np.ndarray],
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    times: Sequence[int] | None = None,
    rate: int = 25,
    aspect: Fraction | None = None,
    matrix: Sequence[int] = IDENTITY,
    options: Mapping[str, str] | None = None,
    mux: Mapping[str, str] | None = None,
    format: str | None = None,
    tags: Mapping[str, int] | None = None,
) -> Path:
    """Pictures (H, W, 3) uint8 in RGB, or (H, W, 3) uint16 of YUV 4:4:4 in 10 bits, as a video.

    times: of each frame in units of 1 / `rate`. matrix: a, b, c, d of an MP4's display matrix.
    """
    with _same_priority(), av.open(str(path), "w", format=format, options=dict(mux or {})) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.options = pixels, dict(options or {})
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        for number, picture in enumerate(pictures):
            frame = _frame(picture)
            frame.pts, frame.time_base = number if times is None else times[number], Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if tuple(matrix) != IDENTITY:
        set_matrix(path, matrix)
    return path


@contextmanager
def _same_priority() -> Iterator[None]:
    """SVT-AV1 makes the thread that opens it a real-time one, where it may: what that does or starts later goes first.

    A browser of such a test leaves nothing to anybody else.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def _frame(picture: np.ndarray) -> av.VideoFrame:
    if picture.dtype == np.uint8:
        return av.VideoFrame.from_ndarray(picture, format="rgb24")
    frame = av.VideoFrame(picture.shape[1], picture.shape[0], "yuv444p10le")
    for plane, values in zip(frame.planes, np.moveaxis(picture, -1, 0), strict=True):
        rows = np.zeros((plane.height, plane.line_size // 2), "<u2")
        rows[:, : values.shape[1]] = values
        plane.update(rows.tobytes())
    return frame


def set_matrix(path: Path, matrix: Sequence[int]) -> None:
    """An MP4's display matrix: a, b, c, d, by which a stored point (x, y) is shown at (a x + c y, b x + d y)."""
    data = bytearray(path.read_bytes())
    a, b, c, d = (each << 16 for each in matrix)
    header = data.index(b"tkhd")
    # After version and flags, times, track, duration, layer and volume.
    data[header + 44 : header + 80] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def as_yuv(signal: np.ndarray, matrix: int, full: bool) -> np.ndarray:
    """R'G'B' in 0 to 1 as 10-bit Y'CbCr, by the equations of BT.601, 709 and 2020."""
    kr, kb = MATRICES[matrix]
    y = signal @ np.array([kr, 1 - kr - kb, kb])
    chroma = np.stack([(signal[..., 2] - y) / (2 - 2 * kb), (signal[..., 0] - y) / (2 - 2 * kr)], axis=-1)
    low, luma, wide = (0, 1023, 1023) if full else (64, 876, 896)
    return np.rint(np.concatenate([low + luma * y[..., None], 512 + wide * chroma], -1)).astype(np.uint16)


def linear(picture: np.ndarray) -> np.ndarray:
    signal = picture / 255
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def pq(light: np.ndarray) -> np.ndarray:
    """ST 2084, of light in units of 203 cd/m2."""
    power = (light.clip(0) * 203 / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg(light: np.ndarray) -> np.ndarray:
    scene = 0.26496256 * light.clip(0) ** (1 / 1.2)
    log = 0.17883277 * np.log((12 * scene - 0.28466892).clip(1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), log)
