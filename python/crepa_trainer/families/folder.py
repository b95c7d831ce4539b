"""A pipeline folder in the hub's layout, or a hub id: its configs, and which parts it has."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_WEIGHTS = (".safetensors", ".bin")
# Part: its config file, and a diffusers class that reads files of that name.
_CONFIGS = {
    None: ("model_index.json", "DiffusionPipeline"),
    "scheduler": ("scheduler_config.json", "FlowMatchEulerDiscreteScheduler"),
}


def read_config(model: str, part: str | None = None, *, cached: bool = False) -> Mapping[str, Any]:
    """The config of a part ("transformer", "vae", "scheduler"), or without one the pipeline's model_index.json.

    cached: a hub id's from the cache on this machine alone.

    Raises:
        ValueError: neither a folder nor a hub id, or the file is not there or cannot be read.
    """
    import diffusers

    name, loader = _CONFIGS.get(part, ("config.json", "AutoModel"))
    where = name if part is None else f"{part}/{name}"
    # diffusers would take another folder's file of that name, and ask the hub for a folder that is misspelt.
    if Path(model).is_dir():
        if not (Path(model) / where).is_file():
            raise ValueError(f"{model} has no {where}: model must be a diffusers pipeline folder or hub id")
    elif Path(model).is_absolute() or model.count("/") != 1:
        raise ValueError(f"model = {model}: no such folder, and not a hub id (owner/name)")
    try:
        reader: Any = getattr(diffusers, loader)
        config: Mapping[str, Any] = reader.load_config(model, subfolder=part, local_files_only=cached)
    except OSError as error:
        raise ValueError(f"{model}: {where} cannot be read: {error}") from error
    return config


def has_part(model: str, index: Mapping[str, Any], part: str) -> bool:
    """Whether a pipeline with this model_index.json has a part; of a local folder also whether its files are there."""
    if (index.get(part) or [None, None])[1] is None:
        return False
    folder = Path(model)
    if not folder.is_dir():
        return True
    names = [path.name for path in (folder / part).iterdir()] if (folder / part).is_dir() else []
    if part in ("scheduler", "image_processor") or part.startswith("tokenizer"):
        return bool(names)
    return "config.json" in names and any(name.endswith(_WEIGHTS) for name in names)


def missing_shards(model: str, part: str) -> list[str]:
    """Files of a part's weights that its index names and a local folder lacks, as "part/file"."""
    missing: set[str] = set()
    for index in (Path(model) / part).glob("*.safetensors.index.json"):
        if not index.with_name(index.name.removesuffix(".index.json")).is_file():
            names = json.loads(index.read_text())["weight_map"].values()
            missing |= {f"{part}/{name}" for name in names if not (index.parent / name).is_file()}
    return sorted(missing)


def constructor_defaults(name: str) -> dict[str, Any]:
    """The default settings of a diffusers model class."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}
