"""What files of videos and models are known by, and what a cache keeps beside what is encoded."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

import torch

from crepa_kernels.teachers.cache import DamagedFile, file_name, read_tensors, write_tensors

SAMPLE = 1 << 16  # bytes read at each of three places of a video file
READ_WHOLE = 1 << 26  # bytes up to which a model's file is read from end to end
PIECE = 1 << 12  # bytes read at each of three places of a tensor in a larger one
ABANDONED = 3600.0  # seconds after which an unfinished file belongs to nobody


def content_identity(path: Path) -> str:
    """A file's size, and a digest of 64 KiB each at its beginning, middle and end: by these a replaced video is known.

    Neither its name nor its times count. What keeps the size and all three places is not seen: a few bytes changed in
    between, or a frame of an uncompressed video. Compressed anew, a video has another size or another index.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256()
        for place in (0, max(size - SAMPLE, 0) // 2, max(size - SAMPLE, 0)):
            file.seek(place)
            digest.update(file.read(SAMPLE))
    return f"{size}-{digest.hexdigest()[:32]}"


def model_identity(model: str, *parts: str) -> list[Any]:
    """What tells a model's weights from others, for a name: the same for a copy, wherever it lies.

    The names and contents of a local folder's files, or of those in its `parts`; the commit of a hub id.
    """
    if not Path(model).is_dir():
        from huggingface_hub import hf_hub_download

        config = Path(hf_hub_download(model, f"{parts[0]}/config.json" if parts else "config.json"))
        return [model, *parts, config.parts[config.parts.index("snapshots") + 1]]
    folders = [Path(model) / part for part in parts] or [Path(model)]
    files = sorted(path for folder in folders for path in folder.iterdir() if path.is_file())
    # What a desktop or a download leaves beside them is hidden.
    return [[path.relative_to(model).as_posix(), _weights_identity(path)] for path in files if path.name[0] != "."]


def _weights_identity(path: Path) -> str:
    """Digest of a model's file; of one above 64 MiB of 4 KiB at the beginning, middle and end of each tensor.

    What was trained or merged is changed all over. Of other formats than safetensors: 4 KiB of each MiB.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256(str(size).encode())
        for place, length in [(0, size)] if size <= READ_WHOLE else _places(file, size):
            file.seek(place)
            digest.update(file.read(length))
    return digest.hexdigest()[:32]


def _places(file: BinaryIO, size: int) -> list[tuple[int, int]]:
    file.seek(0)
    start = 8 + int.from_bytes(file.read(8), "little")
    try:
        if start > size:
            raise ValueError("its header would be longer than the file")
        header = json.loads(file.read(start - 8))
        spans = [each["data_offsets"] for name, each in header.items() if name != "__metadata__"]
        tensors = sorted((start + int(first), start + int(last)) for first, last in spans)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [(place, PIECE) for place in (*range(0, size, 1 << 20), size - PIECE)]
    places = [(0, start)]
    for first, last in tensors:
        whole = last - first <= 3 * PIECE
        starts = [first, (first + last - PIECE) // 2, last - PIECE]
        places += [(first, last - first)] if whole else [(place, PIECE) for place in starts]
    return places


def remember_frames(folder: Path, video: str, fps: float | None, frames: int) -> None:
    """Keeps how many frames of a video can be shown, where its container says another number; `video`: its content."""
    write_tensors(_frames_file(folder, video, fps), {"frames": torch.tensor(frames)})


def remembered_frames(folder: Path, video: str, fps: float | None) -> int | None:
    """What was kept of a video by `remember_frames`, or None."""
    try:
        return int(read_tensors(_frames_file(folder, video, fps))["frames"])
    except (FileNotFoundError, DamagedFile):
        return None


def _frames_file(folder: Path, video: str, fps: float | None) -> Path:
    return folder / "frames" / file_name({"video": video, "fps": fps})


def remove_abandoned(folder: Path) -> None:
    """Removes unfinished files in the folders of `folder` that a killed process left."""
    for path in folder.glob("*/*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()
