"""Every logged value as a CSV file, through accelerate's tracker interface."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process


class CSVTracker(GeneralTracker):
    """One row a logged step in `path`, flushed at once, beside whatever other trackers the run has.

    The first column is `step`. A value that is logged for the first time in the middle of a run gets a column
    of its own, left empty in the rows before. A value that is absent from a step is an empty cell.

    first_step: the step at which the run goes on; rows of earlier steps that are there already are kept.
    """

    name = "csv"
    requires_logging_directory = False

    def __init__(self, path: Path, first_step: int = 0) -> None:
        super().__init__()
        self.path = path
        self.first_step = first_step
        self.columns: list[str] = ["step"]

    @property
    def tracker(self) -> Path:
        return self.path

    @on_main_process
    def start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_csv(self.path) if self.first_step and self.path.is_file() else []
        self.columns = list(rows[0]) if rows else ["step"]
        self._write(_before(rows, self.first_step))

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        row = {"step": step, **values}
        new = [name for name in row if name not in self.columns]
        if new:
            rows = read_csv(self.path)
            self.columns += new
            self._write(rows)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def _write(self, rows: Sequence[dict[str, str]]) -> None:
        # Beside it and renamed: a kill leaves the file that was.
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)


def _before(rows: Sequence[dict[str, str]], step: int) -> list[dict[str, str]]:
    """The rows of steps before `step`, up to the first that is out of order: a kill may have torn the last."""
    kept: list[dict[str, str]] = []
    last = -1
    for row in rows:
        number = int(row["step"]) if (row["step"] or "").isdecimal() else -1
        if not last < number < step:
            break
        kept.append(row)
        last = number
    return kept


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file that CSVTracker wrote, each by its column names."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
