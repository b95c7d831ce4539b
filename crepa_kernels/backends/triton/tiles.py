"""Path and tile choices: JSON data of each device that was measured, and a heuristic for the others.

``python -m crepa_kernels.tune`` writes ``tiles/<device>.json``, entries at single shapes; a call takes the entry whose
widths are nearest.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from .launch import INTERPRETED

PathName = Literal["split", "one_pass"]
VENDOR: Literal["vendor"] = "vendor"


@dataclass(frozen=True)
class RowTile:
    """A kernel over whole rows.

    Attributes:
        rows: a step.
        warps: a program.
        programs: on each of the device's multiprocessors where they loop over rows: as many as its registers hold.
        lanes: a warp.
    """

    rows: int
    warps: int
    programs: int = 6
    lanes: int = 32

    @property
    def columns(self) -> int:
        """Numbers of 16 bits that a program loads at once, 16 bytes a lane."""
        return 8 * self.lanes * self.warps


@dataclass(frozen=True)
class ProductTile:
    """A matrix product's tile; ``split`` halves the sum along its columns before the epilogue."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    split: bool = False

    def shared_memory(self, element_size: int) -> int:
        """Bytes of the operands' buffers."""
        return self.stages * (self.m + self.n) * self.k * element_size


@dataclass(frozen=True)
class Choice:
    """Paths and tiles of one shape class.

    Attributes:
        training: path of calls that need a gradient; ``"one_pass"`` keeps nothing and projects again in the backward.
        inference: path of calls that need none.
        tokens: kernels over rows of width D.
        rows: kernels over rows of width E.
        dx: the product that gives the hidden states' gradient, or ``VENDOR``: a pass that writes LayerNorm's terms,
            and the vendor library's product added to them.
        one_pass: the projection with the similarity as its epilogue.
    """

    training: PathName
    inference: PathName
    tokens: RowTile
    rows: RowTile
    dx: ProductTile | Literal["vendor"]
    one_pass: ProductTile

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Choice:
        return cls(
            data["training"], data["inference"], RowTile(**data["tokens"]), RowTile(**data["rows"]),
            VENDOR if data["dx"] == VENDOR else ProductTile(**data["dx"]), ProductTile(**data["one_pass"]),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PairTiles:
    """Tiles of the relational loss; no card was tuned for them.

    Attributes:
        differences: square, of pairs of tokens; its operands are two of each side.
        gradient: the slopes' product with the rows; its rows and k divide the side of ``differences``.
    """

    differences: ProductTile
    gradient: ProductTile


_INTERPRETED = Choice(
    "split", "one_pass", RowTile(32, 1, 3), RowTile(32, 1, 3), ProductTile(64, 64, 64, 1, 1),
    ProductTile(64, 32, 64, 1, 1, split=True),
)  # fmt: skip


def heuristic(
    hidden_size: int,
    feature_size: int,
    element_size: int,
    shared_memory: int,
    hip: bool = False,
    capability: tuple[int, int] = (0, 0),
) -> Choice:
    """Tiles for an unknown device from its shared memory a block in bytes, and the paths that move the fewest bytes.

    ``capability``: CUDA's compute capability. From 10.0 on the vendor's product is ahead of a plain Triton one, which
    has neither descriptors nor persistent programs, by more than the pass before it takes.
    """
    if hip:
        dx, one_pass = ProductTile(128, 128, 32, 8, 2), ProductTile(128, 128, 32, 8, 2, split=True)
    elif shared_memory >= 200 * 1024:
        dx, one_pass = ProductTile(128, 256, 64, 8, 3), ProductTile(128, 128, 64, 8, 3, split=True)
    elif shared_memory >= 160 * 1024:
        dx, one_pass = ProductTile(128, 256, 32, 8, 3), ProductTile(128, 128, 32, 8, 3, split=True)
    else:
        dx, one_pass = ProductTile(128, 128, 32, 8, 3), ProductTile(128, 128, 32, 8, 3, split=True)
    dx, one_pass = fit(dx, element_size, shared_memory), fit(one_pass, element_size, shared_memory)
    inference: PathName = "one_pass" if element_size == 2 else "split"
    lanes = 64 if hip else 32
    tokens, rows = _rows_of(hidden_size, 16, lanes), _rows_of(feature_size, 24, lanes)
    vendor = not hip and capability >= (10, 0)
    return Choice("split", inference, tokens, rows, VENDOR if vendor else dx, one_pass)


def pair_tiles(element_size: int, shared_memory: int, hip: bool = False) -> PairTiles:
    """Tiles of the relational loss for rows of so many bytes a number, and shared memory a block in bytes."""
    if element_size == 4:
        # IEEE products are not the matrix units': what counts is registers. A wavefront has 64 lanes, and each loads
        # 16 bytes at a time of 64 x 16 numbers with four of them.
        return PairTiles(ProductTile(64, 64, 16, 4 if hip else 8, 2), ProductTile(64, 64, 16, 4, 2))
    k = 64 if shared_memory >= 200 * 1024 else 32
    differences, gradient = ProductTile(128, 128, k, 8, 3), ProductTile(128, 128, k, 8, 2 if hip else 3)
    return PairTiles(fit(differences, 2 * element_size, shared_memory), fit(gradient, element_size, shared_memory))


def _rows_of(width: int, per_lane: int, lanes: int) -> RowTile:
    """With so many numbers a lane at most, up to 8 warps, of which each loads 16 bytes at a time."""
    warps = min(8, 1 << max(0, math.ceil(math.log2(width / (per_lane * lanes)))))
    return RowTile(1, warps, max(1, 12 // warps), lanes)


def fit(tile: ProductTile, element_size: int, shared_memory: int) -> ProductTile:
    """``tile`` with fewer stages, then a smaller step, until its buffers fit in ``shared_memory`` bytes."""
    while tile.shared_memory(element_size) > shared_memory:
        if tile.stages > 2:
            tile = replace(tile, stages=tile.stages - 1)
        elif tile.k > 16:
            tile = replace(tile, k=tile.k // 2)
        else:
            tile = replace(tile, n=tile.n // 2)
    return tile


_forced: Choice | None = None


@contextmanager
def forced(choice: Choice) -> Iterator[None]:
    """Inside, every call takes ``choice``: for tuning, benches and tests."""
    global _forced
    outer, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = outer


def tile_folders() -> tuple[Path, ...]:
    """Where choices are looked up, first hit wins: ``$CREPA_TILES`` if set, then the package's own."""
    own = Path(__file__).parent / "tiles"
    return (Path(os.environ["CREPA_TILES"]), own) if "CREPA_TILES" in os.environ else (own,)


def device_slug(name: str) -> str:
    """File stem of a device's choices: its name in lower case, without the memory's size and other marks."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    marks = {"sxm", "sxm2", "sxm4", "sxm5", "pcie", "hbm2e", "hbm3", "hbm3e", "nvl", "geforce", "laptop", "gpu"}
    return "-".join(word for word in words if word not in marks and not re.fullmatch(r"\d+gb", word))


@cache
def device_entries(slug: str) -> tuple[tuple[int, int, str, Choice], ...]:
    """(hidden size, feature size, element type, choice) of every entry of the device, empty if it has no file."""
    for folder in tile_folders():
        path = folder / f"{slug}.json"
        if path.is_file():
            entries = json.loads(path.read_text())["entries"]
            return tuple(
                (entry["hidden_size"], entry["feature_size"], entry["dtype"], Choice.from_dict(entry["choice"]))
                for entry in entries
            )
    return ()


def write_entries(path: Path, device: str, source: str, entries: list[dict[str, Any]]) -> None:
    """A device's file, one entry a line; ``source`` says how they were come by."""
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    head = f'{{"device": {json.dumps(device)},\n"source": {json.dumps(source)},\n"entries": ['
    path.write_text(f"{head}\n{lines}\n]}}\n")
    device_entries.cache_clear()


def nearest(slug: str, hidden_size: int, feature_size: int, dtype: torch.dtype) -> Choice | None:
    """The device's entry of this type whose widths are nearest by ratio; None without one."""
    kind = str(dtype).removeprefix("torch.")

    def distance(entry: tuple[int, int, str, Choice]) -> float:
        return abs(math.log(entry[0] / hidden_size)) + abs(math.log(entry[1] / feature_size))

    return min((e for e in device_entries(slug) if e[2] == kind), key=distance, default=(0, 0, "", None))[3]


@cache
def _device_choice(index: int, hidden_size: int, feature_size: int, dtype: torch.dtype) -> Choice:
    properties = torch.cuda.get_device_properties(index)
    if (choice := nearest(device_slug(properties.name), hidden_size, feature_size, dtype)) is not None:
        return choice
    return device_heuristic(properties, hidden_size, feature_size, dtype.itemsize)


def device_heuristic(properties: Any, hidden_size: int, feature_size: int, element_size: int) -> Choice:
    """The heuristic's choice for a device, from torch's properties of it."""
    shared, hip = device_shared_memory(properties), torch.version.hip is not None
    capability = (properties.major, properties.minor)
    return heuristic(hidden_size, feature_size, element_size, shared, hip, capability)


def choose_pair_tiles(device: torch.device, dtype: torch.dtype) -> PairTiles:
    """Tiles of the relational loss for rows of ``dtype`` on ``device``."""
    if INTERPRETED or device.type != "cuda":
        return PairTiles(ProductTile(32, 32, 64, 1, 1), ProductTile(32, 32, 32, 1, 1))
    shared = device_shared_memory(torch.cuda.get_device_properties(device))
    return pair_tiles(dtype.itemsize, shared, torch.version.hip is not None)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; an H100's where tensors have no memory, and 1 for the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 1


def device_shared_memory(properties: Any) -> int:
    """Bytes of shared memory that one block may take on the device; 48 KiB, which all have, where torch hides it."""
    return getattr(properties, "shared_memory_per_block_optin", 48 * 1024)


def choice_source(device: torch.device) -> str:
    """Where the choices for ``device`` come from, in words."""
    if device.type != "cuda":
        return "the interpreter's tiles"
    slug = device_slug(torch.cuda.get_device_properties(device).name)
    for folder in tile_folders():
        if (folder / f"{slug}.json").is_file():
            return f"{slug}.json: " + json.loads((folder / f"{slug}.json").read_text())["source"]
    return f"no {slug}.json: the heuristic"


def choose(device: torch.device, hidden_size: int, feature_size: int, dtype: torch.dtype) -> Choice:
    """Path and tiles for hidden states of ``dtype`` and width D against teacher features of width E."""
    if _forced is not None:
        return _forced
    if INTERPRETED or device.type != "cuda":
        return _INTERPRETED
    index = torch.cuda.current_device() if device.index is None else device.index
    return _device_choice(index, hidden_size, feature_size, dtype)
