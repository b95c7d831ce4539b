"""The correctness gate, and the table of times beside their floors: part of ``make bench-gpu``.

While the gate is red no time is taken. Then every shape of ``benches.shapes.ON_A_GPU``, in its order: the Triton
backend against fp32 eager and torch.compile in bf16, in a CUDA graph. OUT/gpu-DEVICE.json is written after every call,
and what it already holds of these sources on this machine is not measured again. Exit status 75 asks to be started
again in a new process, which ``benches.gpu.hour`` does: a call that fails may leave the device in any state.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benches.gpu.bottleneck import parts_of
from benches.gpu.gate import CASES, TYPES, WIDTHS, GateError, check
from benches.gpu.measure import Dry, Gpu, machine
from benches.gpu.predicted import prediction
from benches.gpu.results import MEASURED, read_back, result_path, write
from benches.gpu.workload import Workload
from benches.shapes import ON_A_GPU, SAME_GRID, Shape
from crepa_kernels.backends.triton.clock import CaptureError, Step, first_line

AGAIN = 75  # exit status
ENDED = "the process ended while it was measured"
CALLS: dict[str, Callable[[Workload], Step]] = {
    "triton": lambda work: work.triton(),
    "triton recompute": lambda work: work.triton(recompute=True),
    "triton, 8 cumulative offsets": lambda work: work.triton(cumulative=True, distance=8),
    "compiled bf16": lambda work: work.compiled(),
    "eager fp32": lambda work: work.eager_fp32(),
}
# In this order within a shape, so that a time limit leaves out the peers.
TASKS = ("floor", "triton", "kernels", *(name for name in CALLS if name != "triton"))


class StartAgain(Exception):
    """The device is in an unknown state; what is left wants a new process."""


class Table:
    """Measures what its results lack, and writes them after every call.

    Args:
        gpu: what measures.
        results: of earlier processes; each row holds ``floor``, ``kernels`` and ``calls``, each entry with ``done``,
            or ``failed`` and why.
        path: of the result file.
        deadline: of ``time.monotonic()``, after which nothing more is begun.
    """

    def __init__(self, gpu: Gpu, results: dict[str, Any], path: Path, deadline: float):
        self.gpu, self.results, self.path, self.deadline = gpu, results, path, deadline
        self.rows: dict[str, dict[str, Any]] = {row["shape"]: row for row in results["rows"]}
        self._longest: dict[str, float] = {}

    def save(self) -> None:
        write(self.path, self.results)

    def run(self, shapes: Sequence[Shape]) -> None:
        """Raises StartAgain after a call that may have left the device in any state."""
        if "copy_rate" not in self.results:
            self.results |= {"copy_rate": self.gpu.copy_rate(), "matrix_rate": self.gpu.matrix_rate()}
            self.save()
        for shape in shapes:
            if any(self._in_time(task) for task in self.open(shape)):
                self._shape(shape)
                print(report(self.rows[shape.id]), flush=True)

    def open(self, shape: Shape) -> list[str]:
        """The tasks of ``shape`` that are neither done nor failed."""
        row = self.rows.get(shape.id)
        if row is None:
            return list(TASKS)
        entries = {**row, **row["calls"]}
        return [task for task in TASKS if not entries.get(task, {}).keys() & {"done", "failed"}]

    def _in_time(self, task: str) -> bool:
        """By the longest that it took so far."""
        return self.deadline - time.monotonic() >= self._longest.get(task, 0.0)

    def _shape(self, shape: Shape) -> None:
        if shape.id not in self.rows:
            self.rows[shape.id] = {"shape": shape.id, "calls": {}}
            self.results["rows"].append(self.rows[shape.id])
        row = self.rows[shape.id]
        work: Workload | None = None
        for task in self.open(shape):
            if not self._in_time(task):
                continue
            entry: dict[str, Any] = (row["calls"] if task in CALLS else row).setdefault(task, {})
            begun = time.monotonic()
            entry["failed"] = ENDED
            self.save()
            try:
                work = work or Workload(shape, self.gpu)
                self._task(work, task, entry, row)
                entry["done"] = True
                del entry["failed"]
            except torch.OutOfMemoryError as error:
                entry["failed"] = f"out of memory: {first_line(error)}"
            except CaptureError as error:
                # Timed without a graph, by the next process.
                del entry["failed"]
                entry["not_captured"] = str(error)
                self.save()
                raise StartAgain(f"{shape.id}, {task}: not captured, {error}") from error
            except Exception as error:
                traceback.print_exc()
                entry["failed"] = first_line(error)
                self.save()
                raise StartAgain(f"{shape.id}, {task}: {first_line(error)}") from error
            self._longest[task] = max(self._longest.get(task, 0.0), time.monotonic() - begun)
            gc.collect()
            self.gpu.free()
            row |= summary(row, shape, self.results)
            self.save()

    def _task(self, work: Workload, task: str, entry: dict[str, Any], row: dict[str, Any]) -> None:
        rates = self.results["copy_rate"], self.results["matrix_rate"]
        if task == "floor":
            entry |= asdict(work.floor(*rates))
        elif task == "kernels":
            entry |= self._kernels(work, row, rates)
        else:
            step = CALLS[task](work)
            entry["extra_bytes"] = self.gpu.extra_memory(step)
            entry["in_graph"] = "not_captured" not in entry
            times = self.gpu.timed(self.gpu.graphed(step) if entry["in_graph"] else step)
            entry |= {f"{name}_ms": value for name, value in asdict(times).items()}

    def _kernels(self, work: Workload, row: dict[str, Any], rates: tuple[float, float]) -> dict[str, Any]:
        from crepa_kernels.backends.triton.launch import recorded

        kernels = self.gpu.kernel_times(work.triton())
        with recorded() as launches:
            work.triton()()
        step_ms = row["calls"].get("triton", {}).get("median_ms", 0.0)
        return {"ms": kernels, "bottlenecks": [str(part) for part in parts_of(launches, kernels, step_ms, *rates)]}


def summary(row: dict[str, Any], shape: Shape, results: dict[str, Any]) -> dict[str, Any]:
    """Ratios of a row, of what is measured."""
    calls = {name: call["median_ms"] for name, call in row["calls"].items() if "median_ms" in call}
    ours, floor = calls.pop("triton", None), row.get("floor", {})
    if ours is None:
        return {}
    found: dict[str, Any] = {"times_faster": {name: value / ours for name, value in calls.items()}}
    if "honest_ms" in floor:
        found |= {
            "fraction_of_honest_floor": floor["honest_ms"] / ours,
            "fraction_of_honest_floor_with_weights": (floor["honest_ms"] + floor["weights_ms"]) / ours,
            "fraction_of_physical_floor": floor["physical_ms"] / ours,
        }
    if any(shape.name == each.name and shape.student_grid == each.teacher_grid for each in SAME_GRID):
        predicted = prediction(results["machine"]["device"], shape.name)
        found |= {} if predicted is None else {"predicted": str(predicted)}
    return found


def report(row: dict[str, Any]) -> str:
    """One row in a line or two."""
    failed = [
        f"{name}: {entry['failed']}"
        for name, entry in {"floor": row.get("floor", {}), "kernels": row.get("kernels", {}), **row["calls"]}.items()
        if "failed" in entry
    ]
    ours = row["calls"].get("triton", {})
    words = [f"{ours['median_ms']:.3f} ms"] if "median_ms" in ours else []
    if "fraction_of_honest_floor" in row:
        words.append(
            f"{row['fraction_of_honest_floor']:.0%} of the honest floor "
            f"({row['fraction_of_honest_floor_with_weights']:.0%} of it with the (E, D) passes), "
            f"{row['fraction_of_physical_floor']:.0%} of the physical"
        )
    if row.get("times_faster"):
        peers = ", ".join(f"{name} {value:.2f}x" for name, value in row["times_faster"].items())
        words.append(f"time over ours: {peers}")
    words += [f"bottleneck {part}" for part in row.get("kernels", {}).get("bottlenecks", [])[:1]]
    words += [f"predicted {row['predicted']} of the floor"] if "predicted" in row else []
    return f"{row['shape']}: " + "; ".join(words + failed)


def device(dry: bool) -> Gpu | None:
    """What to measure on; None, with one line said, without a GPU."""
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"
        return Dry()
    if not torch.cuda.is_available():
        print("no CUDA or ROCm GPU was found, so nothing can be launched or measured", file=sys.stderr)
        return None
    return Gpu()


def pair(text: str) -> tuple[int, int]:
    width, _, features = text.partition("x")
    return int(width), int(features)


def arguments_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benches.gpu", description=__doc__)
    parser.add_argument("--gate", action="store_true", help="stop after the correctness gate")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="of the gate; with --gate")
    parser.add_argument("--widths", nargs="+", type=pair, metavar="DxE", help="of the gate; with --gate")
    parser.add_argument("--types", nargs="+", choices=list(TYPES), help="of the gate; with --gate")
    parser.add_argument("--shapes", nargs="+", metavar="PART", help="of the table: those whose name contains a PART")
    parsed = parsed_with_common(parser, arguments, seconds=540)
    if not parsed.gate and (parsed.cases or parsed.widths or parsed.types):
        parser.error("--cases, --widths and --types choose a part of the gate: no speed is reported after a part")
    return parsed


def parsed_with_common(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, seconds: float
) -> argparse.Namespace:
    """With the options of every command that measures; a dry run's results among the measured ones are refused."""
    parser.add_argument("--seconds", type=float, default=seconds, help="begin nothing more after so long")
    parser.add_argument("--out", type=Path, default=MEASURED, help="folder of the results")
    parser.add_argument("--again", action="store_true", help="after exit status 75: leave out what failed")
    parser.add_argument("--dry", action="store_true", help="without a GPU: tiny shapes, nothing launched or measured")
    parsed = parser.parse_args(arguments)
    try:
        result_path(parsed.out, "gpu", "", parsed.dry)
    except ValueError as error:
        parser.error(str(error))
    return parsed


