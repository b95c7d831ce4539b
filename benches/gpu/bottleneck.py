"""Which part of a step is furthest above what it must take: the next thing to make faster.

What a launch must take is the larger of its bytes at the copy rate and its matrix operations at the best matrix rate;
``crepa_kernels.backends.triton.launch.recorded`` lists both for every launch of a call.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crepa_kernels.backends.triton.launch import Launch

PRODUCTS, OTHERS, GAPS = "vendor products", "other kernels", "between kernels"
# Of the vendors' libraries: cuBLAS, CUTLASS and its own generator's, hipBLASLt, Tensile.
_PRODUCT = re.compile(r"gemm|cutlass|nvjet|xmma|cublas|splitk|Cijk", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """One kind of kernel: milliseconds of a step that it took, that it had to take, and what bounds it."""

    name: str
    measured_ms: float
    floor_ms: float
    bound: str

    @property
    def excess_ms(self) -> float:
        return self.measured_ms - self.floor_ms

    def __str__(self) -> str:
        over = f"{self.excess_ms:.3f} ms above its {self.bound} floor of {self.floor_ms:.3f}"
        return f"{self.name}: {self.measured_ms:.3f} ms, {over}"


def parts_of(
    launches: Sequence[Launch], kernel_ms: Mapping[str, float], step_ms: float, copy_rate: float, matrix_rate: float
) -> list[Part]:
    """The parts of a step, the one furthest above its floor first.

    Args:
        launches: all of the step's.
        kernel_ms: milliseconds of a step by the name of the GPU's kernel.
        step_ms: milliseconds of the step; what no kernel took of it is a part as well.
        copy_rate: bytes a second.
        matrix_rate: operations a second.
    """
    measured: dict[str, float] = {}
    names = {_function(launch): launch.name for launch in launches}
    for kernel, milliseconds in kernel_ms.items():
        part = next((name for function, name in names.items() if re.search(rf"\b{function}\b", kernel)), None)
        part = part or (PRODUCTS if _PRODUCT.search(kernel) else OTHERS)
        measured[part] = measured.get(part, 0.0) + milliseconds
    gap = step_ms - sum(kernel_ms.values())
    if gap > 0:
        measured[GAPS] = gap
    floors: dict[str, list[float]] = {}
    for launch in launches:
        vendor = launch.kernel is None and launch.operations > 0
        times = floors.setdefault(PRODUCTS if vendor else launch.name, [0.0, 0.0])
        memory, matrix = (launch.read + launch.written) / copy_rate, launch.operations / matrix_rate
        times[memory < matrix] += 1e3 * max(memory, matrix)
    found = []
    for name, milliseconds in measured.items():
        memory, matrix = floors.get(name, (0.0, 0.0))
        found.append(Part(name, milliseconds, memory + matrix, "matrix" if matrix > memory else "memory"))
    return sorted(found, key=lambda part: part.excess_ms, reverse=True)


def _function(launch: Launch) -> str:
    """As the profiler names it: a Triton kernel's Python function, or the extension's C++ kernel."""
    if launch.kernel is not None:
        return str(launch.kernel.__name__)
    return f"{launch.name}_kernel" if launch.operations == 0 else PRODUCTS
