"""Position ids of an image's tokens, ``img_ids``: read from the device once for each grid, and what they say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..grid import Grid
from ..transfer import HostCopy

IMAGE_IDS = "img_ids"  # the forward's argument

# The largest integers up to which a 16-bit type has every one.
_EXACT = 256
# Ids of one shape that are recognized, the latest: where every step has others (moved at random), they would pile up.
_KEPT = 64


class ReadIds:
    """Ids as they were read, (N, axes) on the device and in fp64 on the host, and the grids found in them."""

    def __init__(self, ids: Tensor) -> None:
        self.on_device = ids.clone()
        self._on_host = ids.cpu().double()
        self._grids: dict[int, Grid] = {}

    def grid(self, start: int) -> Grid:
        """``image_grid`` of the image whose tokens begin at ``start``."""
        if start not in self._grids:
            self._grids[start] = image_grid(self._on_host, start)
        return self._grids[start]


class ImageIds:
    """Reads ids that lie on a device once for each grid, and recognizes them there from then on.

    Their shape does not tell 9 x 16 tokens from 16 x 9. So ids are compared on the device with those of their shape
    that were read before. ``look`` queues this, and the copy of its answer, before the forward's own work.
    """

    def __init__(self) -> None:
        self._read: dict[Any, list[ReadIds]] = {}  # by shape, type and device
        self._last: tuple[Tensor, int | None] | None = None
        self._equal: HostCopy | None = None
        self._found: ReadIds | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied model (an EMA's) starts empty.
        return ImageIds, ()

    def look(self, ids: Tensor) -> None:
        """Begins to find out which ids (N, axes), or (B, N, axes) of which the model takes the first, these are."""
        version = None if ids.is_inference() else ids._version
        last, self._last = self._last, (ids, version)
        if last is not None and last[0] is ids and last[1] == version is not None:
            return
        self._found = self._equal = None
        known = self._read.get(_kind(ids))
        if known:
            ids = _of_one(ids)
            self._equal = HostCopy(torch.stack([(ids == each.on_device).all() for each in known]).float())

    def read(self, ids: Tensor) -> ReadIds:
        """What these ids say. Waits for what was queued before the forward, or for ids of a new grid."""
        if self._last is None or self._last[0] is not ids:
            self.look(ids)
        if self._found is None:
            known = self._read.setdefault(_kind(ids), [])
            equal = [] if self._equal is None else self._equal.read()
            if 1.0 not in equal:
                known.append(ReadIds(_of_one(ids).detach()))
            self._found = known[equal.index(1.0) if 1.0 in equal else -1]
            del known[:-_KEPT]
        return self._found


def _of_one(ids: Tensor) -> Tensor:
    return ids[0] if ids.dim() == 3 else ids


def _kind(ids: Tensor) -> Any:
    return _of_one(ids).shape, ids.dtype, ids.device


def image_grid(ids: Tensor, start: int = 0) -> Grid:
    """(height, width) of the image whose tokens begin at ``start``.

    Tokens of reference images have another index in the first axis and come after it, or before ``start``.

    Args:
        ids: (N, axes) on the host: image index, row and column of each token.

    Raises:
        ValueError: without ids, or where they are not those of a grid in raster order.
    """
    if ids.dim() != 2 or ids.shape[1] < 3 or len(ids) <= start:
        raise ValueError(f"{IMAGE_IDS} must be (N, 3 or 4) with N > {start}, got {tuple(ids.shape)}")
    ids = ids[start:]
    index, rows, columns = ids[:, :3].unbind(1)
    ends = index[1:] != index[:-1]
    tokens = int(ends.nonzero()[0]) + 1 if ends.any() else len(ids)
    in_row = (rows[:tokens] == rows[0]).long().cumprod(0)
    width = int(in_row.sum())
    height, rest = divmod(tokens, max(width, 1))
    if ids.isfinite().all() and not rest:
        rows, columns = (each[:tokens].view(height, width) for each in (rows, columns))
        if (rows == rows[:, :1]).all() and (columns == columns[:1]).all() and _rises(rows[:, 0]) and _rises(columns[0]):
            return height, width
    raise ValueError(
        f"{IMAGE_IDS} of the {tokens} tokens with index {float(index[0]):g} are not rows and columns of a grid in "
        f"raster order, the first {ids[: min(tokens, 4)].tolist()}: CREPA does not know where these tokens lie "
        "(those of reference images come after the image's own, under another index)"
    )


def _rises(numbers: Tensor) -> bool:
    steps = numbers[1:] - numbers[:-1]
    return bool(((steps > 0) | ((steps == 0) & (numbers[1:].abs() >= _EXACT))).all())
