"""The one place where kernels and vendor products are launched, so that launches can be recorded instead.

``recorded()`` collects what a call would launch, with its arguments, operations and bytes: the ahead-of-time tests
compile exactly that, from meta tensors, and the accounting adds it up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret

# The interpreter truncates fp32 to bf16 where devices round to the nearest.
_TRUNCATES = tl.constexpr(INTERPRETED)

Result = TypeVar("Result")
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Launch:
    """One launch: a Triton kernel (``kernel`` is None for a product or an operator), its arguments and what it moves.

    ``operations`` counts those of matrix products only; ``read`` and ``written`` are the bytes that must move, each
    tensor once, whatever the caches do with second reads.
    """

    name: str
    operations: int
    read: int
    written: int
    kernel: Any = None
    grid: tuple[int, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 1


class Cost(NamedTuple):
    """What a launch reads and writes (tensors or bytes) and its matrix operations."""

    read: tuple[torch.Tensor | int, ...]
    written: tuple[torch.Tensor | int, ...]
    operations: int = 0


_recording: list[Launch] | None = None


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, launches are listed and not carried out, operators aside; results hold whatever their memory held."""
    global _recording
    outer, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = outer


def _bytes(parts: tuple[torch.Tensor | int, ...]) -> int:
    return sum(part if isinstance(part, int) else part.numel() * part.element_size() for part in parts)


def launch(
    name: str,
    kernel: Any,
    grid: tuple[int, ...],
    cost: Cost,
    *,
    warps: int = 4,
    stages: int = 1,
    **arguments: Any,
) -> None:
    """Launches ``kernel`` over ``grid``; every argument by its name."""
    if _recording is None:
        kernel[grid](**arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=True)
        return
    moved = _bytes(cost.read), _bytes(cost.written)
    _recording.append(Launch(name, cost.operations, *moved, kernel, grid, arguments, warps, stages))


@contextmanager
def tf32_products() -> Iterator[None]:
    """Inside, the vendor library multiplies fp32 in TF32."""
    matmul = torch.backends.cuda.matmul
    if (before := matmul.fp32_precision) == "tf32":
        yield
        return
    # PyTorch has two switches, and stops where they disagree: this turns both.
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


# Rows of a fp32 copy where the vendor library has no product of 16-bit numbers that is written in fp32.
WIDE_ROWS = 4096


@cache
def _widens(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the vendor library multiplies ``dtype`` into fp32 there. Asked of it: ROCm's depends on the release."""
    if device_type == "meta":
        return True  # stands for a GPU
    small = torch.zeros((16, 16), dtype=dtype, device=device_type)
    try:
        torch.mm(small, small, out_dtype=torch.float32)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True


def product(
    name: str,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    to_fp32: bool = False,
    tf32: bool = False,
    out: torch.Tensor | None = None,
    add: bool = False,
) -> torch.Tensor:
    """The vendor library's ``a @ b`` in their type (into ``out``), or with ``to_fp32`` in fp32 from exact products.

    ``tf32``: fp32 operands are rounded to 10 bits where the device has matrix units for that. ``add``: on top of what
    ``out`` holds.
    """
    rows, inner, columns = a.shape[0], a.shape[1], b.shape[1]
    copied = to_fp32 and a.dtype != torch.float32 and not _widens(a.device.type, a.dtype)
    if _recording is not None:
        if out is None:
            out = a.new_empty((rows, columns), dtype=torch.float32 if to_fp32 else None)
        copies = 4 * inner * (rows + columns) if copied else 0
        again = _bytes((out,)) * (-(-inner // WIDE_ROWS) - 1 if copied else int(add))
        moved = _bytes((a, b)) + copies + again, _bytes((out,)) + copies + (again if copied else 0)
        _recording.append(Launch(name, 2 * rows * inner * columns, *moved))
        return out
    if tf32 and a.is_cuda:
        with tf32_products():
            return torch.mm(a, b, out=out)
    if add and out is not None:
        return out.addmm_(a, b)
    if not to_fp32 or a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if not copied:
        return torch.mm(a, b, out_dtype=torch.float32)
    out = a.new_empty((rows, columns), dtype=torch.float32)
    for index, (left, right) in enumerate(zip(a.split(WIDE_ROWS, dim=1), b.split(WIDE_ROWS), strict=True)):
        out.addmm_(left.float(), right.float(), beta=min(index, 1))
    return out


def operator(name: str, cost: Cost, call: Callable[[], Result]) -> Result:
    """``call()`` of an operator that is no kernel of this package's Triton half."""
    if _recording is not None:
        _recording.append(Launch(name, cost.operations, _bytes(cost.read), _bytes(cost.written)))
    return call()


@triton.jit
def narrowed(values, KIND: tl.constexpr):
    """fp32 values rounded to the nearest of ``KIND``."""
    if _TRUNCATES and KIND == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        values = (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).to(tl.float32, bitcast=True)
    return values.to(KIND)


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """Type that tl.dot takes its operands in; the interpreter has no 16-bit products."""
    return tl.float32 if INTERPRETED else _TYPES[dtype]


def split_width(width: int) -> tuple[int, int]:
    """A row of ``width`` as two blocks of powers of two: the largest that fits, and one that covers the rest."""
    low = 1 << (width.bit_length() - 1)
    return low, power_of_2(width - low) if width > low else 0


# Triton's own wrap each call for use inside kernels, which takes longer than a launch's other arguments together.
def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(number: int) -> int:
    """The least that is not below ``number``."""
    return 1 << (number - 1).bit_length()
