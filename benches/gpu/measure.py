"""What is measured on the current GPU beside times, and what machine it is; ``Dry`` takes its place without one."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benches.shapes import Shape
from crepa_kernels.backends.triton.clock import Clock, Step, Times
from crepa_kernels.shapes import ShapeClass

ROOT = Path(__file__).parents[2]
NAN = float("nan")


class Gpu(Clock):
    """The current CUDA or ROCm device."""

    dry = False

    @contextmanager
    def launching(self) -> Iterator[None]:
        """Kernels are launched inside."""
        yield

    def shape(self, shape: Shape) -> Shape:
        """What is measured in place of ``shape``."""
        return shape

    def shape_class(self, shape: ShapeClass) -> ShapeClass:
        return shape

    def tile_facts(self) -> tuple[str, int, bool]:
        """Name, bytes of shared memory that a block may take, and whether it is an AMD card."""
        from crepa_kernels.backends.triton.tiles import device_shared_memory

        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return properties.name, device_shared_memory(properties), torch.version.hip is not None

    def free(self) -> None:
        """Gives back what no tensor holds, for the next call to be measured alone."""
        self.wait()
        torch.cuda.empty_cache()

    def compiled(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        torch.compiler.reset()
        return torch.compile(function, fullgraph=True)

    def extra_memory(self, step: Step) -> int:
        """Most bytes allocated at once during ``step``, beyond what was there before it."""
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def copy_rate(self) -> float:
        """Bytes read and written a second by a copy of 2 GiB on the device (an eighth of its memory if less)."""
        size = min(2 * 2**30, torch.cuda.get_device_properties(0).total_memory // 8)
        source = torch.ones(size, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / (self.timed(lambda: target.copy_(source)).median * 1e-3)

    def matrix_rate(self) -> float:
        """Operations a second of the vendor's best bf16 product of normal numbers, 8192 cubed."""
        a, b = (torch.randn(8192, 8192, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        return 2 * 8192**3 / (self.timed(lambda: a @ b).median * 1e-3)

    def kernel_times(self, step: Step, repeats: int = 5) -> dict[str, float]:
        """Milliseconds a call of ``step`` spends in each GPU kernel, by its name."""
        from torch.profiler import ProfilerActivity, profile

        step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in range(repeats):
                step()
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for event in recorded.key_averages():
            if event.device_time_total > 0:
                found[event.key] = event.device_time_total / 1e3 / repeats
        return found


class Dry(Gpu):
    """No GPU: everything runs on a CPU at tiny sizes, launches are listed and not carried out, all times are NaN.

    That shows that the Python of a first run on a GPU holds, and nothing else. Needs ``TRITON_INTERPRET=1``.
    """

    dry = True
    device = "cpu"

    @contextmanager
    def launching(self) -> Iterator[None]:
        from crepa_kernels.backends.triton.launch import recorded

        with recorded():
            yield

    def shape(self, shape: Shape) -> Shape:
        students, teachers = ((max(1, h // 8), max(1, w // 8)) for h, w in (shape.student_grid, shape.teacher_grid))
        return replace(
            shape, hidden_size=64, feature_size=32, frames=3, student_grid=students, teacher_grid=teachers
        )  # fmt: skip

    def shape_class(self, shape: ShapeClass) -> ShapeClass:
        return replace(shape, hidden_size=64, feature_size=32, frames=3, tokens=6)

    def tile_facts(self) -> tuple[str, int, bool]:
        return "dry", 227 * 1024, torch.version.hip is not None

    def wait(self) -> None:
        pass

    def free(self) -> None:
        pass

    def compiled(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        torch.compiler.reset()
        return torch.compile(function, fullgraph=True, backend="eager")

    def graphed(self, step: Step) -> Step:
        with self.launching():
            step()
        return step

    def interleaved(self, steps: Any, repeats: int = 25, warmup: int = 5) -> dict[str, Times]:
        with self.launching():
            for step in steps.values():
                step()
        return {name: Times(NAN, NAN, NAN) for name in steps}

    def extra_memory(self, step: Step) -> int:
        with self.launching():
            step()
        return 0

    def copy_rate(self) -> float:
        return NAN

    def matrix_rate(self) -> float:
        return NAN

    def kernel_times(self, step: Step, repeats: int = 5) -> dict[str, float]:
        from crepa_kernels.backends.triton.launch import recorded

        with recorded() as launches:
            step()
        return {launch.kernel.__name__: NAN for launch in launches if launch.kernel is not None}


def machine(gpu: Gpu) -> dict[str, Any]:
    """Device, versions, commit and sources, for the head of a result file."""
    import triton

    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    return {
        "device": "dry: nothing was launched" if gpu.dry else torch.cuda.get_device_name(),
        "runtime": runtime,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "sources": sources(),
    }


def commit() -> str:
    """Of the checkout; where there is none, ``CREPA_COMMIT`` of the environment."""
    if (ROOT / ".git").exists():
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        try:
            found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            found = ""
        if found:
            return found
    return os.environ.get("CREPA_COMMIT") or "unknown"


@cache
def sources() -> str:
    """Twelve digits that change with the package's files, its built extension and its tiles among them."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "crepa_kernels").rglob("*")):
        if path.suffix in (".py", ".json", ".so"):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
