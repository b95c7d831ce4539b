"""What `matrix_every` leaves in a run's folder: the similarity matrix of one clip, and its patches as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from crepa_kernels.regularizer.saving import replacing

from .plots import PatchFeatures, plot_patches

if TYPE_CHECKING:
    from ..alignment import AlignedClip

FOLDER = "looks"


def save_look(
    output: Path, step: int, clip: str, frames: Sequence[int], pixels: Tensor | None, look: AlignedClip
) -> None:
    """looks/step-N.json, and step-N.png beside it, of a run in `output`.

    clip: its name; frames: the numbers in it of its teacher frames (T,), and pixels (T, 3, H, W) uint8 those frames,
    None where they cannot be read. OSError where it cannot be written.
    """
    folder = output / FOLDER
    folder.mkdir(exist_ok=True)
    file = folder / f"step-{step:08d}.json"
    with replacing(file.with_suffix(".png")) as picture:
        plot_patches([PatchFeatures(clip, pixels, frames, look.teacher, look.student)], picture)
    matrix = [[value if math.isfinite(value) else None for value in row] for row in look.matrix.tolist()]
    content = {"clip": clip, "frames": list(frames), "constant": look.constant.item(), "matrix": matrix}
    with replacing(file) as written:  # last: whoever sees it finds the picture
        written.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
