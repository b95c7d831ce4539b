"""Measures path and tile choices on this GPU and writes them where ``crepa_loss`` looks them up.

    python -m crepa_kernels.tune [--shapes wan-14b-480p ...] [--folder DIR]

For each shape class forward + backward is timed with one tile field changed at a time, in a CUDA graph and on cold
caches; the fastest stays. Without ``--folder`` the file goes to the package's own folder of choices;
``CREPA_TILES=DIR`` has other folders looked up.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .backends.triton.availability import why_not_triton_for
from .backends.triton.clock import CaptureError, Clock, Step, Times, first_line
from .loss import crepa_loss
from .projector import CrepaProjector
from .shapes import SHAPE_CLASSES, ShapeClass

if TYPE_CHECKING:
    from .backends.triton.tiles import Choice


def candidates(choice: Choice, shape: ShapeClass, shared_memory: int, hip: bool) -> dict[str, list[Choice]]:
    """Choices to compare, by what they change, in the order to fix them in."""
    from .backends.triton.tiles import VENDOR, ProductTile, RowTile

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
        "dx": [*(replace(choice, dx=tile) for tile in fitting), replace(choice, dx=VENDOR)],
        "one_pass": [replace(choice, one_pass=tile) for tile in one_pass],
        "training": [replace(choice, training="split"), replace(choice, training="one_pass")],
        "inference": [replace(choice, inference="split"), replace(choice, inference="one_pass")],
    }


def compare(step: Step, choices: Sequence[Choice], clock: Clock) -> list[Times | str]:
    """Times of ``step`` with each choice, in turns; in place of those of a choice that does not run, the reason."""
    captured = {str(index): _captured(step, choice, clock) for index, choice in enumerate(choices)}
    times = clock.interleaved({index: replay for index, replay in captured.items() if not isinstance(replay, str)})
    return [replay if isinstance(replay, str) else times[index] for index, replay in captured.items()]


def _captured(step: Step, choice: Choice, clock: Clock) -> Step | str:
    from .backends.triton.tiles import forced

    try:
        with forced(choice):
            return clock.graphed(step)
    except CaptureError:
        raise
    except Exception as error:  # a tile that the compiler or the card refuses is no candidate
        clock.wait()  # raises where the card is lost, not the tile
        return first_line(error)


def steps_of(shape: ShapeClass, dtype: torch.dtype, device: str = "cuda") -> tuple[Step, Step]:
    """Forward + backward, and forward without gradients, of one shape; what they return may be dropped."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(width: int) -> torch.Tensor:
        size = (1, shape.frames, shape.tokens, width)
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    h, y = normal(shape.hidden_size).requires_grad_(), normal(shape.feature_size)
    projector = CrepaProjector(shape.hidden_size, shape.feature_size).to(device)
    grid = (1, shape.tokens)

    def loss() -> torch.Tensor:
        return crepa_loss(h, y, projector, student_grid=grid, teacher_grid=grid, backend="triton").loss

    return lambda: torch.autograd.grad(loss(), [h, *projector.parameters()]), torch.no_grad()(loss)


def tune(
    shape: ShapeClass, dtype: torch.dtype, choice: Choice, shared_memory: int, hip: bool, clock: Clock
) -> dict[str, Any]:
    """The fastest choice found for one shape, as an entry of a device's file; RuntimeError if none of a kind runs."""
    train, infer = steps_of(shape, dtype, clock.device)
    best: dict[str, float] = {}
    for changed in candidates(choice, shape, shared_memory, hip):
        options = candidates(choice, shape, shared_memory, hip)[changed]
        # The one-pass kernel is timed where it runs.
        one_pass = changed == "one_pass"
        trials = [replace(option, inference="one_pass") for option in options] if one_pass else options
        times = compare(infer if changed in ("inference", "one_pass") else train, trials, clock)
        medians = {index: time.median for index, time in enumerate(times) if isinstance(time, Times)}
        for option, time in zip(options, times, strict=True):
            if isinstance(time, str):
                print(f"{shape.name}: {changed} {getattr(option, changed)} is left out: {time}", file=sys.stderr)
        if not medians:
            raise RuntimeError(f"{shape.name}: no choice of {changed} runs")
        fastest = min(medians, key=medians.__getitem__)
        best[changed], choice = medians[fastest], options[fastest]
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

    from .backends.triton.tiles import device_heuristic, device_shared_memory, device_slug, tile_folders, write_entries

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    shared, hip = device_shared_memory(properties), torch.version.hip is not None
    entries = []
    for shape in SHAPE_CLASSES:
        if shape.name in parsed.shapes:
            start = device_heuristic(properties, shape.hidden_size, shape.feature_size, 2)
            entries.append(tune(shape, torch.bfloat16, start, shared, hip, Clock()))
    folder = parsed.folder or tile_folders()[-1]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{device_slug(properties.name)}.json"
    source = f"measured with torch {torch.__version__}, triton {triton.__version__}"
    write_entries(path, properties.name, source, entries)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
