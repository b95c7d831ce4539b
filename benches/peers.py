"""The loss and what people use in its place, on the same inputs in one run.

    python -m benches.peers [--device cuda] [--out benches/results/peers-cpu.json]

Eager PyTorch as training scripts have it, torch.compile of that, SimpleTuner's published regularizer with its own loss
and with ours, and every backend that runs here: forward + backward in turns, memory, how often the host waits for the
device's numbers, and how far apart in the frame the tokens are that are compared. SimpleTuner's wheel is downloaded;
where it cannot be had, it is left out and the reason printed.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benches.eager import eager_transposed
from benches.gpu.results import write_whole
from benches.measure import (
    Call,
    host_waits,
    interleaved_medians,
    keep_heap_warm,
    kept_bytes,
    machine,
    peak_bytes,
    waiting,
)
from benches.shapes import TARGETS
from benches.simpletuner import VERSION, give_features, module, regularizer, wheel
from crepa_kernels import available_backends
from crepa_kernels.grid import Grid, plan_alignment
from crepa_kernels.integrations import simpletuner

SHAPE = TARGETS[0]  # 30x52 tokens of 1536 channels against 16x16 patches of 384, fp32
APART: tuple[Grid, Grid] = ((30, 52), (37, 37))  # the grids of which the position error is said
AT_LEAST, AT_MOST_KEPT = 3.5, 0.35  # times faster than SimpleTuner, its own arithmetic; share of its kept bytes
OWN = "SimpleTuner"  # with its own loss


@dataclass(frozen=True)
class Peer:
    """One way to compute the loss: ``forward``, and how it aligns grids, as ``crepa_loss`` would be told."""

    forward: Callable[[], torch.Tensor]
    alignment: Mapping[str, Any]


@dataclass(frozen=True)
class Inputs:
    """What every peer is given."""

    h: torch.Tensor
    y: torch.Tensor
    projector: nn.Sequential

    @classmethod
    def of(cls, frames: int = SHAPE.frames, device: str = "cpu") -> Inputs:
        h, y, _ = SHAPE.inputs(frames, device)
        projector = nn.Sequential(nn.LayerNorm(SHAPE.hidden_size), nn.Linear(SHAPE.hidden_size, SHAPE.feature_size))
        return cls(h, y, projector.to(device))

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [self.h, self.y, *self.projector.parameters()]

    def step(self, forward: Callable[[], torch.Tensor]) -> Call:
        """Forward + backward; the gradients are dropped at the end, so that each call makes all that it holds."""

        def run() -> None:
            forward().backward()
            self.h.grad = None
            self.projector.zero_grad()

        return run


def _centers(grid: Sequence[int]) -> torch.Tensor:
    """(N, 2), the tokens' centers down and across, of the frame's height and width."""
    axes = [(torch.arange(size, dtype=torch.float64) + 0.5) / size for size in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)


def position_error(call: Mapping[str, Any], student_grid: Grid, teacher_grid: Grid) -> tuple[float, float]:
    """How far apart in the frame the tokens are that ``crepa_loss(**call)`` compares: mean, of its height and width.

    Args:
        call: the arguments ``student_grid``, ``teacher_grid``, ``spatial_align`` and ``antialias`` as they were given.
        student_grid: (height, width) on which the student's tokens do lie.
        teacher_grid: the teacher's.
    """
    plan = plan_alignment(*(call[name] for name in ("spatial_align", "student_grid", "teacher_grid", "antialias")))
    student, teacher = plan.align(_centers(student_grid), "student"), plan.align(_centers(teacher_grid), "teacher")
    down, across = (student - teacher).abs().mean(dim=0).tolist()
    return down, across


def our_peers(inputs: Inputs) -> dict[str, Peer]:
    """Eager PyTorch, the compiler's, and the backends that run here."""
    grids = SHAPE.student_grid, SHAPE.teacher_grid
    alignment = _between(*APART, spatial_align=SHAPE.spatial_align, antialias=SHAPE.antialias)
    given = inputs.h, inputs.y, inputs.projector
    torch.compiler.reset()
    found = {
        "eager": Peer(lambda: eager_transposed(*given, *grids), alignment),
        "torch.compile": Peer(torch.compile(lambda: eager_transposed(*given, *grids), fullgraph=True), alignment),
    }
    for backend in available_backends():
        found[backend] = Peer(partial(SHAPE.loss, *given, backend), alignment)
    return found


