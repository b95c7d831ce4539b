"""Writes the measured table of benches/results/ into README.md: python -m benches.table"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- measured: loss-cpu -->", "<!-- end -->"


def loss_table(results: dict[str, Any]) -> str:
    """A Markdown table, one row a shape, from the JSON that ``make bench`` stores."""
    machine, commit = results["machine_info"], results["commit_info"]
    shapes: dict[str, dict[str, dict[str, Any]]] = {}
    for bench in results["benchmarks"]:
        info = bench["extra_info"]
        shapes.setdefault(bench["group"], {})[info["call"]] = info
    head = (
        "| shape | frames | transposed eager | reference | torch.compile | `torch` | faster "
        "| kept, of eager's | peak, of eager's |"
    )
    lines = [head, "|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for shape, calls in shapes.items():
        eager, ours = calls["transposed"], calls["torch"]
        milliseconds = [f"{calls[name]['interleaved_median_s'] * 1e3:.0f} ms" for name in calls]
        lines.append(
            f"| {shape} | {ours['frames']} | {' | '.join(milliseconds)} | {ours['times_faster_than_transposed']:.2f}x "
            f"| {ours['kept_bytes'] / eager['kept_bytes']:.0%} | {ours['peak_bytes'] / eager['peak_bytes']:.0%} |"
        )
    cpu = machine["cpu"]
    source = (
        f"Forward + backward, medians of interleaved rounds. {cpu['brand_raw']}, {machine['threads']} threads, "
        f"torch {machine['torch']}, Python {machine['python_version']}, commit {commit['id'][:10]}, "
        f"{results['datetime'][:10]}."
    )
    return "\n".join([*lines, "", source])


def main() -> None:
    readme = ROOT / "README.md"
    results = json.loads((ROOT / "benches" / "results" / "loss-cpu.json").read_text())
    table = f"{START}\n{loss_table(results)}\n{END}"
    text, replaced = re.subn(f"{START}.*?{END}", lambda _: table, readme.read_text(), flags=re.DOTALL)
    if replaced != 1:
        raise SystemExit(f"README.md must hold {START} ... {END} once, found {replaced}")
    readme.write_text(text)


if __name__ == "__main__":
    main()
