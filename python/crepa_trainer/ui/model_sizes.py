"""What a model suggests for the form, from the configs that are on this machine."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

_CONFIGS = ("model_index.json", "scheduler/scheduler_config.json", "transformer/config.json", "vae/config.json")


def is_cached(model: str) -> bool:
    """Whether a text is the hub id of a pipeline whose configs lie in the hub's cache on this machine."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return all(isinstance(try_to_load_from_cache(model, name), str) for name in _CONFIGS)
    except ValueError:  # no hub id
        return False


def suggested(model: str, task: str, expert: str | None) -> dict[str, Any]:
    """The family's recommended block, and the size and frame count that the pipeline itself takes when none is given.

    model: a folder, or a hub id that `is_cached`; nothing is asked of the network. What the pipeline does not say, or
    the model cannot take, is left out. ValueError as `TrainingFamily.of`.
    """
    import diffusers

    from ..families import TrainingFamily

    family = TrainingFamily.of(model, task, None, expert, cached=True)
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
