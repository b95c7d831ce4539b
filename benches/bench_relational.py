"""Forward + backward of the relational loss against the form with matrices of all tokens by all tokens.

    python -m benches.bench_relational [--device cuda] [--out benches/results/relational-cpu.json]

The peer is ``eager_relations``: all pairs of tokens, as the papers' code has it. Each case is timed with hidden states
of a width so small that the projector takes no time, which is what the targets are of, and with those of a block of
1536 channels, whose projector both forms have. Only pairs that the peer has are compared with it; of the others the
times stand beside it.

At Wan's 480p tokens the peer fits no such machine: there operations are counted, its memory is what it takes of
matrices at the largest case that is run, and ours is run (``--counted`` does that alone and leaves the times).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.flop_counter import FlopCounterMode

from benches.eager import eager_relations
from benches.gpu.results import write_whole
from benches.measure import interleaved_medians, keep_heap_warm, machine, peak_bytes
from crepa_kernels import CrepaProjector, relational_loss
from crepa_kernels.ops.relation import Pairs, by_features

# Times faster than the peer by frames, squared, without the projector's time; and most of its memory.
AT_LEAST = {8: 6.0, 21: 15.0}
AT_MOST_OF_ITS_PEAK = 0.05


@dataclass(frozen=True)
class Case:
    frames: int
    hidden_size: int
    margin: float | None = None
    grid: tuple[int, int] = (16, 26)
    feature_size: int = 384

    @property
    def has_target(self) -> bool:
        return self.margin is None and self.hidden_size < self.feature_size


WAN = Case(21, 32, grid=(30, 52), feature_size=768)
OPERATIONS_AT_LEAST = 10.0
CASES = [Case(frames, width, margin) for frames in AT_LEAST for width in (32, 1536) for margin in (None, 0.1)]


def _step(case: Case, device: str) -> Callable[[str], Callable[[], None]]:
    """Gives forward and backward by the pairs' name, or ``"eager"`` for the peer's."""
    torch.manual_seed(0)
    shape = (1, case.frames, case.grid[0] * case.grid[1])
    h = torch.randn(*shape, case.hidden_size, device=device).requires_grad_()
    y = torch.randn(*shape, case.feature_size, device=device)
    projector = CrepaProjector(case.hidden_size, case.feature_size).to(device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def step(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            forward().backward()
            h.grad = None
            projector.zero_grad()
            wait()

        return run

    options = {"student_grid": case.grid, "teacher_grid": case.grid, "margin": case.margin}

    def of(name: str) -> Callable[[], None]:
        if name == "eager":
            return step(lambda: eager_relations(h, y, projector, case.margin))
        return step(lambda: relational_loss(h, y, projector, pairs=name, **options))

    return of


def measure(case: Case, device: str, rounds: int) -> dict[str, object]:
    of = _step(case, device)
    calls = {name: of(name) for name in ("eager", "all", "frame", "cross", "neighbours")}
    seconds = interleaved_medians(calls, rounds)
    peaks = {name: peak_bytes(calls[name], device) for name in ("eager", "all")}
    return {
        **asdict(case),
        "median_ms": {name: 1e3 * value for name, value in seconds.items()},
        "times_faster_than_eager": seconds["eager"] / seconds["all"],
        "peak_bytes": peaks,
        "peak_of_eagers": peaks["all"] / peaks["eager"],
    }


def counted(peers: Sequence[dict[str, object]]) -> dict[str, object]:
    """Operations of products and peak memory at ``WAN``, of us and of the peer; ``peers``: rows of ``measure``."""
    tokens = WAN.grid[0] * WAN.grid[1]
    z, projector = torch.empty(WAN.frames, tokens, WAN.feature_size, device="meta"), torch.nn.Identity()
    matrix = 4 * (WAN.frames * tokens) ** 2
    operations: dict[str, dict[str, int]] = {"forward": {}, "forward and backward": {}}
    # What PyTorch's counter does not know.
    more = {torch.ops.aten.addmm_: lambda out, a, b, **rest: 2 * a[0] * a[1] * b[1]}
    for name, counts in operations.items():
        gradient = None if name == "forward" else z.clone()
        with FlopCounterMode(display=False, custom_mapping=more) as counter:
            by_features(z, z, gradient, Pairs(dict.fromkeys(range(WAN.frames), 1.0), WAN.frames))
        counts["ours"] = counter.get_total_flops()
        h = z[None].clone().requires_grad_(gradient is not None)
        with FlopCounterMode(display=False) as counter:
            loss = eager_relations(h, z[None], projector)
            if gradient is not None:
                loss.backward()
        counts["eager"] = counter.get_total_flops()
    peaks = {}
    for margin, pairs in ((None, "all"), (0.1, "neighbours")):
        own = _step(replace(WAN, margin=margin), "cpu")
        largest = max((row for row in peers if row["margin"] == margin), key=lambda row: int(str(row["frames"])))
        used: Any = largest["peak_bytes"]
        height, width = cast("tuple[int, int]", largest["grid"])
        share = used["eager"] / (4 * (int(str(largest["frames"])) * height * width) ** 2)
        peaks["squared" if margin is None else "margin"] = {
            "pairs": pairs,
            "ours": peak_bytes(own(pairs)),
            "eager": round(share * matrix),
        }
    return {
        **asdict(WAN),
        "matrix_bytes": matrix,
        "operations": operations,
        "times_fewer_operations": {name: counts["eager"] / counts["ours"] for name, counts in operations.items()},
        "peak_bytes": peaks,
        "peak_of_eagers": {name: peak["ours"] / peak["eager"] for name, peak in peaks.items()},
    }


def missed_counts(row: dict[str, Any]) -> list[str]:
    """What the targets at Wan's tokens ask for and ``row`` has not."""
    fewer, shares = row["times_fewer_operations"], row["peak_of_eagers"]
    found = [f"operations, {k}: /{v:.1f}, at least 10 is wanted" for k, v in fewer.items() if v < OPERATIONS_AT_LEAST]
    return found + [
        f"{k}: {100 * v:.1f} % of the memory, at most 5 % is wanted"
        for k, v in shares.items()
        if v > AT_MOST_OF_ITS_PEAK
    ]


