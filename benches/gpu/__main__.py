"""The GPU suite: ``make bench-gpu``.

First the correctness gate; while it is red no time is taken. Then every shape of benches/shapes.py: the Triton
backend against fp32 eager and torch.compile in bf16, beside the floors, in a CUDA graph. Writes
benches/results/gpu-DEVICE.json and .png.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benches.gpu.bottleneck import parts_of
from benches.gpu.gate import GateError, check
from benches.gpu.measure import Step, copy_rate, extra_memory, graphed, kernel_times, machine, matrix_rate, timed
from benches.gpu.plot import plot
from benches.gpu.workload import Workload
from benches.shapes import RESAMPLED, SAME_GRID, Shape

# docs/kernels.md's prediction for an H200, ms of forward + backward.
PREDICTED_H200 = {"wan-14b-480p": 2.466, "wan-1.3b-480p": 0.876, "ltx-2b": 0.247}
RESULTS = Path(__file__).parents[1] / "results"


def measured(step: Step) -> dict[str, Any]:
    """Times in a CUDA graph and without one, and memory; a call that cannot be captured has the reason instead."""
    row: dict[str, Any] = {"extra_bytes": extra_memory(step)}
    try:
        times, row["in_graph"] = timed(graphed(step)), True
    except RuntimeError as error:
        torch.cuda.synchronize()
        times, row["in_graph"] = timed(step), False
        row["not_captured"] = str(error).splitlines()[0]
    return row | {f"{name}_ms": value for name, value in asdict(times).items()}


def run_shape(shape: Shape, rates: tuple[float, float], peers: bool) -> dict[str, Any]:
    from crepa_kernels.triton.launch import recorded

    work = Workload(shape)
    floor = work.floor(*rates)
    calls: dict[str, dict[str, Any]] = {"triton": measured(work.triton())}
    calls["triton recompute"] = measured(work.triton(recompute=True))
    calls["triton, 8 cumulative offsets"] = measured(work.triton(cumulative=True, distance=8))
    kernels = kernel_times(work.triton())
    with recorded() as launches:
        work.triton()()
    if peers:
        calls["eager fp32"] = measured(work.eager_fp32())
        torch.cuda.empty_cache()
        calls["compiled bf16"] = measured(work.compiled())
    ours = calls["triton"]["median_ms"]
    row = {
        "shape": shape.id,
        "calls": calls,
        "operations": floor.operations,
        "bytes": floor.moved,
        "honest_floor_ms": floor.honest_ms,
        "physical_floor_ms": floor.physical_ms,
        "floor_formula": floor.formula,
        "fraction_of_honest_floor": floor.honest_ms / ours,
        "fraction_of_physical_floor": floor.physical_ms / ours,
        "times_faster": {name: calls[name]["median_ms"] / ours for name in calls if name != "triton"},
        "kernel_ms": kernels,
        "bottlenecks": [str(part) for part in parts_of(launches, kernels, ours, *rates)],
    }
    if "H200" in torch.cuda.get_device_name() and shape.name in PREDICTED_H200 and shape in SAME_GRID:
        row["predicted_ms"] = PREDICTED_H200[shape.name]
    return row


def report(row: dict[str, Any]) -> str:
    calls = row["calls"]
    peers = ", ".join(f"{name} {value:.2f}x" for name, value in row["times_faster"].items())
    return (
        f"{row['shape']}: {calls['triton']['median_ms']:.3f} ms, {row['fraction_of_honest_floor']:.0%} of the honest "
        f"floor, {row['fraction_of_physical_floor']:.0%} of the physical; time over ours: {peers}; "
        f"bottleneck {row['bottlenecks'][0]}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.gpu", description=__doc__)
    parser.add_argument("--gate", action="store_true", help="stop after the correctness gate")
    parser.add_argument("--seconds", type=float, default=540, help="leave out baselines, then shapes, after so long")
    parsed = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench-gpu: no CUDA or ROCm GPU was found, so nothing can be launched or measured", file=sys.stderr)
        return 1
    begun = time.monotonic()
    try:
        for line in check():
            print("correct:", line, flush=True)
    except GateError as error:
        print(f"the gate is red, no speed is reported: {error}", file=sys.stderr)
        return 1
    if parsed.gate:
        return 0
    rates = copy_rate(), matrix_rate()
    results: dict[str, Any] = {"machine": machine(), "copy_rate": rates[0], "matrix_rate": rates[1], "rows": []}
    print(f"{results['machine']}, copy {rates[0] / 1e12:.2f} TB/s, products {rates[1] / 1e12:.0f} TFLOP/s", flush=True)
    shapes, left_out = SAME_GRID + RESAMPLED, []
    for shape in shapes:
        spent = time.monotonic() - begun
        if spent > parsed.seconds:
            left_out.append(shape.id)
            continue
        row = run_shape(shape, rates, peers=spent < 0.8 * parsed.seconds)
        results["rows"].append(row)
        print(report(row), flush=True)
    if left_out:
        print(f"not measured within {parsed.seconds:.0f} s: {', '.join(left_out)}", file=sys.stderr)
    results["not_measured"] = left_out
    from crepa_kernels.triton.tiles import device_slug

    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"gpu-{device_slug(results['machine']['device'])}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    plot(results, path.with_suffix(".png"))
    print(f"wrote {path} and its roofline")
    return 0


if __name__ == "__main__":
    sys.exit(main())
