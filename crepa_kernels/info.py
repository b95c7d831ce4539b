"""What runs here: versions, devices, backends and why one is off, the kernels' self-check, and the tile choices in use.

python -m crepa_kernels.info
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import time
from collections.abc import Iterator

import torch

from . import __version__
from .backends.triton.availability import cuda_devices, interpreting, why_no_triton, why_not_triton_for
from .backends.triton.self_check import self_check
from .loss import requested_backend
from .ops.extension import why_no_extension
from .shapes import SHAPE_CLASSES


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> Iterator[str]:
    yield f"crepa-kernels {__version__}"
    yield f"python {platform.python_version()}, {platform.system()} {platform.machine()}"
    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    yield f"torch {torch.__version__}, {runtime if torch.version.cuda or torch.version.hip else 'CPU only'}"
    yield f"triton {_version('triton')}"


def devices() -> Iterator[str]:
    if not torch.cuda.is_available():
        yield "no CUDA or ROCm GPU"
    for device in cuda_devices():
        properties = torch.cuda.get_device_properties(device)
        capability = f"compute capability {properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
        yield f"{device} {properties.name}, {capability}, {memory}"


def places() -> list[torch.device]:
    """Where kernels run: the interpreter on a CPU, and the GPUs."""
    return [torch.device("cpu")] * interpreting() + cuda_devices()


def backends() -> Iterator[str]:
    for name in ("reference", "torch"):
        yield f"{name}: on"
    reasons = {device: why_not_triton_for(device, torch.bfloat16) for device in places()}
    if len(set(reasons.values())) <= 1:
        reason = next(iter(reasons.values()), why_no_triton())
        yield f"triton: {'on' if reason is None else f'off: {reason}'}"
    else:
        for device, reason in reasons.items():
            yield f"triton on {device}: {'on' if reason is None else f'off: {reason}'}"
    if (forced := requested_backend("auto")) != "auto":
        yield f"CREPA_BACKEND={forced} overrides what calls ask for"


def self_checks() -> Iterator[str]:
    """What ``auto`` would find at the first call of a usual size; on a CPU, interpreted, of a small one."""
    checked = [device for device in places() if why_not_triton_for(device, torch.bfloat16) is None]
    if not checked:
        yield "not run: triton is off"
    for device in checked:
        widths = (32, 16) if interpreting() else (SHAPE_CLASSES[0].hidden_size, SHAPE_CLASSES[0].feature_size)
        start = time.perf_counter()
        reason = self_check(device, torch.bfloat16, *widths)
        found = "the kernels agree with 'torch'" if reason is None else f"'auto' takes 'torch': {reason}"
        took = time.perf_counter() - start
        yield f"{device}: {found} (bfloat16, widths {widths[0]} and {widths[1]}, compiled and run in {took:.1f} s)"


def extension() -> Iterator[str]:
    for half in ("cpu", "cuda"):
        yield f"{half}: {'on' if (reason := why_no_extension(half)) is None else f'off: {reason}'}"


def tile_choices() -> Iterator[str]:
    """One line a shape class and GPU; the interpreter's only choice on a CPU."""
    if why_no_triton() is not None:
        yield "none: triton is off"
        return
    try:
        from .backends.triton.tiles import choice_source, choose
    except Exception as error:  # what a Triton that is not supported raises when it is used
        yield f"unknown: {type(error).__name__}: {error}"
        return
    for device in places():
        yield f"{device}: {choice_source(device)}"
        for shape in SHAPE_CLASSES:
            choice = choose(device, shape.hidden_size, shape.feature_size, torch.bfloat16)
            yield f"  {shape.name}: {choice}"


def main() -> int:
    for title, lines in (
        ("versions", versions()), ("devices", devices()), ("backends", backends()), ("self-check", self_checks()),
        ("C++/CUDA extension", extension()), ("tiles (bfloat16)", tile_choices()),
    ):  # fmt: skip
        print(title)
        for line in lines:
            print(f"  {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
