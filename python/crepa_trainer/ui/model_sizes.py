"""What a model folder suggests for the form, from its configs alone."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any


def suggested(model: str, task: str, expert: str | None) -> dict[str, Any]:
    """The family's recommended block, and the size and frame count that the pipeline itself takes when none is given.

    What the pipeline does not say, or the model cannot take, is left out. ValueError as `TrainingFamily.of`.
    """
    import diffusers

    from ..families import TrainingFamily

    family = TrainingFamily.of(model, task, None, expert)
    found: dict[str, Any] = {"crepa_block_index": family.row.block_index}
    call = inspect.signature(getattr(diffusers, family.pipelines[task]).__call__).parameters
    height, width, frames = (call[name].default if name in call else None for name in ("height", "width", "num_frames"))
    if height is None or width is None:
        # CogVideoX: the latents' size, in its transformer's config.
        config, pixels = family.configs["transformer"], family.compression[1]
        sides = config.get("sample_height"), config.get("sample_width")
        height, width = (side * pixels if isinstance(side, int) else None for side in sides)
    if not all(isinstance(each, int) for each in (height, width, frames)):
        return found
    try:
        family.check_bucket(SimpleNamespace(height=height, width=width, frames=frames))
    except ValueError:
        return found
    return {**found, "resolutions": [[height, width]], "frame_counts": [frames]}
