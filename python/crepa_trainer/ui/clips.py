"""The videos of a data folder as the page shows them, and their captions."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from crepa_kernels.regularizer.saving import replacing

from ..data.clips import read_clips
from ..data.dataset import Bucket, caption_file, choose_bucket
from ..data.listing import VIDEO_SUFFIXES, list_videos
from ..data.video import VideoError, probe_video
from ..terminal import several
from .form import FIELDS, Values
from .guard import Folders
from .shelf import all_runs

_WIDE = 320  # pixels of a thumbnail
PAGE_SIZE = 24


@dataclass(frozen=True)
class ShownVideo:
    """A video, as its file says. about: its bucket, length and rate, or why it cannot be used."""

    path: Path
    name: str
    about: str
    caption: str


def videos_of(folders: Folders, values: Values) -> list[Path]:
    """The videos that settings train on. ValueError where their folder is outside, or has none."""
    data = values.get("data")
    if not isinstance(data, str):
        raise ValueError("data: a folder is needed")
    folder = folders.inside(data)
    output = values.get("output")
    return list(list_videos(folder, (Path(output),) if isinstance(output, str) else ()).videos)


def shown(path: Path, values: Values) -> ShownVideo:
    """What the page says of a video; the first frame is decoded, which takes some time."""
    fps, sizes, counts = (_setting(values, key) for key in ("fps", "resolutions", "frame_counts"))
    try:
        info = probe_video(path, fps)
        rate = f"{info.rate:.5g}" if info.constant else "variable"
        about = f"{several(info.frames, 'frame')} of {info.height}x{info.width}, {rate} fps"
        bucket = choose_bucket(info, [tuple(size) for size in sizes], counts)
        about += f" → {bucket}"
    except VideoError as error:
        about = str(error)
    except (TypeError, ValueError):  # sizes that the form calls wrong
        pass
    try:
        caption = caption_file(path).read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError):
        caption = ""
    return ShownVideo(path, path.name, about, caption)


def _setting(values: Values, key: str) -> Any:
    value = values.get(key)
    return FIELDS[key].default if value is None else value


@lru_cache(maxsize=512)
def thumbnail(path: Path, changed: float) -> bytes:
    """A PNG of a video's first frame. changed: its time, by which another file of the name is known. VideoError."""
    from PIL import Image

    info = probe_video(path)
    bucket = Bucket(max(1, round(info.height * _WIDE / info.width)), _WIDE, 1)
    ((_, pixels),) = read_clips(path, bucket.height, bucket.width, [0], 1)
    written = io.BytesIO()
    Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(written, "PNG")
    return written.getvalue()


def checked_video(folders: Folders, path: str) -> Path:
    """A video's path from an address. ValueError outside the folders, or for another file."""
    found = folders.inside(path)
    if found.suffix.lower() not in VIDEO_SUFFIXES or not found.is_file():
        raise ValueError(f"{path} is no video")
    return found


def save_caption(folders: Folders, video: Path, text: str) -> None:
    """Writes a video's caption whole. ValueError for an empty one."""
    if not text.strip():
        raise ValueError(f"{caption_file(video).name}: a caption must not be empty")
    path = folders.inside(caption_file(video))
    with replacing(path) as file:
        file.write_text(text.strip() + "\n", encoding="utf-8")


def readers_of(folders: Folders, video: Path) -> list[str]:
    """The runs under way that train on a video."""
    return [
        run.name
        for run in all_runs(folders)
        if isinstance(data := run.settings().get("data"), str)
        and video.is_relative_to((run.started_in / Path(data).expanduser()).resolve())
        and run.state().running
    ]