def simpletuner_peers(inputs: Inputs, folder: Path) -> dict[str, Peer]:
    """SimpleTuner's regularizer with its own loss, and with ours in both ways.

    Raises:
        RuntimeError: if its wheel cannot be had.
    """
    crepa = regularizer(module(wheel(folder)), inputs.projector, SHAPE.hidden_size, device=inputs.h.device)
    frames = inputs.h.shape[1]
    give_features(crepa, frames, lambda video: inputs.y)
    latents = torch.randn(1, 16, frames, *(2 * size for size in SHAPE.student_grid), device=inputs.h.device)

    def forward(spatial: str | None) -> torch.Tensor:
        simpletuner.restore()
        if spatial is not None:
            simpletuner.apply(spatial, type(crepa))  # type: ignore[arg-type]
        return crepa.compute_loss(inputs.h, latents, nn.Identity())[0]

    line = grids_of("line", *APART, folder)
    alignments = {None: line, "line": line, "grid": grids_of("grid", *APART, folder)}  # its own is the line's
    return {
        OWN if spatial is None else f"{OWN}, ours: {spatial}": Peer(partial(forward, spatial), alignment)
        for spatial, alignment in alignments.items()
    }


def _between(student: Grid, teacher: Grid, **options: Any) -> dict[str, Any]:
    return {"student_grid": student, "teacher_grid": teacher, **options}


def grids_of(spatial: str, student: Grid, teacher: Grid, folder: Path) -> dict[str, Any]:
    """What SimpleTuner's regularizer hands to ``crepa_loss`` for these grids; latents are of twice the student's."""
    theirs, seen = module(wheel(folder)), {"antialias": True}
    crepa = regularizer(theirs, nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6)), 8)
    give_features(crepa, 1, lambda video: torch.randn(1, 1, math.prod(teacher), 6))
    simpletuner.apply(spatial, type(crepa))  # type: ignore[arg-type]
    loss = simpletuner.crepa_loss

    def record(*inputs: torch.Tensor, **options: Any) -> Any:
        seen.update(options)
        return loss(*inputs, **options)

    simpletuner.crepa_loss = record  # type: ignore[assignment]
    try:
        latents = torch.randn(1, 16, 1, *(2 * size for size in student))
        crepa.compute_loss(torch.randn(1, 1, math.prod(student), 8), latents, nn.Identity())
    finally:
        simpletuner.crepa_loss = loss  # type: ignore[assignment]
        simpletuner.restore()
    return seen


def measure(peers: Mapping[str, Peer], inputs: Inputs, device: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Of each peer what a row of the table has."""
    steps = {name: waiting(inputs.step(peer.forward), device) for name, peer in peers.items()}
    seconds = interleaved_medians(steps, rounds)
    return {
        name: {
            "median_ms": 1e3 * seconds[name],
            "peak_bytes": peak_bytes(steps[name], device),
            "kept_bytes": kept_bytes(peer.forward, inputs.leaves),
            "host_waits": host_waits(inputs.step(peer.forward), device),
            "position_error": position_error(peer.alignment, *APART),
        }
        for name, peer in peers.items()
    }


def missed(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the targets ask for and ``rows`` have not."""
    own, line = rows.get(OWN), rows.get(f"{OWN}, ours: line")
    if own is None or line is None:
        return []
    faster, kept = own["median_ms"] / line["median_ms"], line["kept_bytes"] / own["kept_bytes"]
    found = [] if faster >= AT_LEAST else [f"line: x{faster:.2f}, at least x{AT_LEAST} is wanted"]
    return found + ([] if kept <= AT_MOST_KEPT else [f"line: {kept:.0%} kept, at most {AT_MOST_KEPT:.0%} is wanted"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benches.peers", description="The loss, and what stands for it")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--wheel", type=Path, default=Path("build/simpletuner"), help="folder of SimpleTuner's wheel")
    parser.add_argument("--frames", type=int, default=SHAPE.frames)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options = parser.parse_args(arguments)
    options.wheel.mkdir(parents=True, exist_ok=True)
    keep_heap_warm()
    found = machine(options.device)
    inputs = Inputs.of(options.frames, options.device)
    peers = our_peers(inputs)
    try:
        peers |= simpletuner_peers(inputs, options.wheel)
        found["simpletuner"] = VERSION
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"without SimpleTuner: {error}")
    rows = measure(peers, inputs, options.device, options.rounds)
    simpletuner.restore()
    for name, row in rows.items():
        down, across = row["position_error"]
        print(
            f"{name}: {row['median_ms']:.1f} ms, peak {row['peak_bytes'] / 2**20:.1f} MiB, kept "
            f"{row['kept_bytes'] / 2**20:.1f} MiB, {row['host_waits']} waits of the host; compared tokens are "
            f"{down:.4f} of the height and {across:.4f} of the width apart (30x52 against 37x37)"
        )
    if options.out:
        found |= {"shape": SHAPE.id, "frames": options.frames, "calls": rows}
        write_whole(options.out, json.dumps(found, indent=1) + "\n")
    if options.device == "cpu" and (wrong := missed(rows)):
        parser.exit(1, "\n".join(wrong) + "\n")


if __name__ == "__main__":
    main()
