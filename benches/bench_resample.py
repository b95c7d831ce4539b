"""Token resampling against PyTorch: forward and backward, alone and after LayerNorm, as a share of the byte floor.

    python -m benches.bench_resample [--device cuda] [--out benches/results/resample-cpu.json]

Peers, each the best way to write it with ``F.interpolate``:

- *view*: on a channels-last view of the tokens, which copies nothing;
- *transposed*: on a channels-first copy, whose result is copied back, as most code does it.

Bytes that must move, with I = frames x N x C and O = frames x M x C elements: I + O forward and O + I backward for
``resample_tokens``; with LayerNorm fused I + O forward and O + 2 I backward, as tokens are read and their gradient
written. The floor is these bytes at the rate at which the device copies a tensor of I elements, in the same run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from benches.gpu.results import write_whole
from benches.measure import interleaved_medians, keep_heap_warm, machine
from crepa_kernels import resample_tokens
from crepa_kernels.grid import Grid, num_tokens
from crepa_kernels.ops import has_extension
from crepa_kernels.ops.layer_norm_resample import layer_norm_resample_op

Forward = Callable[[torch.Tensor], torch.Tensor]
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    operator: str  # "resample" or "layer_norm_resample"
    source: Grid
    target: Grid
    channels: int
    frames: int
    antialias: bool
    dtype: str


def cases(frames: int | None) -> list[Case]:
    shapes = [
        ("resample", (30, 52), (37, 37), 1536, 21),
        ("resample", (30, 52), (37, 37), 5120, 21),
        ("resample", (45, 80), (16, 16), 5120, 21),
        ("layer_norm_resample", (30, 52), (16, 16), 1536, 21),
        ("layer_norm_resample", (30, 52), (37, 37), 5120, 21),
    ]
    return [
        Case(operator, source, target, channels, frames or usual, antialias, dtype)
        for operator, source, target, channels, usual in shapes
        for antialias in (False, True)
        for dtype in ("float32", "bfloat16")
    ]


def interpolate(tokens: torch.Tensor, case: Case, copied: bool) -> torch.Tensor:
    images = tokens.view(-1, *case.source, case.channels).permute(0, 3, 1, 2)
    images = images.contiguous() if copied else images
    if case.antialias and tokens.device.type == "cpu" and tokens.dtype == torch.bfloat16:
        images = images.float()  # PyTorch has no antialiased filter for it
    out = F.interpolate(images, size=case.target, mode="bilinear", antialias=case.antialias)
    rows = out.to(tokens.dtype).permute(0, 2, 3, 1)
    return (rows.contiguous() if copied else rows).reshape(tokens.shape[0], -1, case.channels)


def forwards(case: Case) -> dict[str, Forward]:
    if case.operator == "resample":
        return {
            "ours": lambda x: resample_tokens(x, case.source, case.target, case.antialias),
            "view": lambda x: interpolate(x, case, copied=False),
            "transposed": lambda x: interpolate(x, case, copied=True),
        }
    shape = (case.channels,)
    return {
        "ours": lambda x: layer_norm_resample_op(x, case.source, case.target, case.antialias, EPS)[0],
        "view": lambda x: interpolate(F.layer_norm(x, shape, eps=EPS), case, copied=False),
        "transposed": lambda x: interpolate(F.layer_norm(x, shape, eps=EPS), case, copied=True),
    }


def measure(case: Case, device: str, rounds: int) -> dict[str, object]:
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    tokens = torch.randn(case.frames, num_tokens(case.source), case.channels, device=device).to(dtype).requires_grad_()
    grad = torch.randn(case.frames, num_tokens(case.target), case.channels, device=device).to(dtype)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def forward(run: Forward) -> Callable[[], None]:
        def step() -> None:
            with torch.no_grad():
                run(tokens)
            wait()

        return step

    def both(run: Forward) -> Callable[[], None]:
        def step() -> None:
            torch.autograd.grad(run(tokens), tokens, grad)
            wait()

        return step

    def copy() -> None:
        tokens.detach().clone()
        wait()

    named = forwards(case)
    calls = {f"{name} forward": forward(run) for name, run in named.items()}
    calls |= {f"{name} both": both(run) for name, run in named.items()}
    seconds = interleaved_medians({"copy": copy, **calls}, rounds)
    size = tokens.element_size()
    rate = 2 * tokens.numel() * size / seconds["copy"]
    moved = size * (tokens.numel() + grad.numel())
    floor = (2 * moved + (size * tokens.numel() if case.operator != "resample" else 0)) / rate
    return {
        **asdict(case),
        "median_ms": {name: 1e3 * value for name, value in seconds.items()},
        "copy_gb_s": rate / 1e9,
        "share_of_floor_forward": moved / rate / seconds["ours forward"],
        "share_of_floor_both": floor / seconds["ours both"],
        "times_faster_than_view": seconds["view both"] / seconds["ours both"],
        "times_faster_than_transposed": seconds["transposed both"] / seconds["ours both"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Token resampling against F.interpolate")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--frames", type=int, help="instead of each shape's own number")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--case", default="", help="only cases whose description contains this")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options = parser.parse_args(arguments)
    if not has_extension(options.device):
        parser.error(f"the C++/CUDA extension is not there for {options.device}: there is nothing to compare")
    keep_heap_warm()
    rows: list[dict[str, object]] = []
    found = machine(options.device)
    for case in cases(options.frames):
        if options.case not in str(case):
            continue
        row = measure(case, options.device, options.rounds)
        rows.append(row)
        filter_name = "antialias" if case.antialias else "plain"
        print(
            f"{case.operator:20s} {case.source} -> {case.target} C {case.channels} {filter_name:9s} {case.dtype:8s} "
            f"x{row['times_faster_than_view']:.2f} view, x{row['times_faster_than_transposed']:.1f} transposed, "
            f"{100 * float(str(row['share_of_floor_both'])):.0f} % of the copy rate",
            flush=True,
        )
        if options.out:
            write_whole(options.out, json.dumps({**found, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
