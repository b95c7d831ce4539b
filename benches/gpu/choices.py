"""Candidate tiles and paths side by side: what each alternative of ``crepa_kernels.tune`` would change.

    python -m benches.gpu.choices [--shapes wan-14b-480p ...] [--out build/gpu]

For each main shape every candidate of every field is timed beside the choice in use, with nothing else changed: in a
CUDA graph, on cold caches, in turns. Writes OUT/choices-DEVICE.json after every field. ``crepa_kernels.tune`` takes the
fastest of them, one field after the other.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from benches.gpu.__main__ import AGAIN, ENDED, device, parsed_with_common
from benches.gpu.measure import Gpu, machine
from benches.gpu.results import read_back, result_path, write
from crepa_kernels.backends.triton.clock import Times, first_line
from crepa_kernels.shapes import SHAPE_CLASSES, ShapeClass
from crepa_kernels.tune import candidates, compare, steps_of

if TYPE_CHECKING:
    from crepa_kernels.backends.triton.tiles import Choice

ALL = "all of them"
MAIN = ("wan-14b-480p", "wan-1.3b-480p", "ltx-2b")


def difference(choice: Choice, used: Choice) -> str:
    """What ``choice`` has that ``used`` has not, as ``dx.n=128 dx.warps=4``; "in use" where nothing differs."""
    ours, theirs = _flat(choice.to_dict()), _flat(used.to_dict())
    return " ".join(f"{key}={value}" for key, value in ours.items() if value != theirs.get(key)) or "in use"


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in fields.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def alternatives(used: Choice, options: Sequence[Choice]) -> dict[str, Choice]:
    """By ``difference``, the choice in use first."""
    return {"in use": used} | {difference(option, used): option for option in options}


def measure(shape: ShapeClass, changed: str, used: Choice, options: Sequence[Choice], gpu: Gpu) -> list[dict[str, Any]]:
    """A row for each alternative of one field, the fastest first and those that do not run last."""
    train, infer = steps_of(shape, torch.bfloat16, gpu.device)
    one_pass = changed == "one_pass"
    # The one-pass kernel is timed where it runs.
    base = replace(used, inference="one_pass") if one_pass else used
    named = alternatives(base, [replace(option, inference="one_pass") for option in options] if one_pass else options)
    forward = changed in ("inference", "one_pass")
    times = compare(infer if forward else train, list(named.values()), gpu)
    rows = []
    for (alternative, choice), found in zip(named.items(), times, strict=True):
        row = {"shape": shape.name, "changed": changed, "alternative": alternative, "choice": choice.to_dict()}
        row |= {"step": "forward without gradients" if forward else "forward + backward"}
        if isinstance(found, Times):
            rows.append(row | {f"{name}_ms": value for name, value in asdict(found).items()})
        else:
            rows.append(row | {"refused": found})
    return sorted(rows, key=lambda row: row.get("median_ms", float("inf")))


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        where = f"{row['shape']:14s} {row['changed']:10s} {row['alternative']:44s}"
        if "refused" in row:
            lines.append(f"{where} {row['refused']}")
        else:
            lines.append(f"{where} {row['median_ms']:8.3f} ms ({row['p20_ms']:.3f} to {row['p80_ms']:.3f})")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.gpu.choices", description=__doc__)
    names = [shape.name for shape in SHAPE_CLASSES]
    parser.add_argument("--shapes", nargs="+", default=MAIN, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--fields", nargs="+", metavar="NAME", help="only these fields of a choice")
    parsed = parsed_with_common(parser, arguments, seconds=400)
    begun = time.monotonic()
    if (gpu := device(parsed.dry)) is None:
        return 1
    from crepa_kernels.backends.triton.tiles import choose, device_slug, heuristic

    head = machine(gpu)
    path = result_path(parsed.out, "choices", device_slug(head["device"]), gpu.dry)
    _, shared_memory, hip = gpu.tile_facts()
    results = read_back(path, head) or {"machine": head, "dry": gpu.dry, "rows": []}
    if not parsed.again:
        results["rows"] = [row for row in results["rows"] if row["alternative"] != ALL]
    left_out = []
    for shape in (gpu.shape_class(shape) for shape in SHAPE_CLASSES if shape.name in parsed.shapes):
        widths = shape.hidden_size, shape.feature_size
        cuda = torch.device("cuda")
        used = heuristic(*widths, 2, shared_memory) if gpu.dry else choose(cuda, *widths, torch.bfloat16)
        for changed, options in candidates(used, shape, shared_memory, hip).items():
            if parsed.fields and changed not in parsed.fields:
                continue
            if any((row["shape"], row["changed"]) == (shape.name, changed) for row in results["rows"]):
                continue
            if time.monotonic() - begun > parsed.seconds:
                left_out.append(f"{shape.name}: {changed}")
                continue
            failed = {"shape": shape.name, "changed": changed, "alternative": ALL, "refused": ENDED}
            results["rows"].append(failed)
            write(path, results)
            try:
                rows = measure(shape, changed, used, options, gpu)
            except Exception as error:
                traceback.print_exc()
                failed["refused"] = first_line(error)
                write(path, results)
                return AGAIN
            results["rows"][-1:] = rows
            write(path, results)
            print(table(rows), flush=True)
            gc.collect()
            gpu.free()
    if left_out:
        print(f"not measured within {parsed.seconds:.0f} s: {', '.join(left_out)}", file=sys.stderr)
    print(f"{'dry, nothing measured:' if gpu.dry else 'wrote'} {path}")
    # Without a GPU there is no card to refuse a tile: what does not run is a mistake.
    mistakes = [row for row in results["rows"] if "refused" in row and (gpu.dry or row["alternative"] == ALL)]
    print(table(mistakes), end="", file=sys.stderr)
    return 1 if left_out or mistakes else 0


if __name__ == "__main__":
    sys.exit(main())
