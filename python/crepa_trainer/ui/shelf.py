"""The runs of the page's folder, each read once and then only what it added."""

from __future__ import annotations

from pathlib import Path

from ..reporting.runs import RunFolder
from .guard import Folders

_known: dict[Path, RunFolder] = {}


def all_runs(folders: Folders) -> list[RunFolder]:
    """Newest first."""
    found = [_known.setdefault(run.path, run) for run in RunFolder.found_in(folders.runs)]
    for gone in _known.keys() - {run.path for run in found}:
        del _known[gone]
    return found


def name_of(folders: Folders, run: RunFolder) -> str:
    """A run's folder below that of the runs, by which pages' addresses know it."""
    return run.path.relative_to(folders.runs).as_posix()


def run_named(folders: Folders, name: str) -> RunFolder | None:
    """The run of a name, which may be anything."""
    return next((run for run in all_runs(folders) if name_of(folders, run) == name), None)
