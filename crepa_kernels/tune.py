"""Measures path and tile choices on this GPU and writes them where ``crepa_loss`` looks them up.

    python -m crepa_kernels.tune [--shapes wan-14b-480p ...] [--folder DIR]

For each shape class forward + backward is timed with one tile field changed at a time; the fastest stays. Without
``--folder`` the file goes to the package's own folder of choices; ``CREPA_TILES=DIR`` has other folders looked up.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .loss import crepa_loss
from .projector import CrepaProjector
from .shape_classes import SHAPE_CLASSES, ShapeClass
from .triton_backend import why_not_triton_for

if TYPE_CHECKING:
    from .triton.tiles import Choice

Step = Callable[[], object]


def candidates(choice: Choice, shape: ShapeClass, shared_memory: int, hip: bool) -> dict[str, list[Choice]]:
    """Choices to compare, by what they change, in the order to fix them in."""
    from .triton.tiles import ProductTile, RowTile

    products = [
        ProductTile(m, n, k, warps, stages)
        for m, n, k, warps in (
            (128, 256, 64, 8), (128, 128, 64, 8), (128, 128, 64, 4), (256, 128, 64, 8),
            (128, 256, 32, 8), (128, 128, 32, 8), (128, 128, 32, 4),
        )
        for stages in ((2,) if hip else (3, 4))
    ]  # fmt: skip
    fitting = [tile for tile in products if tile.shared_memory(2) <= shared_memory]
    one_pass = [replace(tile, split=True) for tile in fitting if tile.m == 128 and tile.n == 128]
    lanes = 64 if hip else 32
    rows = [RowTile(1, warps, programs, lanes) for warps in (1, 2, 4, 8) for programs in (2, 4, 6, 12)]
    tokens = [RowTile(1, warps, lanes=lanes) for warps in (2, 4, 8)]
    return {
        "tokens": [replace(choice, tokens=tile) for tile in tokens],
        "rows": [replace(choice, rows=tile) for tile in rows],
        "dx": [replace(choice, dx=tile) for tile in fitting],
        "one_pass": [replace(choice, one_pass=tile) for tile in one_pass],
        "training": [replace(choice, training="split"), replace(choice, training="one_pass")],
        "inference": [replace(choice, inference="split"), replace(choice, inference="one_pass")],
    }


def milliseconds(step: Step, repeats: int) -> float:
    """Median time of ``step`` on the GPU, after warming up."""
    for _ in range(3):
        step()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def steps_of(shape: ShapeClass, dtype: torch.dtype) -> tuple[Step, Step]:
    """Forward + backward, and forward without gradients, of one shape."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(width: int) -> torch.Tensor:
        size = (1, shape.frames, shape.tokens, width)
        return torch.randn(size, generator=generator, device="cuda", dtype=dtype)

    h, y = normal(shape.hidden_size).requires_grad_(), normal(shape.feature_size)
    projector = CrepaProjector(shape.hidden_size, shape.feature_size).cuda()
    grid = (1, shape.tokens)

    def loss() -> torch.Tensor:
        return crepa_loss(h, y, projector, student_grid=grid, teacher_grid=grid, backend="triton").loss

    def train() -> None:
        h.grad = None
        projector.zero_grad()
        loss().backward()

    return train, torch.no_grad()(loss)


def tune(shape: ShapeClass, dtype: torch.dtype, choice: Choice, shared_memory: int, hip: bool) -> dict[str, Any]:
    """The fastest choice found for one shape, as an entry of a device's file."""
    from .triton.tiles import forced

    train, infer = steps_of(shape, dtype)
    best: dict[str, float] = {}
    for changed in candidates(choice, shape, shared_memory, hip):
        timed: list[tuple[float, Choice]] = []
        step = infer if changed in ("inference", "one_pass") else train
        options = candidates(choice, shape, shared_memory, hip)[changed]
        for option in options:
            trial = replace(option, inference="one_pass") if changed == "one_pass" else option
            with forced(trial):
                timed.append((milliseconds(step, 20), option))
        best[changed], choice = min(timed, key=lambda pair: pair[0])
        print(f"{shape.name}: {changed} {getattr(choice, changed)} {best[changed]:.3f} ms", flush=True)
    return {
        "shape": shape.name,
        "hidden_size": shape.hidden_size,
        "feature_size": shape.feature_size,
        "dtype": str(dtype).removeprefix("torch."),
        "training_ms": best["training"],
        "inference_ms": best["inference"],
        "choice": choice.to_dict(),
    }


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m crepa_kernels.tune", description=__doc__)
    names = [shape.name for shape in SHAPE_CLASSES]
    parser.add_argument("--shapes", nargs="*", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--folder", type=Path, help="where to write; the package's own folder of choices if not given")
    parsed = parser.parse_args(None if arguments is None else list(arguments))
    if (reason := why_not_triton_for("cuda", torch.bfloat16)) or not torch.cuda.is_available():
        print(f"nothing to tune: {reason or 'no CUDA or ROCm GPU was found'}", file=sys.stderr)
        return 1
    import triton

    from .triton.tiles import device_shared_memory, device_slug, heuristic, tile_folders, write_entries

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    shared, hip = device_shared_memory(properties), torch.version.hip is not None
    entries = []
    for shape in SHAPE_CLASSES:
        if shape.name in parsed.shapes:
            start = heuristic(shape.hidden_size, shape.feature_size, 2, shared, hip)
            entries.append(tune(shape, torch.bfloat16, start, shared, hip))
    folder = parsed.folder or tile_folders()[-1]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{device_slug(properties.name)}.json"
    source = f"measured with torch {torch.__version__}, triton {triton.__version__}"
    write_entries(path, properties.name, source, entries)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
