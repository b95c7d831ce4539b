"""Loads the C++/CUDA extension, which gives the package's operators their kernels for CPU and CUDA tensors.

Without it, or without one of its halves, the operators run in PyTorch. ``CREPA_KERNELS_EXTENSION=0`` in the environment
leaves it out on purpose.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
from collections.abc import Iterable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parents[1]  # where the halves are built
NOT_ASKED = "there is no GPU, or CUDA is not initialized yet"
_NO_KERNELS = "the extension has no kernels for this device"
missing: dict[str, str] = {}  # half -> why its kernels do not run
# Processors with the GPU inside, whose machine code is of no other card and no other's is theirs.
_INTEGRATED = (53, 62, 72, 87, 101)

Capability = tuple[int, int]


def runs_on(target: str, card: Capability) -> bool:
    """Whether code for ``target`` (``sm_90``, ``sm_90a``, or ``compute_90``: PTX) runs on a card.

    Machine code runs within its major version, PTX on every card that is not older, ``a`` on that card alone.
    """
    kind, number = target.split("_")
    code, here = int(number.rstrip("af")), 10 * card[0] + card[1]
    if number.endswith("a") or (kind == "sm" and (code in _INTEGRATED or here in _INTEGRATED)):
        return code == here
    return here >= code and ((kind == "compute" and not number.endswith("f")) or here // 10 == code // 10)


def why_not_on(targets: list[str], cuda: int, cards: Iterable[Capability], driver: int) -> str | None:
    """Why a binary for ``targets``, compiled by CUDA ``cuda``, does not run on all ``cards``; None if it does.

    ``cuda`` and ``driver`` are versions as CUDA writes them, 13010 for 13.1. A driver runs machine code of its own
    major version of CUDA and of older ones; PTX it must compile, so that is not to be newer at all.
    """
    if driver // 1000 < cuda // 1000:
        return f"it was built by CUDA {cuda // 1000}, and the GPU's driver is of CUDA {driver // 1000}"
    usable = [target for target in targets if target.startswith("sm_") or cuda <= driver]
    for card in cards:
        if not any(runs_on(target, card) for target in usable):
            return f"it was built for {' '.join(usable)}, not for a GPU of compute capability {card[0]}.{card[1]}"
    return None


def built_for(binary: Path) -> tuple[list[str], int]:
    """Targets of the CUDA half, and the version of CUDA that compiled it: the mark of csrc/cuda/operators.cu."""
    mark = re.search(rb"crepa_kernels built for ([\w+]+) by CUDA (\d+)", binary.read_bytes())
    if mark is None:
        raise OSError("it does not say for which GPUs it was built")
    return mark.group(1).decode().split("+"), int(mark.group(2))


def usable_cards() -> list[Capability]:
    """The visible GPUs, less those that this torch itself cannot use."""
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    theirs = torch.cuda.get_arch_list()
    return sorted(card for card in found if any(runs_on(target, card) for target in theirs))


def driver_version() -> int:
    """The newest CUDA that the GPU's driver knows, 13010 for 13.1."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def register(half: str, *, ask_cards: bool = False) -> str | None:
    """Loads ``crepa_kernels/_<half>``, which registers its kernels; why that was not done, or None.

    With ``ask_cards`` the GPUs of this process decide first whether it is loaded.
    """
    if os.environ.get("CREPA_KERNELS_EXTENSION") == "0":
        return "CREPA_KERNELS_EXTENSION is 0"
    if half == "cuda" and torch.version.cuda is None:
        return "torch is built without CUDA"
    built = [path for suffix in EXTENSION_SUFFIXES if (path := FOLDER / f"_{half}{suffix}").exists()]
    if not built:
        return "it was not built: `pip install --no-build-isolation -v .` says why"
    try:
        reason = why_not_on(*built_for(built[0]), usable_cards(), driver_version()) if ask_cards else None
        if reason is None:
            torch.ops.load_library(str(built[0]))
        return reason
    except OSError as error:
        return f"{built[0].name} does not load: {error}"


def load() -> None:
    """Registers what was built; called once, after the operators' schemas are defined.

    The CUDA half waits until CUDA is initialized, which is before the first CUDA tensor: its kernels are for the CUDA
    tensors of all cards, so the cards are asked first, and to ask them initializes CUDA, after which a process cannot
    fork.
    """
    if (reason := register("cpu")) is not None:
        missing["cpu"] = reason
    missing["cuda"] = NOT_ASKED
    if torch.version.cuda is None:
        register_for_cards()
    else:
        torch.cuda._lazy_call(register_for_cards)


def register_for_cards() -> None:
    """Registers the CUDA half if it is for the GPUs of this machine; else ``why_no_extension`` says why not."""
    # torch gives up CUDA where what it calls here raises.
    try:
        reason = register("cuda", ask_cards=True)
    except Exception as error:
        reason = f"the GPUs cannot be asked: {error}"
    if reason is None:
        del missing["cuda"]
    else:
        missing["cuda"] = reason


def why_no_extension(device_type: str) -> str | None:
    """Why the extension's kernels do not run for tensors on ``device_type``; asked for CUDA, it initializes CUDA."""
    if device_type == "cuda" and missing.get("cuda") is NOT_ASKED and torch.cuda.is_available():
        torch.cuda.init()
    return missing.get(device_type) if device_type in ("cpu", "cuda") else _NO_KERNELS


def has_extension(device_type: str) -> bool:
    """Whether the extension's kernels run for tensors on ``device_type``; asked for CUDA, it initializes CUDA."""
    return why_no_extension(device_type) is None


@cache
def log_fallback(device_type: str) -> None:
    """Says once that, and why, PyTorch does the extension's work for tensors on ``device_type``."""
    logger.info(
        "token resampling on %s runs in PyTorch, not in the C++/CUDA extension: %s",
        device_type, why_no_extension(device_type),
    )  # fmt: skip
