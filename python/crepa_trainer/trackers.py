"""Every logged value as a CSV file, through accelerate's tracker interface."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process


class CSVTracker(GeneralTracker):
    """One row a logged step in `path`, flushed at once, beside whatever other trackers the run has.

    The first column is `step`. A value that is logged for the first time in the middle of a run gets a column
    of its own, left empty in the rows before. A value that is absent from a step is an empty cell.
    """

    name = "csv"
    requires_logging_directory = False

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.columns: list[str] = ["step"]

    @property
    def tracker(self) -> Path:
        return self.path

    @on_main_process
    def start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write([])

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

    def _write(self, rows: list[dict[str, str]]) -> None:
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file that CSVTracker wrote, each by its column names."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
