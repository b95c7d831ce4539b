"""Loads the C++/CUDA extension, which gives the package's operators their kernels for CPU and CUDA tensors.

Without it, or without one of its halves, the operators run in PyTorch. ``CREPA_KERNELS_EXTENSION=0`` in the environment
leaves it out on purpose.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parents[1]
_missing: dict[str, str] = {}  # half -> why it is not loaded


def _load(half: str) -> str | None:
    """Loads ``crepa_kernels/_<half>``; why that failed, or None."""
    if os.environ.get("CREPA_KERNELS_EXTENSION") == "0":
        return "CREPA_KERNELS_EXTENSION is 0"
    if half == "cuda" and torch.version.cuda is None:
        return "torch is built without CUDA"
    built = [path for suffix in EXTENSION_SUFFIXES if (path := _PACKAGE / f"_{half}{suffix}").exists()]
    if not built:
        return "it was not built: `pip install --no-build-isolation -v .` says why"
    try:
        torch.ops.load_library(str(built[0]))
    except OSError as error:
        return f"{built[0].name} does not load: {error}"
    return None


def load() -> None:
    """Registers what was built; called once, after the operators' schemas are defined."""
    for half in ("cpu", "cuda"):
        if (reason := _load(half)) is not None:
            _missing[half] = reason


def has_extension(device_type: str) -> bool:
    """Whether the extension's kernels run for tensors on ``device_type``."""
    return device_type in ("cpu", "cuda") and device_type not in _missing


@cache
def log_fallback(device_type: str) -> None:
    """Says once that, and why, PyTorch does the extension's work for tensors on ``device_type``."""
    reason = _missing.get(device_type, "the extension has no kernels for this device")
    logger.info("token resampling on %s runs in PyTorch, not in the C++/CUDA extension: %s", device_type, reason)