def gate(gpu: Gpu, parsed: argparse.Namespace, head: dict[str, Any]) -> bool:
    """Whether all is right; what the whole gate found of these sources on this machine is kept."""
    from crepa_kernels.backends.triton.tiles import device_slug

    path = result_path(parsed.out, "gate", device_slug(head["device"]), gpu.dry)
    part = bool(parsed.cases or parsed.widths or parsed.types)
    if not parsed.gate and read_back(path, head):
        print(f"correct: see {path}", flush=True)
        return True
    widths = [(32, 16)] if gpu.dry else parsed.widths or WIDTHS
    passed = []
    try:
        for line in check(gpu, parsed.cases or tuple(CASES), widths, parsed.types or tuple(TYPES)):
            passed.append(line)
            print("dry:" if gpu.dry else "correct:", line, flush=True)
    except GateError as error:
        print(f"the gate is red, no speed is reported: {error}", file=sys.stderr)
        return False
    if not part:
        write(path, {"machine": head, "dry": gpu.dry, "passed": passed})
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = arguments_of(arguments)
    begun = time.monotonic()
    if (gpu := device(parsed.dry)) is None:
        return 1
    head = machine(gpu)
    from crepa_kernels.backends.triton.tiles import device_slug

    path = result_path(parsed.out, "gpu", device_slug(head["device"]), gpu.dry)
    if not gate(gpu, parsed, head):
        return 1
    if parsed.gate:
        return 0
    shapes = [gpu.shape(shape) for shape in ON_A_GPU if any(part in shape.id for part in parsed.shapes or [""])]
    results = read_back(path, head) or {"machine": head, "dry": gpu.dry, "rows": []}
    if not parsed.again:
        forget_failures(results)
    table = Table(gpu, results, path, begun + parsed.seconds)
    try:
        table.run(shapes)
    except StartAgain as error:
        print(f"start again: {error}", file=sys.stderr)
        return AGAIN
    if missing := [f"{shape.id}: {task}" for shape in shapes for task in table.open(shape)]:
        print(f"not measured within {parsed.seconds:.0f} s: {', '.join(missing)}", file=sys.stderr)
    print(f"{'dry, nothing measured:' if gpu.dry else 'wrote'} {path}")
    if not gpu.dry:
        draw(results, path.with_suffix(".png"))
    return 0 if not missing and not any("failed" in entry for entry in entries(results)) else 1


def entries(results: dict[str, Any]) -> list[dict[str, Any]]:
    """All of the rows, each task's."""
    found = []
    for row in results["rows"]:
        found += [row[name] for name in ("floor", "kernels") if name in row] + list(row["calls"].values())
    return found


def forget_failures(results: dict[str, Any]) -> None:
    for entry in entries(results):
        if "failed" in entry:
            entry.clear()


def draw(results: dict[str, Any], path: Path) -> None:
    from benches.gpu.plot import plot

    try:
        plot(results, path)
    except ImportError as error:
        print(f"no roofline is drawn: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
