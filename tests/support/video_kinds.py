"""What is known of a small clip of one kind: how it is written, and what a player shows of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from corner_videos import corners, write

FRAMES = 9
HEIGHT, WIDTH = 48, 64
NEAR = 8  # of 255: what 4:2:0 and a quantizer leave of a flat colour
NEAR_5_BITS = 10  # one step of 5 bits
NEAR_HDR = 25  # tone mapping bends what is bright
NO_LOG = "log-level=none"
EVERY = tuple(range(FRAMES))


@dataclass(frozen=True)
class Kind:
    """A file, its clip and what is known of both.

    Attributes:
        make: writes the file at a path.
        frames: the numbers that the shown frames have, in order; none where nothing can be trained on.
        times: when each is shown, in seconds, and the end of the last; evenly at 25 a second where it is empty.
        size: height and width of the picture that is shown.
        near: how far a colour may be off, of 255.
        why: what the plan says of the file that it passes over, or with `late` the run when it decodes it.
        said: what a line of the plan says of a file that is trained on.
    """

    name: str
    make: Callable[[Path], Any]
    frames: tuple[int, ...] = EVERY
    times: tuple[float, ...] = ()
    size: tuple[int, int] = (HEIGHT, WIDTH)
    near: float = NEAR
    why: str = ""
    late: bool = False
    said: str = ""


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """The corners around four blocks, black or white, which are the bits of a frame's number."""
    drawn, side = corners(height, width), height // 6
    for bit, (down, right) in enumerate(itertools.product((-side, 0), repeat=2)):
        top, left = height // 2 + down, width // 2 + right
        drawn[top : top + side, left : left + side] = 255 * (number >> bit & 1)
    return drawn


def number_of(pixels: np.ndarray, height: int, scale: float) -> int:
    """Of a picture (3, h, w), the middle of one that was `height` high, `scale` times as large."""
    _, tall, wide = pixels.shape
    side, found = height // 6 * scale, 0
    for bit, (down, right) in enumerate(itertools.product((-0.5, 0.5), repeat=2)):
        row, column = round(tall / 2 + down * side), round(wide / 2 + right * side)
        found |= int(pixels[:, row - 1 : row + 2, column - 1 : column + 2].mean() > 127) << bit
    return found


def pictures(height: int = HEIGHT, width: int = WIDTH, frames: int = FRAMES) -> list[np.ndarray]:
    return [picture(number, height, width) for number in range(frames)]


def written(path: Path, codec: str = "libx264", pixels: str = "yuv420p", **how: Any) -> Path:
    size = how.pop("size", (HEIGHT, WIDTH))
    return write(path, pictures(*size), codec=codec, pixels=pixels, **how)


def kind(name: str, codec: str = "libx264", pixels: str = "yuv420p", **how: Any) -> Kind:
    """One that is written by an encoder and shown as it was given."""
    ours = {key: how.pop(key) for key in ("frames", "near", "said") if key in how}
    size = how.pop("shown", how.get("size", (HEIGHT, WIDTH)))
    return Kind(name, partial(written, codec=codec, pixels=pixels, **how), size=size, **ours)


def of(make: Callable[..., Any], **how: Any) -> Callable[[Path], Any]:
    """What `make` does with the usual pictures."""
    return lambda path: make(path, pictures(), **how)


FULL = {"color_range": 2}
FINE = {"qmin": "1", "qmax": "2"}
X265 = {"x265-params": NO_LOG}
