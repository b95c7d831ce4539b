"""Forward + backward where the student's grid grows: p resampled, against the tokens resampled before the projection.

    python -m benches.bench_growing [--device cuda] [--out benches/results/growing-cpu.json]

Linear commutes with the resampling, so that both orders are the same loss; the second is what smaller grids take, and
what grids that grow took before. The calls are timed in turns in one run. The shapes are those of SDXL's middle block
at 512 x 512 (16 x 16 tokens of 1280 channels; 32 x 32 at 1024 x 1024) beside DINOv2's patches, as U-REPA has them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch

from benches.gpu.results import write_whole
from benches.measure import interleaved_medians, keep_heap_warm, kept_bytes, machine, peak_bytes
from benches.shapes import GROWING, Shape
from crepa_kernels import relational_loss

AT_LEAST = 2.5  # times faster than the other order, of crepa_loss


def measure(shape: Shape, device: str, rounds: int) -> dict[str, object]:
    h, y, projector = inputs = shape.inputs(shape.cpu_frames, device)
    backend = "auto" if device == "cuda" else "torch"
    grids = {"student_grid": shape.student_grid, "teacher_grid": shape.teacher_grid}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    losses: dict[str, Callable[[], torch.Tensor]] = {
        "crepa": lambda: shape.loss(*inputs, backend),
        "relational": lambda: relational_loss(*inputs, **grids, pairs="frame", spatial_align=shape.spatial_align),
    }

    def step(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            loss().backward()
            h.grad = None
            projector.zero_grad()
            wait()

        return run

    def tokens_first(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with (
                mock.patch("crepa_kernels.grid.should_project_first", return_value=False),
                mock.patch("crepa_kernels.backends.triton.call.should_project_first", return_value=False),
            ):
                return call()

        return run

    calls = {name: step(loss) for name, loss in losses.items()}
    calls |= {f"{name}, tokens first": tokens_first(call) for name, call in calls.items()}
    seconds = interleaved_medians(calls, rounds)
    row: dict[str, object] = {"shape": shape.id, "frames": shape.cpu_frames}
    row["median_ms"] = {name: 1e3 * value for name, value in seconds.items()}
    row["times_faster"] = {name: seconds[f"{name}, tokens first"] / seconds[name] for name in losses}
    if device == "cpu":
        leaves = [h, y, *projector.parameters()]
        row["peak_bytes"] = {name: peak_bytes(call) for name, call in calls.items()}
        row["kept_bytes"] = {
            name: kept_bytes(forward, leaves)
            for name, forward in (
                *losses.items(),
                *((f"{name}, tokens first", tokens_first(loss)) for name, loss in losses.items()),
            )
        }
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="p resampled, against the tokens resampled before the projection")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--case", default="", help="only shapes whose name contains this")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options = parser.parse_args(arguments)
    keep_heap_warm()
    found = machine(options.device)
    rows: list[dict[str, object]] = []
    missed: list[str] = []
    for shape in (shape for shape in GROWING if options.case in shape.id):
        row = measure(shape, options.device, options.rounds)
        rows.append(row)
        faster = row["times_faster"]
        assert isinstance(faster, dict)
        print(f"{shape.id}: " + ", ".join(f"{name} x{value:.2f}" for name, value in faster.items()), flush=True)
        if options.device == "cpu" and faster["crepa"] < AT_LEAST:
            missed.append(f"{shape.id}: x{faster['crepa']:.2f}, at least x{AT_LEAST} is wanted")
        if options.out:
            write_whole(options.out, json.dumps({**found, "cases": rows}, indent=1) + "\n")
    if missed:
        parser.exit(1, "\n".join(missed) + "\n")


if __name__ == "__main__":
    main()
