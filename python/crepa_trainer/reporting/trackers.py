"""Every logged value of a run in one file of lines, through accelerate's tracker interface."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import GeneralTracker, on_main_process

# Of a row, what another run of the same settings has otherwise.
MEASURED = ("time", "seconds", "memory")


class MetricsTracker(GeneralTracker):
    """Appends one JSON object a logged step to `path`, a line each, beside whatever other trackers the run has.

    It holds `step` and what was logged in that step; null is a number that is not finite.

    first_step: the step at which the run goes on. Lines of earlier steps are kept, what comes after them is cut off.
    """

    name = "metrics"
    requires_logging_directory = False

    def __init__(self, path: Path, first_step: int = 0) -> None:
        super().__init__()
        self.path = path
        self.first_step = first_step

    @property
    def tracker(self) -> Path:
        return self.path

    @on_main_process
    def start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            kept = [end for end, row in _rows(self.path) if row["step"] < self.first_step]
            file.truncate(kept[-1] if kept else 0)

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        row = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in {"step": step, **values}.items()
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def peak_memory(device: torch.device) -> int:
    """Bytes at most so far: of tensors on an accelerator, of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a file that MetricsTracker wrote, without a last one that a kill tore; NaN is what was not finite."""
    return [{name: math.nan if value is None else value for name, value in row.items()} for _, row in _rows(path)]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with the number of bytes up to its end, as far as whole lines go and steps rise."""
    end, last = 0, -1
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                return
            if not isinstance(row, dict) or not isinstance(row.get("step"), int) or row["step"] <= last:
                return
            end, last = end + len(line), row["step"]
            yield end, row
