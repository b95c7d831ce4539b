"""A script in a process of its own, as a user starts it, without importing the libraries again."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import processes


def execute(script: Path, words: Sequence[str]) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"  # as `accelerate launch --cpu` does, or ranks know nothing of each other
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")


def run_script(script: Path, *words: object, ranks: int = 1) -> str:
    """What ``script`` prints with these words on its command line; AssertionError with its last words if it fails."""
    done = processes.run(execute, script, [str(word) for word in words], ranks=ranks)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
