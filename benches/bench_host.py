"""Host time of one forward + backward through the Triton backend: what Python and PyTorch take to launch it.

    python -m benches.bench_host [--against CHECKOUT] [--out benches/results/host-cpu.json]

The launches are recorded, not carried out, so no GPU is needed: Triton's own launcher and the vendor's products are not
in it, everything else is. ``--against`` measures the package of another checkout in the same run, round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

ROUNDS, STEPS, WARMUP = 7, 300, 50


def measure() -> dict[str, float]:
    """Milliseconds of a step in this process, and its launches; bf16 tokens on equal grids, all gradients."""
    import torch

    import crepa_kernels
    from crepa_kernels import CrepaProjector, crepa_loss

    # Of this checkout, and not of one that is installed: an older one has its kernels elsewhere.
    moved = (Path(crepa_kernels.__file__).parent / "backends").exists()
    launch = import_module("crepa_kernels.backends.triton.launch" if moved else "crepa_kernels.triton.launch")
    # Adding up what a launch moves belongs to the recording, not to a step.
    launch._bytes = lambda parts: 0  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    h = torch.randn(1, 4, 64, 128, dtype=torch.bfloat16, requires_grad=True)
    y = torch.randn(1, 4, 64, 64, dtype=torch.bfloat16)
    projector = CrepaProjector(128, 64)
    inputs = [h, *projector.parameters()]
    times, launches = [], 0
    for _ in range(WARMUP + STEPS):
        with launch.recorded() as found:
            start = time.perf_counter()
            loss = crepa_loss(h, y, projector, student_grid=(8, 8), teacher_grid=(8, 8), backend="triton").loss
            torch.autograd.grad(loss, inputs)
            times.append(1e3 * (time.perf_counter() - start))
        launches = len(found)
    times = sorted(times[WARMUP:])
    return {"median_ms": statistics.median(times), "fastest_ms": times[len(times) // 20], "launches": launches}


def in_process(checkout: Path) -> dict[str, float]:
    """``measure`` with the package of ``checkout``, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--once"]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Host time of a step")
    parser.add_argument("--against", type=Path, help="another checkout, measured beside this one")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.once:
        print(json.dumps(measure()))
        return 0
    import torch
    import triton

    checkouts = {"this": Path(__file__).resolve().parents[1]}
    if options.against:
        checkouts["against"] = options.against.resolve()
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for _ in range(ROUNDS):
        for name, checkout in checkouts.items():
            rounds[name].append(in_process(checkout))
    found = {
        name: {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        for name, turns in rounds.items()
    }
    for name, row in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()))
    if options.out:
        head = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
        options.out.write_text(json.dumps(head | {"rounds": ROUNDS, "steps": STEPS, **found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
