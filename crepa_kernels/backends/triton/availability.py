"""Where the Triton kernels can run, as far as that is known without running one. Triton is not imported for it."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

from ...ops.compiling import constant_when_compiled
from .call import TYPES

LEAST_CAPABILITY = (8, 0)
_INTERPRETER = "TRITON_INTERPRET"


def interpreting() -> bool:
    """Whether Triton is asked to run its kernels in Python on a CPU."""
    return os.environ.get(_INTERPRETER, "0").lower() in ("1", "true", "on", "y", "yes")


def cuda_devices() -> list[torch.device]:
    """The CUDA or ROCm GPUs of this machine."""
    return [
        torch.device("cuda", index) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]


@cache
def _why_not_on(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install crepa-kernels[triton]"
    if device.type == "cpu" and interpreting():
        return None
    if not interpreting() and not torch.cuda.is_available():
        return f"no CUDA or ROCm GPU was found, and {_INTERPRETER}=1 is not set"
    if device.type != "cuda":
        return f"the hidden states are on {device.type}"
    if interpreting() or torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"compute capability {capability} of {device} is below {LEAST_CAPABILITY}"
    return None


def forget_devices() -> None:
    """Asks again at the next call what runs where."""
    _why_not_on.cache_clear()


@constant_when_compiled
def why_no_triton() -> str | None:
    """Why the ``triton`` backend cannot run on any device of this machine; None if it can."""
    places = [torch.device("cpu")] if interpreting() else cuda_devices()
    reasons = [_why_not_on(device) for device in places or [torch.device("cpu")]]
    return None if None in reasons else reasons[0]


@constant_when_compiled
def why_not_triton_for(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why the ``triton`` backend cannot take hidden states of ``dtype`` on ``device``; None if it can.

    ``"cuda"`` without an index is the current device.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if (reason := _why_not_on(device)) is not None:
        return reason
    return None if dtype in TYPES else f"its kernels take {', '.join(map(str, TYPES))}, not {dtype}"
