"""Example scripts as a user starts them, and a folder of images to train on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import processes
from PIL import Image

ROOT = Path(__file__).parents[2]


def image_folder(folder: Path) -> Path:
    """Three images of other shapes, one with a caption, and a file that is none."""
    folder.mkdir()
    numbers = np.random.default_rng(0)
    for n, (height, width) in enumerate([(48, 96), (90, 160), (64, 64)]):
        pixels = numbers.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.{('png', 'JPG', 'webp')[n]}")
    (folder / "0.txt").write_text("a red square\n")
    (folder / "notes.md").write_text("of no image")
    return folder


def run_script(name: str, *words: Any) -> str:
    """What it prints; it must succeed."""
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=processes.environment(), cwd="/", timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