def misses(case: Case, row: dict[str, object]) -> list[str]:
    """What the targets of a CPU ask for and ``row`` has not."""
    if not case.has_target:
        return []
    found = []
    if (faster := float(str(row["times_faster_than_eager"]))) < AT_LEAST[case.frames]:
        found.append(f"{case.frames} frames: x{faster:.1f}, at least x{AT_LEAST[case.frames]:.0f} is wanted")
    if (share := float(str(row["peak_of_eagers"]))) > AT_MOST_OF_ITS_PEAK and case.frames == max(AT_LEAST):
        found.append(f"{case.frames} frames: {100 * share:.1f} % of the memory, at most 5 % is wanted")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The relational loss against matrices of all tokens by all tokens")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--case", default="", help="only cases whose description contains this")
    parser.add_argument("--counted", action="store_true", help="only what is counted, beside the times in --out")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options = parser.parse_args(arguments)
    keep_heap_warm()
    rows: list[dict[str, object]] = []
    missed: list[str] = []
    found = machine(options.device)
    if options.counted:
        found = json.loads(options.out.read_text())
        rows = found.pop("cases")
        found.pop("counted", None)
    for case in CASES:
        if options.counted or options.case not in str(case):
            continue
        row = measure(case, options.device, options.rounds)
        rows.append(row)
        missed += misses(case, row) if options.device == "cpu" else []
        faster, share = float(str(row["times_faster_than_eager"])), 100 * float(str(row["peak_of_eagers"]))
        print(
            f"{case.frames:2d} frames D {case.hidden_size:4d} margin {case.margin}: x{faster:.1f}, "
            f"{share:.1f} % of the memory",
            flush=True,
        )
        if options.out:
            write_whole(options.out, json.dumps({**found, "cases": rows}, indent=1) + "\n")
    if options.device == "cpu" and not options.case:
        row = counted(rows)
        missed += missed_counts(row)
        print(json.dumps(row, indent=1))
        if options.out:
            write_whole(options.out, json.dumps({**found, "cases": rows, "counted": row}, indent=1) + "\n")
    if missed:
        parser.exit(1, "\n".join(missed) + "\n")


if __name__ == "__main__":
    main()
