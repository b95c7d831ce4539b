"""What is wrong in a CUDA kernel is found on a CPU: in kernels made for it, and in ours with a mistake in them."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import cuda_on_cpu
import pytest
import test_cuda_on_cpu as kernels
import torch

pytestmark = [
    pytest.mark.skipif(cuda_on_cpu.compiler() is None, reason="there is no C++ compiler"),
    pytest.mark.usefixtures("one_thread", "nan_in_new_memory"),
]

# In the order of faults.cu.
FAULTS = {
    "nothing": "^$",
    "not written": "thread 4 reads 4 bytes of shared memory at 20, which nothing has written",
    "no barrier": "reads 4 bytes of shared memory at .*, which (nothing has written|.* with no barrier in between)",
    "written while others read": "writes 4 bytes of shared memory .* another thread reads with no barrier in between",
    "beyond shared memory": "thread 63 writes 4 bytes of shared memory at 256, beyond the 256 it asked for",
    "beyond an array in shared memory": "thread 32 writes 4 bytes of shared memory at .*, beyond",
    "beyond a tensor": "thread 63 writes 4 bytes at 256 of a tensor of 256, which it may not",
    "an input": "writes 4 bytes at .* of a tensor of 256 that is only read",
    "not aligned": "writes 8 bytes at 4 of a tensor of 256, an address that is no multiple",
    "barriers in two branches": "thread 0 waits at a barrier in line 32, thread 32 waits at a barrier in line 34",
    "a barrier that one thread does not reach": "thread 0 waits at a barrier in line 34, thread 63 has left",
    "a shuffle of half a warp": "thread 0 waits at a shuffle in line 37, thread 16 waits at a barrier in line 40",
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = cuda_on_cpu.build([cuda_on_cpu.HERE / "faults.cu"], tmp_path_factory.mktemp("faults"), "faults")
    found = ctypes.CDLL(str(library))
    found.fault.restype, found.fault.argtypes = ctypes.c_char_p, [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_in_a_kernel_is_found(faults: ctypes.CDLL, fault: str) -> None:
    taken, given = torch.arange(64.0), torch.full((64,), torch.nan)
    for _ in range(2):  # threads from the first, threads from the last
        found = faults.fault(list(FAULTS).index(fault), taken.data_ptr(), given.data_ptr()).decode()
        assert re.search(FAULTS[fault], found)
    if fault == "nothing":
        assert torch.equal(given, taken.view(32, 2).flip(1).flatten())


# What says so, the file, what is right in it, and what is put there.
NORM, GATHER, RESAMPLE = "cuda/layer_norm.cu", "cuda/gather.cuh", "cuda/resample.cu"
NO_BARRIER, BEYOND, NUMBERS = "nothing has written|no barrier in between", "beyond|may not", "^$|^assert"
MISTAKES = {
    "windows end early": (NO_BARRIER, "geometry.h", "? count : end}", "? count : end - 1}"),
    "windows begin early": (NO_BARRIER, "geometry.h", "- reach, step) + 1", "- reach, step)"),
    "no barrier after tables": (NO_BARRIER, RESAMPLE, "  __syncthreads();\n", ""),
    "no barrier before slots are written": (NO_BARRIER, NORM, "__syncthreads();  // the line before", "//"),
    "no barrier after slots are written": (NO_BARRIER, NORM, "    __syncthreads();\n    for (int i", "    for (int i"),
    "no barrier in a block's sum": (NO_BARRIER, NORM, "  __syncthreads();\n  a = b = A(0);", "  a = b = A(0);"),
    "one scratch for every sum": (NO_BARRIER, NORM, "scratch[x % 2]", "scratch[0]"),
    "a slot too few": (NO_BARRIER, NORM, "v.most * stripe + column", "(v.most - 1) * stripe + column"),
    "slots of another line": (NO_BARRIER, NORM, "line % v.most * stripe - left", "(line + 1) % v.most * stripe - left"),
    "a sum of half a warp": (NUMBERS, NORM, "offset = 16", "offset = 8"),
    "a sum of half a block": (NUMBERS, NORM, "i < warps", "i < (warps + 1) / 2"),
    "no scale": (NUMBERS, NORM, "task.scale ? *static_cast<const A*>(task.scale) : A(1)", "A(1)"),
    "forward reads what is outside the loss": (NUMBERS, NORM, "if (task.in_loss && ", "if (false && "),
    "backward reads what is outside the loss": (NUMBERS, NORM, "outside = task.in_loss && ", "outside = false && "),
    "shared memory is too small": (BEYOND, NORM, "stripe * sizeof(int) + 16", "(stripe - 8) * sizeof(int) + 16"),
    "no room for what a kernel declares": ("in a block that needs", "cuda/launch.h", "47 << 10", "48 << 10"),
    "tables are too small": (BEYOND, GATHER, "gather.most() * sizeof(A)) +", "(gather.most() - 1) * sizeof(A)) +"),
    "a row too few": (NUMBERS, RESAMPLE, "row < place.lines * ", "row + 1 < place.lines * "),
    "a tile goes past its line": (NO_BARRIER, GATHER, "min(task.columns, task.width_to - x)", "task.columns"),
    "a held pack too few": (NUMBERS, NORM, "slot < kHeld;", "slot < (kHeld + 1) / 2;"),
    "more threads than packs": (BEYOND, NORM, "if (pack >= packs) break;", ""),
    "more threads than launch bounds": (
        "launch bounds",
        NORM,
        "__launch_bounds__(512, 1)",
        "__launch_bounds__(256, 1)",
    ),
    "every row passes for aligned": (NUMBERS, "cuda/operators.cu", "aligned = aligned && whole;", ""),
}


def try_everything(operators: Any) -> None:
    for dtype, antialias in itertools.product(kernels.TYPES, (True, False)):
        for pair in (((13, 9), (4, 2)), ((5, 7), (9, 3)), ((30, 52), (16, 16))):
            kernels.test_the_numbers_are_exact(operators, pair, antialias, dtype)
        for channels in (19, 64):
            kernels.test_frames_outside_the_loss_are_not_read(operators, channels, antialias, dtype)
        for packs in (1025, 2049):
            kernels.test_rows_that_each_kernel_of_the_backward_pass_holds(operators, packs, dtype)
        kernels.test_strided_tokens_and_gradients(operators, dtype)
    kernels.test_weights_that_do_not_fit_are_an_error(operators)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_our_kernels_is_found(mistake: str, tmp_path: Path) -> None:
    found, file, right, wrong = MISTAKES[mistake]
    csrc = shutil.copytree(cuda_on_cpu.CSRC, tmp_path / "csrc")
    code = (csrc / file).read_text()
    assert right in code
    (csrc / file).write_text(code.replace(right, wrong))
    operators = cuda_on_cpu.load(tmp_path / "built", "with_" + re.sub(r"\W", "_", mistake), csrc)
    with pytest.raises((AssertionError, RuntimeError), match=found):
        try_everything(operators)
