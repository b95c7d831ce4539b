"""The projector and its settings, beside the model and never inside."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from .config import CrepaConfig
from .extras import require
from .projector import CrepaProjector

PROJECTOR_FILE = "crepa_projector.safetensors"
CONFIG_FILE = "crepa_config.json"


def save_crepa(folder: str | os.PathLike[str], config: CrepaConfig, projector: CrepaProjector | None) -> None:
    """Writes ``crepa_config.json`` and, when there is a projector, ``crepa_projector.safetensors`` into ``folder``.

    Raises:
        ValueError: if the projector's weights are sharded.
    """
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    if projector is not None:
        weights = projector.state_dict()
        if any(type(tensor).__name__ == "DTensor" for tensor in weights.values()):
            raise ValueError("the projector's weights are sharded (DTensor): gather them before saving")
        torch_io = require("safetensors.torch", "saving the projector")
        torch_io.save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()},
            where / PROJECTOR_FILE,
            metadata={"format": "pt"},
        )
    (where / CONFIG_FILE).write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")


def load_crepa(folder: str | os.PathLike[str]) -> tuple[CrepaConfig, dict[str, torch.Tensor]]:
    """Reads what ``save_crepa`` wrote: the settings, and the projector's weights (none where CREPA was off).

    Raises:
        ValueError: naming the file, when one is missing or is not a projector's.
    """
    where = Path(folder)
    if not (where / CONFIG_FILE).is_file():
        raise ValueError(f"{where} has no {CONFIG_FILE}: it was not written by CrepaRegularizer.save_pretrained")
    config = CrepaConfig.from_json(where / CONFIG_FILE)
    if not config.crepa_enabled:
        return config, {}
    file = where / PROJECTOR_FILE
    if not file.is_file():
        raise ValueError(f"{where} has a {CONFIG_FILE} but no {PROJECTOR_FILE}")
    safetensors = require("safetensors", "loading the projector")
    try:
        weights: dict[str, torch.Tensor] = require("safetensors.torch", "loading the projector").load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    check_weights(weights, str(file))
    return config, weights


def check_weights(weights: dict[str, torch.Tensor], source: str) -> None:
    """ValueError naming ``source`` unless ``weights`` are those of a LayerNorm and a Linear that fit each other."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    matrix = shapes.get("1.weight", ())
    if len(matrix) == 2:
        features, hidden = matrix
        wanted = {"0.weight": (hidden,), "0.bias": (hidden,), "1.weight": matrix, "1.bias": (features,)}
        if shapes == wanted:
            return
    raise ValueError(f"{source} does not hold a projector's weights (LayerNorm '0.*', Linear '1.*'): {shapes}")
