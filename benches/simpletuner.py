"""SimpleTuner's own CREPA to measure against: one module of its published wheel is imported, nothing copied."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

VERSION = "4.10.1"
PARENTS = ("simpletuner", "simpletuner.helpers", "simpletuner.helpers.training")


def wheel(folder: Path) -> Path:
    """The wheel in ``folder``, downloaded by its name where it is not there.

    Raises:
        RuntimeError: if it cannot be had, with the last line of pip's reason.
    """
    path = folder / f"simpletuner-{VERSION}-py3-none-any.whl"
    if not path.exists():
        # Beside it first: two processes may be at it. It asks for a newer Python; what is used needs torch alone.
        with tempfile.TemporaryDirectory(dir=folder) as made:
            options = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version=3.12", f"--dest={made}"]
            command = [sys.executable, "-m", "pip", "download", *options, f"simpletuner=={VERSION}"]
            ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if ran.returncode:
                said = ran.stderr.strip().splitlines() or ["pip gave no reason"]
                raise RuntimeError(f"SimpleTuner {VERSION} cannot be downloaded: {said[-1]}")
            (Path(made) / path.name).replace(path)
    return path


def module(path: Path) -> ModuleType:
    """The module of ``CrepaRegularizer`` in the wheel at ``path``, without the packages around it, which need more."""
    for name in PARENTS:
        package = ModuleType(name)
        package.__path__ = [f"{path}/{name.replace('.', '/')}"]
        sys.modules.setdefault(name, package)
    return importlib.import_module("simpletuner.helpers.training.crepa")


def regularizer(
    theirs: ModuleType,
    projector: nn.Module,
    hidden_size: int,
    configuration: dict[str, Any] | None = None,
    **attributes: Any,
) -> Any:
    """A ``CrepaRegularizer`` whose teacher features are given, with ``attributes`` set on it.

    Args:
        theirs: the module.
        projector: in place of the one that attaching to a transformer would make.
        hidden_size: D.
        configuration: SimpleTuner's options, ``crepa_*``.
    """
    accelerator = SimpleNamespace(device=torch.device("cpu"), is_main_process=True)
    config = SimpleNamespace(crepa_enabled=True, **(configuration or {}))
    made = theirs.CrepaRegularizer(config, accelerator, hidden_size, max_train_steps=100)
    for name, value in {"projector": projector, "uses_internal_teacher_features": True, **attributes}.items():
        setattr(made, name, value)
    return made


def give_features(crepa: Any, frames: int, encoder: Any) -> None:
    """Makes ``crepa`` decode to ``frames`` frames, each filled with its number, that ``encoder`` takes to features."""

    def decode(latents: torch.Tensor, vae: object) -> torch.Tensor:
        height, width = (8 * size for size in latents.shape[-2:])
        numbers = torch.arange(frames, dtype=torch.float32).view(1, -1, 1, 1, 1)
        return numbers.expand(len(latents), frames, 3, height, width)

    crepa.uses_internal_teacher_features = False
    crepa._decode_latents_unified = decode
    crepa._encode_frames = encoder
