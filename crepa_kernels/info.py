"""What runs here: versions, devices, backends and why one is off, and the tile choices in use.

python -m crepa_kernels.info
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator

import torch

from . import __version__
from .loss import available_backends
from .ops.extension import why_no_extension
from .shape_classes import SHAPE_CLASSES
from .triton_backend import interpreting, why_no_triton, why_not_triton_for


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
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"compute capability {properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
        yield f"cuda:{index} {properties.name}, {capability}, {memory}"


def backends() -> Iterator[str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in ("reference", "torch", "triton"):
        if name in available_backends():
            off = why_not_triton_for(device, torch.bfloat16) if name == "triton" else None
            yield f"{name}: {'on' if off is None else f'off: {off}'}"
        else:
            yield f"{name}: off: {why_no_triton()}"


def extension() -> Iterator[str]:
    for half in ("cpu", "cuda"):
        yield f"{half}: {'on' if (reason := why_no_extension(half)) is None else f'off: {reason}'}"


def tile_choices() -> Iterator[str]:
    """One line a shape class and GPU; the interpreter's only choice on a CPU."""
    if why_no_triton() is not None:
        return
    from .triton.tiles import choice_source, choose

    places = [torch.device("cpu")] if interpreting() else []
    places += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in places:
        yield f"{device}: {choice_source(device)}"
        for shape in SHAPE_CLASSES:
            choice = choose(device, shape.hidden_size, shape.feature_size, torch.bfloat16)
            yield f"  {shape.name}: {choice}"


def main() -> int:
    for title, lines in (
        ("versions", versions()), ("devices", devices()), ("backends", backends()),
        ("C++/CUDA extension", extension()), ("tiles (bfloat16)", tile_choices())
    ):  # fmt: skip
        print(title)
        for line in lines:
            print(f"  {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
