"""What the loss is measured against: the same arithmetic as training scripts write it in eager PyTorch.

    python -m benches.peers [--out benches/results/simpletuner-cpu.json]

measures SimpleTuner's published regularizer with its own loss and with ours, in turns.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benches.bench_resample import processor
from benches.gpu.measure import commit
from benches.gpu.results import write_whole
from benches.measure import Call, interleaved_medians, keep_heap_warm, kept_bytes
from benches.simpletuner import VERSION, give_features, module, regularizer, wheel
from crepa_kernels.grid import Grid, plan_alignment
from crepa_kernels.integrations import simpletuner

AT_LEAST = 3.5  # times faster than SimpleTuner, its own arithmetic


def eager_transposed(
    hidden_states: torch.Tensor,
    teacher_features: torch.Tensor,
    projector: nn.Module,
    student_grid: Sequence[int],
    teacher_grid: Sequence[int],
    distance: int = 1,
    tau: float = 1.0,
) -> torch.Tensor:
    """The loss of adjacent neighbours with every token projected and the larger side interpolated as transposed copies.

    It is ``crepa_loss(..., spatial_align="smaller", antialias=False)``. Half-precision hidden states run under
    autocast of their type, others in their own.

    Args:
        hidden_states: (B, T, P, D), T > distance.
        teacher_features: (B, T, N, E).
        projector: D -> E, applied to all tokens.
        student_grid: (height, width) of the P tokens.
        teacher_grid: (height, width) of the N tokens.
        distance: neighbour offset, frames.
        tau: decay of the neighbours' weight, frames.
    """
    with _autocast(hidden_states):
        p, y = projector(hidden_states), teacher_features  # (B, T, P, E), (B, T, N, E)
        if p.shape[2] > y.shape[2]:
            p = _interpolated(p, student_grid, teacher_grid)
        elif tuple(student_grid) != tuple(teacher_grid):
            y = _interpolated(y, teacher_grid, student_grid)
        return _adjacent_loss(p, y, distance, tau)


def eager_neighbours(
    hidden_states: torch.Tensor,
    teacher_features: torch.Tensor,
    projector: nn.Module,
    student_grid: Sequence[int],
    teacher_grid: Sequence[int],
    antialias: bool = True,
    distance: int = 1,
    tau: float = 1.0,
) -> torch.Tensor:
    """The loss of adjacent neighbours as a careful user writes it for torch.compile: no pair of frames too many.

    It is ``crepa_loss(..., spatial_align="teacher")``: the student is resampled to the teacher's grid, through a view
    that copies nothing. Types and arguments are as of ``eager_transposed``; ``antialias`` widens the filter where an
    axis shrinks.
    """
    with _autocast(hidden_states):
        p = projector(hidden_states)  # (B, T, P, E)
        if tuple(student_grid) != tuple(teacher_grid):
            images = p.flatten(0, 1).unflatten(1, tuple(student_grid)).permute(0, 3, 1, 2)
            if antialias and images.device.type == "cpu":
                images = images.float()  # PyTorch has no antialiased filter for bf16 there
            images = F.interpolate(images, size=tuple(teacher_grid), mode="bilinear", antialias=antialias)
            p = images.permute(0, 2, 3, 1).flatten(1, 2).unflatten(0, p.shape[:2])
        return _adjacent_loss(p, teacher_features, distance, tau)


def eager_relations(
    hidden_states: torch.Tensor, teacher_features: torch.Tensor, projector: nn.Module, margin: float | None = None
) -> torch.Tensor:
    """The relational loss of all pairs on one grid as its papers' code has it: two matrices of all tokens by all.

    Args:
        hidden_states: (B, T, M, D).
        teacher_features: (B, T, M, E).
        projector: D -> E, applied to all tokens.
        margin: differences of cosines cost what they exceed it by; None: their squares.
    """
    with _autocast(hidden_states):
        p, y = (F.normalize(rows, dim=-1).flatten(1, 2) for rows in (projector(hidden_states), teacher_features))
        difference = p @ p.mT - y @ y.mT  # (B, T M, T M)
        cost = difference.square() if margin is None else F.relu(difference.abs() - margin)
        return cost.mean()


def _autocast(hidden_states: torch.Tensor) -> AbstractContextManager[object]:
    half = hidden_states.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(hidden_states.device.type, dtype=hidden_states.dtype) if half else nullcontext()


def _adjacent_loss(p: torch.Tensor, y: torch.Tensor, distance: int, tau: float) -> torch.Tensor:
    """-mean over frames of the own frame's similarity and the two neighbours': (B, T, M, E) twice."""
    p, y = F.normalize(p, dim=-1), F.normalize(y, dim=-1)
    total = (p * y).sum(dim=-1).mean(dim=-1)  # (B, T)
    if distance > 0:
        weight = math.exp(-distance / tau)
        later = (p[:, :-distance] * y[:, distance:]).sum(dim=-1).mean(dim=-1)
        earlier = (p[:, distance:] * y[:, :-distance]).sum(dim=-1).mean(dim=-1)
        total = total + weight * (F.pad(later, (0, distance)) + F.pad(earlier, (distance, 0)))
    return -total.mean()


def _interpolated(tokens: torch.Tensor, source: Sequence[int], target: Sequence[int]) -> torch.Tensor:
    """(B, T, N, C) on ``source`` -> (B, T, M, C) on ``target``, through channels-first copies."""
    batch, frames, _, channels = tokens.shape
    images = tokens.reshape(batch * frames, *source, channels).permute(0, 3, 1, 2).contiguous()
    images = F.interpolate(images, size=tuple(target), mode="bilinear", align_corners=False)
    return images.permute(0, 2, 3, 1).contiguous().reshape(batch, frames, -1, channels)


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


def simpletuner_step(
    spatial: str | None, folder: Path, frames: int = 5
) -> tuple[Call, Callable[[], torch.Tensor], Any]:
    """Forward + backward, and forward, of SimpleTuner's regularizer with our loss (``spatial``) or its own (None).

    30x52 tokens of width 1536 against 16x16 of 384, fp32. The third is what autograd is given from outside.
    """
    theirs = module(wheel(folder))
    torch.manual_seed(0)
    projector = nn.Sequential(nn.LayerNorm(1536), nn.Linear(1536, 384))
    crepa = regularizer(theirs, projector, 1536)
    h, y = torch.randn(1, frames, 1560, 1536, requires_grad=True), torch.randn(1, frames, 256, 384)
    latents, vae = torch.randn(1, 16, frames, 60, 104), nn.Identity()
    give_features(crepa, frames, lambda video: y)

    def forward() -> torch.Tensor:
        simpletuner.restore()
        if spatial is not None:
            simpletuner.apply(spatial, type(crepa))  # type: ignore[arg-type]
        return crepa.compute_loss(h, latents, vae)[0]

    def step() -> None:
        forward().backward()
        h.grad = None
        projector.zero_grad()

    return step, forward, [h, y, *projector.parameters()]


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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benches.peers", description="SimpleTuner's regularizer and ours in it"
    )
    parser.add_argument("--wheel", type=Path, default=Path("build/simpletuner"), help="folder of SimpleTuner's wheel")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options = parser.parse_args(arguments)
    options.wheel.mkdir(parents=True, exist_ok=True)
    keep_heap_warm()
    steps = {name or "theirs": simpletuner_step(name, options.wheel) for name in (None, "line", "grid")}
    seconds = interleaved_medians({name: step for name, (step, _, _) in steps.items()}, options.rounds)
    kept = {name: kept_bytes(forward, inputs) for name, (_, forward, inputs) in steps.items()}
    simpletuner.restore()
    errors = {
        name: position_error(grids_of(name, (30, 52), (37, 37), options.wheel), (30, 52), (37, 37))
        for name in ("line", "grid")
    }
    for name in ("line", "grid"):
        print(
            f"{name}: {seconds['theirs'] / seconds[name]:.2f} times faster than SimpleTuner, "
            f"{100 * kept[name] / kept['theirs']:.1f} % of its kept bytes (30x52 -> 16x16, E 384); position error "
            f"{errors[name][0]:.4f} of the height, {errors[name][1]:.4f} of the width (30x52 against 37x37)"
        )
    if options.out:
        found = {
            "device": processor(), "torch": torch.__version__, "threads": torch.get_num_threads(), "commit": commit(),
            "simpletuner": VERSION, "median_ms": {name: 1e3 * value for name, value in seconds.items()},
            "kept_bytes": kept, "position_error": errors,
        }  # fmt: skip
        write_whole(options.out, json.dumps(found, indent=1) + "\n")
    if seconds["theirs"] < AT_LEAST * seconds["line"]:
        parser.exit(1, f"line: at least x{AT_LEAST} is wanted\n")


if __name__ == "__main__":
    main()
