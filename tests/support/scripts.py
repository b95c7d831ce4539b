"""A script in a process of its own, as a user starts it, without importing the libraries again, and images for it."""

from __future__ import annotations

import os
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import processes
from PIL import Image


def execute(script: Path, words: Sequence[str]) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"  # as `accelerate launch --cpu` does, or ranks know nothing of each other
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")


def run_script(script: Path, *words: object, ranks: int = 1) -> str:
    """What ``script`` prints with these words on its command line; AssertionError with its last words if it fails."""
    done = processes.run(execute, script, [str(word) for word in words], ranks=ranks)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def without_marked(text: str, mark: str) -> str:
    """A script without the lines that end in `# mark`, and of those in `# mark: x` that have x themselves without x."""
    lines = []
    for line in text.splitlines():
        code, marked, part = line.partition(f"  # {mark}")
        addition = part.removeprefix(": ")
        if not marked:
            lines.append(line)
        elif addition and addition in code:
            lines.append(re.sub(rf"(, | )?{re.escape(addition)}", "", code))
    return "\n".join(lines)


def image_folder(folder: Path) -> Path:
    """Three images of other shapes, one with a caption, and files that are none."""
    folder.mkdir()
    numbers = np.random.default_rng(0)
    for n, (height, width) in enumerate([(48, 96), (90, 160), (64, 64)]):
        pixels = numbers.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.{('png', 'JPG', 'webp')[n]}")
    (folder / "0.txt").write_text("a red square\n")
    (folder / "notes.md").write_text("of no image")
    return folder
