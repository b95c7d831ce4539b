"""Encoded tensors, the teacher's and others, as files that are whole or not there, named by what they are made of."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..optional import require
from ..regularizer.saving import replacing
from . import TeacherFeatures

PRECISIONS = ("teacher", "int8")
CHECKSUM = "crc32"  # and the file's name, in one entry: several are written in no fixed order


class DamagedFile(ValueError):
    """A file of the cache does not hold what was written into it; the message says why."""


class TeacherCache:
    """The teacher's features of clips in a folder, each made once, in a file that is whole or not there.

    Processes may share the folder. Needs safetensors.

    Args:
        folder: made when the first is written.
        precision: "teacher" for the type that the teacher makes, or "int8" for 8 bits with a scale for each token, of
            which `unpacked` says the error. Caches of both may share a folder.

    Raises:
        ValueError: for another precision.
    """

    def __init__(self, folder: str | os.PathLike[str], precision: str = "teacher") -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be {' or '.join(map(repr, PRECISIONS))}, got {precision!r}")
        self.folder, self.precision = Path(folder), precision

    def path(self, content: Mapping[str, Any]) -> Path:
        """The file of what is made from ``content``."""
        return self.folder / file_name(content if self.precision == "teacher" else {**content, "bits": 8})

    def get(self, content: Mapping[str, Any], make: Callable[[], TeacherFeatures]) -> TeacherFeatures:
        """The features that are kept under ``content``, on the CPU, or those that ``make`` gives, which are kept.

        Args:
            content: JSON values that say all that the features depend on: which video (its size and a digest, not its
                name alone), which frames, which encoder at which image size.
            make: called where they are not there yet, or their file is damaged.

        Raises:
            OSError: the folder cannot be written.
        """
        path = self.path(content)
        with contextlib.suppress(FileNotFoundError, DamagedFile, KeyError):
            return _as_features(read_tensors(path))
        made = make()
        kept = packed(TeacherFeatures(made.features.detach().cpu(), made.grid), self.precision)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(path, kept)
        # The first time too what every later one gives.
        return _as_features(kept)


def packed(made: TeacherFeatures, precision: str) -> dict[str, Tensor]:
    """Features (..., N, E) and their grid as they are kept: `features` in their type or in 8 bits, then with
    `feature_scale` (..., N) in fp32, and `feature_grid` (2,) int64.
    """
    features, kept = made.features, {"feature_grid": torch.tensor(made.grid)}
    if precision == "teacher":
        return {"features": features, **kept}
    wide = features.float()
    scale = wide.abs().amax(-1) / 127
    # A token of zeros has no scale.
    rounded = (wide / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round_()
    return {"features": rounded.to(torch.int8), "feature_scale": scale, **kept}


def unpacked(kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `packed` gave, with `features` as the loss takes them: of 8 bits in fp32.

    Each number of a token is then at most half a step off, max|y| / 254.
    """
    rest = {name: tensor for name, tensor in kept.items() if name != "feature_scale"}
    if "feature_scale" in kept:
        rest["features"] = kept["features"].float() * kept["feature_scale"][..., None]
    return rest


def _as_features(kept: Mapping[str, Tensor]) -> TeacherFeatures:
    height, width = kept["feature_grid"].tolist()
    return TeacherFeatures(unpacked(kept)["features"], (height, width))


def file_name(content: Mapping[str, Any]) -> str:
    """The name of what is made from `content` (JSON values): another one wherever anything in it differs."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:40] + ".safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes `tensors` with a checksum and the file's name.

    `path` is either whole or as it was before, whatever happens meanwhile.
    OSError naming `path` where the disk is full or cannot be written; nothing is left behind then.
    """
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = require("safetensors.torch", "the cache").save(kept, {CHECKSUM: f"{_checksum(path, kept)} {path.name}"})
    with replacing(path) as file:
        file.write_bytes(data)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What `write_tensors` wrote. DamagedFile where any byte of it is another, or it was written as another file."""
    with _opened(path) as (file, checksum):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    if checksum != _checksum(path, tensors):
        raise DamagedFile(f"{path} is damaged: its checksum is not that of its bytes")
    return tensors


def check_whole(path: Path) -> None:
    """DamagedFile where a file is cut off, is none of ours or another one; its header is read, its tensors are not."""
    with _opened(path):
        pass


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, str]]:
    """A file and the checksum of its header, whose name tells it from another that was put in its place."""
    safetensors = require("safetensors", "the cache")
    try:
        with safetensors.safe_open(path, "pt") as file:
            checksum, _, name = (file.metadata() or {}).get(CHECKSUM, "").partition(" ")
            if not checksum:
                raise DamagedFile(f"{path} is damaged: it has no checksum")
            if name != path.name:
                raise DamagedFile(f"{path} is damaged: it was written as {name}")
            yield file, checksum
    except safetensors.SafetensorError as error:
        raise DamagedFile(f"{path} is damaged: {error}") from error


def _checksum(path: Path, tensors: Mapping[str, Tensor]) -> str:
    value = zlib.crc32(path.name.encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
