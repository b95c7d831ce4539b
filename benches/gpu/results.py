"""Result files: written whole after every measurement, and never a dry run's among the measured ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benches.gpu.measure import ROOT

MEASURED = ROOT / "benches" / "results"


def result_path(folder: Path, kind: str, slug: str, dry: bool) -> Path:
    """``folder/kind-slug.json``, or ``folder/dry-kind.json``; ValueError for a dry run's among the measured ones."""
    if dry and folder.resolve() == MEASURED.resolve():
        raise ValueError(f"out must not be {MEASURED} for a dry run: nothing is measured")
    return folder / (f"dry-{kind}.json" if dry else f"{kind}-{slug}.json")


def write(path: Path, results: dict[str, Any]) -> None:
    """Measured numbers are finite: ValueError for one that is not, and for a dry run's among them."""
    if results["dry"] and (path.parent.resolve() == MEASURED.resolve() or not path.name.startswith("dry-")):
        raise ValueError(f"{path} must not hold a dry run: nothing was measured")
    write_whole(path, json.dumps(results, indent=1, allow_nan=bool(results["dry"])) + "\n")


def write_whole(path: Path, text: str) -> None:
    """The file is the old or the new one at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".part")
    half.write_text(text)
    os.replace(half, path)


def read_back(path: Path, machine: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier run on the same machine with the same sources stored there; None if there is nothing such."""
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    # A commit changes with files that are no sources, results among them.
    same = {**found.get("machine", {}), "commit": machine["commit"]} == machine
    return found if same else None
