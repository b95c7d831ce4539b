"""The roofline of a result file as a PNG.

python -m benches.gpu.plot benches/results/gpu-nvidia-h200.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def plot(results: dict[str, Any], path: Path) -> None:
    """Achieved operations a second over operations a byte, under the card's measured copy and matrix rates.

    Raises:
        ValueError: for the results of a dry run.
    """
    if results["dry"]:
        raise ValueError("a dry run measured nothing to plot")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    copy, matrix = results["copy_rate"], results["matrix_rate"]
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    intensities = [2.0**power for power in range(4, 15)]
    axes.plot(intensities, [min(matrix, copy * i) / 1e12 for i in intensities], color="black", label="measured roof")
    marks = {"triton": "o", "compiled bf16": "s", "eager fp32": "^"}
    for index, row in enumerate(results["rows"]):
        color = f"C{index % 10}"
        floor = row["floor"]
        for call, mark in marks.items():
            milliseconds = row["calls"].get(call, {}).get("median_ms")
            if milliseconds is not None and "operations" in floor:
                rate = floor["operations"] / (milliseconds * 1e-3) / 1e12
                label = row["shape"] if call == "triton" else None
                axes.plot(floor["operations"] / floor["moved"], rate, mark, color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("operations / byte that must move")
    axes.set_ylabel("TFLOP/s of forward + backward")
    machine = results["machine"]
    axes.set_title(f"crepa_loss on {machine['device']} (o triton, s compiled bf16, ^ eager fp32), {machine['commit']}")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        plot(json.loads(Path(name).read_text()), Path(name).with_suffix(".png"))
