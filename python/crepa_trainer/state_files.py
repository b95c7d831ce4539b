"""States of training in files that can hold no code: tensors as safetensors, the rest as JSON in their header."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_STATE, _TENSOR = "state", "tensor"
_READ_AT_ONCE = 1 << 20


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes nested mappings, lists, numbers, text and tensors; TypeError for anything else.

    A tensor that is in several places, as a quantizer's table is, is written once. Keys come back as text, tuples as
    lists. OSError or SafetensorError where the disk is full.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_without_tensors(state, _STATE, tensors, {}))
    save_file(tensors, path, {_STATE: text})


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote, tensors on the CPU. ValueError naming a file that holds something else."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {})[_STATE]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        state = _with_tensors(json.loads(text), tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is damaged: it holds no state")
    return state


def random_state(device: torch.device) -> dict[str, Any]:
    """Of Python, NumPy, and PyTorch on the CPU and on `device`."""
    numpy_state: Any = np.random.get_state(legacy=True)  # noqa: NPY002 - what others draw from
    state = {
        "python": random.getstate(),
        "numpy": [numpy_state[0], torch.from_numpy(numpy_state[1].astype(np.int64)), *numpy_state[2:]],
        "cpu": torch.get_rng_state(),
    }
    return state if device.type == "cpu" else {**state, "device": torch.get_device_module(device).get_rng_state()}


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Puts back what `random_state` gave. ValueError, TypeError, KeyError or RuntimeError for something else."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"])


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value, the same after it was written and read."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    if isinstance(value, Tensor):
        if (first := names.setdefault(id(value), name)) == name:
            tensors[name] = value.detach().cpu().contiguous()
        return {_TENSOR: first}
    if isinstance(value, Mapping):
        return {str(key): _without_tensors(each, f"{name}.{key}", tensors, names) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(each, f"{name}.{number}", tensors, names) for number, each in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _with_tensors(each, tensors) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_tensors(each, tensors) for each in value]
    return value
