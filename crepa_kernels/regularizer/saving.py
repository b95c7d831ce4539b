"""The projector and its settings, beside the model and never inside."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from ..config.shared import TaughtSettings
from ..optional import require
from ..projector import Projector
from .aligning import projector_class
from .attach import Owner

AnySettings = TypeVar("AnySettings", bound=TaughtSettings)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write, which takes its place at the end; whatever happens, ``path`` is old or new.

    Raises:
        OSError: naming ``path`` where the disk is full or cannot be written; nothing is left behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.tmp")
    try:
        yield unfinished
        # Otherwise a machine that loses power may keep the new name and not the bytes.
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def whole_weights(projector: Projector) -> dict[str, torch.Tensor]:
    """The projector's state dict; where it is sharded, gathered from all ranks, which must all call this."""
    weights = projector.state_dict()
    # By name: importing DTensor takes longer than importing this package.
    return {
        name: cast(Any, tensor).full_tensor() if type(tensor).__name__ == "DTensor" else tensor
        for name, tensor in weights.items()
    }


def load_weights(projector: Projector, weights: dict[str, torch.Tensor], source: str) -> None:
    """Puts ``weights`` into the projector, sharded or not.

    Raises:
        ValueError: naming ``source``, when they are not those of a projector of this size.
    """
    sizes = check_weights(weights, source, type(projector))
    if sizes != projector.sizes:
        raise ValueError(f"{source} holds a projector {_ways(sizes)}, this one goes {_ways(projector.sizes)}")
    if any(type(parameter).__name__ == "DTensor" for parameter in projector.parameters()):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(projector, dict[str, Any](weights), options=StateDictOptions(full_state_dict=True))
    else:
        projector.load_state_dict(weights)


def config_file(owner: Owner) -> str:
    """Name of the file with the settings."""
    return f"{owner.prefix}config.json"


def projector_file(owner: Owner) -> str:
    """Name of the file with the projector's weights."""
    return f"{owner.projector}.safetensors"


def save_regularizer(
    folder: str | os.PathLike[str], config: TaughtSettings, projector: Projector | None, owner: Owner
) -> None:
    """Writes the owner's ``*_config.json`` and, when there is a projector, ``*_projector.safetensors`` into ``folder``.

    Where the projector is sharded every rank calls this, and rank 0 writes.
    """
    where = Path(folder)
    sharded = False
    weights: dict[str, torch.Tensor] = {}
    if projector is not None:
        sharded = any(type(parameter).__name__ == "DTensor" for parameter in projector.parameters())
        weights = whole_weights(projector)
    if sharded and dist.get_rank() != 0:
        return
    if weights:
        torch_io = require("safetensors.torch", "saving the projector")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        with replacing(where / projector_file(owner)) as file:
            torch_io.save_file(tensors, file, metadata={"format": "pt"})
    with replacing(where / config_file(owner)) as file:
        file.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")


def load_regularizer(
    folder: str | os.PathLike[str], kind: type[AnySettings], owner: Owner
) -> tuple[AnySettings, dict[str, torch.Tensor]]:
    """Reads what ``save_regularizer`` wrote: the settings, and the projector's weights (none where it was off).

    Raises:
        ValueError: naming the file, when one is missing or is not a projector's.
    """
    settings, file = Path(folder, config_file(owner)), Path(folder, projector_file(owner))
    if not settings.is_file():
        raise ValueError(f"{folder} has no {settings.name}: it was not written by {owner.regularizer}.save_pretrained")
    config = kind.from_file(settings)
    if not config.enabled:
        return config, {}
    if not file.is_file():
        raise ValueError(f"{folder} has a {settings.name} but no {file.name}")
    safetensors = require("safetensors", "loading the projector")
    try:
        weights: dict[str, torch.Tensor] = require("safetensors.torch", "loading the projector").load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    check_weights(weights, str(file), projector_class(config))
    return config, weights


def check_weights(weights: dict[str, torch.Tensor], source: str, kind: type[Projector]) -> tuple[int, ...]:
    """The sizes of the ``kind`` of projector that ``weights`` are of; ValueError naming ``source`` for any other."""
    named = weights if isinstance(weights, Mapping) else {}
    tensors = {name: tensor for name, tensor in named.items() if isinstance(tensor, torch.Tensor)}
    sizes = kind.sizes_in(tensors) if len(tensors) == len(named) else None
    if sizes is None:
        shapes = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in named.items()}
        raise ValueError(f"{source} does not hold a projector's weights ({kind.KEYS}): {shapes}")
    return sizes


def _ways(sizes: tuple[int, ...]) -> str:
    hidden, features, *kernel = sizes
    return f"from {hidden} to {features}" + "".join(f" by a kernel of {size}" for size in kernel)
