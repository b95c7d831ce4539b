"""The CUDA kernels on a CPU, thread by thread: the numbers, and that no thread reads or writes what it may not."""

from __future__ import annotations

import ctypes
import itertools
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_on_cpu
import pytest
import torch
from resampling import ODD, TRAINED, assert_close, assert_exact_numbers, exact, exact_adjoint, exact_layer_norm, pair_id

import crepa_kernels.ops  # noqa: F401: defines the operators
from crepa_kernels.grid import Grid

pytestmark = [
    pytest.mark.skipif(cuda_on_cpu.compiler() is None, reason="there is no C++ compiler"),
    pytest.mark.usefixtures("one_thread", "nan_in_new_memory"),
]
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
each_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_filter = pytest.mark.parametrize("antialias", [True, False], ids=["antialias", "plain"])
EPS = 1e-5


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """What a kernel leaves out is NaN, not what the last one left there."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cuda_on_cpu.load(tmp_path_factory.mktemp("cuda_on_cpu"))


def whole_packs(dtype: torch.dtype, packs: int) -> int:
    """Channels of rows of ``packs`` times 16 bytes."""
    return packs * 16 // dtype.itemsize


@each_type
@each_filter
@pytest.mark.parametrize("pair", ODD, ids=pair_id)
def test_the_numbers_are_exact(operators: Any, pair: tuple[Grid, Grid], antialias: bool, dtype: torch.dtype) -> None:
    for channels in (7, whole_packs(dtype, 4), whole_packs(dtype, 9)):
        assert_exact_numbers(operators, pair, channels, antialias, dtype, "cpu", frames=2)


@each_type
@each_filter
def test_rows_of_one_channel_and_of_one_pack(operators: Any, antialias: bool, dtype: torch.dtype) -> None:
    geometry = ((5, 7), (3, 9), antialias)
    for channels in (1, whole_packs(dtype, 1)):
        tokens, grad = torch.randn(2, 35, channels).to(dtype), torch.randn(2, 27, channels).to(dtype)
        assert_close(operators.resample_tokens(tokens, *geometry), exact(tokens, *geometry), torch.float32)
        assert_close(operators.resample_tokens_adjoint(grad, *geometry), exact_adjoint(grad, *geometry), torch.float32)


@each_type
@each_filter
@pytest.mark.parametrize("channels", [7, 16])
def test_the_grids_that_people_train(operators: Any, channels: int, antialias: bool, dtype: torch.dtype) -> None:
    assert_exact_numbers(operators, ((30, 52), (16, 16)), channels, antialias, dtype, "cpu", frames=1)


@pytest.mark.slow
@each_type
@each_filter
@pytest.mark.parametrize("channels", [7, 64, 1536])
@pytest.mark.parametrize("pair", TRAINED, ids=pair_id)
def test_all_grids_that_people_train(
    operators: Any, pair: tuple[Grid, Grid], channels: int, antialias: bool, dtype: torch.dtype
) -> None:
    assert_exact_numbers(operators, pair, channels, antialias, dtype, "cpu", frames=1)


@each_type
@pytest.mark.parametrize("packs", [512, 513, 1024, 1025, 2048, 2049])
def test_rows_that_each_kernel_of_the_backward_pass_holds(operators: Any, packs: int, dtype: torch.dtype) -> None:
    for channels in (whole_packs(dtype, packs), packs):  # the second are rows that are not aligned, for odd numbers
        assert_exact_numbers(operators, ((2, 3), (3, 2)), channels, False, dtype, "cpu", frames=1)


@pytest.mark.slow
def test_any_grid_and_channels(operators: Any) -> None:
    draw = random.Random(0)
    for _ in range(400):
        pair = tuple((draw.randint(1, 40), draw.randint(1, 40)) for _ in range(2))
        channels = draw.choice([draw.randint(1, 40), 8 * draw.randint(1, 20)])
        assert_exact_numbers(operators, pair, channels, draw.random() < 0.5, draw.choice(TYPES), "cpu", frames=1)


def test_a_tile_is_cut_until_its_tables_fit(operators: Any) -> None:
    """Down to one column and one line where 8 columns of statistics, or of weights, would need more than 48 KB."""
    for pair in (((48, 48), (2, 3)), ((1, 1700), (1, 3)), ((1, 3), (1, 1700)), ((1500, 1), (2, 1))):
        assert_exact_numbers(operators, pair, 8, True, torch.float64, "cpu", frames=1)


def test_weights_that_do_not_fit_are_an_error(operators: Any) -> None:
    for target in range(11_500, 12_400, 20):
        tokens, statistic = torch.ones(1, 1, 4), torch.ones(1, 1)
        geometry = ((1, 1), (1, target), True)
        try:
            dh = operators.layer_norm_resample_backward(
                torch.ones(1, target, 4), tokens, statistic, statistic, *geometry
            )
        except RuntimeError as error:
            assert "others: their weights need more than 4" in str(error)  # noqa: PT017
            return
        assert dh.isfinite().all()
    pytest.fail("nothing was refused")


def strided(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Ways in which (3, 2, 35, C) lie in memory, NaN in between."""

    def cut(*shape: int, first: int = 0, channels: int = 16) -> torch.Tensor:
        around = torch.full(shape, torch.nan, dtype=dtype)
        inside = around[..., first : first + channels]
        inside.copy_(torch.randn(inside.shape, dtype=torch.float64))
        return inside

    return {
        "part of each row": cut(3, 2, 35, 32, first=8),
        "part of each row, not aligned": cut(3, 2, 35, 32, first=9),
        "rows of an odd length": cut(3, 2, 35, 17),
        "frames and batch swapped": cut(2, 3, 35, 16).transpose(0, 1),
        "some of the frames": cut(3, 6, 35, 24)[:, 1::3],
        "some of the rows": cut(3, 2, 40, 16)[:, :, 2:37],
        "channels first": cut(3, 2, 16, 35, channels=35).transpose(2, 3),
        "the same frame again": cut(1, 1, 35, 16).expand(3, 2, 35, 16),
    }


@each_type
def test_strided_tokens_and_gradients(operators: Any, dtype: torch.dtype) -> None:
    source, target = (5, 7), (7, 5)
    geometry = (source, target, True)
    torch.manual_seed(0)
    for tokens, grad in zip(strided(dtype).values(), reversed(strided(dtype).values()), strict=True):
        assert_close(operators.resample_tokens(tokens, *geometry), exact(tokens, *geometry), torch.float32)
        assert_close(operators.resample_tokens_adjoint(grad, *geometry), exact_adjoint(grad, *geometry), torch.float32)
        forward = operators.layer_norm_resample(tokens, *geometry, EPS)
        again = operators.layer_norm_resample(tokens.contiguous(), *geometry, EPS)
        channels = min(tokens.shape[-1], grad.shape[-1])
        assert_close(forward[0], exact(exact_layer_norm(tokens, EPS), *geometry), torch.float32)
        for each, other in zip(forward, again, strict=True):
            assert_close(each, other.double(), torch.float32)
        backward = (grad, tokens[..., :channels], *forward[1:], *geometry)
        dh = operators.layer_norm_resample_backward(*backward)
        copied = operators.layer_norm_resample_backward(*(each.contiguous() for each in backward[:4]), *geometry)
        assert_close(dh, copied.double(), torch.float32)


def test_more_leading_axes_than_the_kernels_know(operators: Any) -> None:
    around = torch.randn(2, 3, 2, 3, 2, 6, 8, dtype=torch.float64)
    tokens = around[:, :2].transpose(1, 3)[:, :2].transpose(0, 4)
    geometry = ((2, 3), (3, 1), True)
    assert_close(operators.resample_tokens(tokens, *geometry), exact(tokens, *geometry), torch.float64)


@each_type
@each_filter
@pytest.mark.parametrize("channels", [19, 64])
def test_frames_outside_the_loss_are_not_read(
    operators: Any, channels: int, antialias: bool, dtype: torch.dtype
) -> None:
    source, target = (5, 4), (3, 6)
    geometry = (source, target, antialias)
    torch.manual_seed(0)
    tokens, grad = (torch.randn(2, 3, rows, channels, dtype=torch.float64).to(dtype) for rows in (20, 18))
    in_loss = torch.tensor([[True, False], [False, True], [True, True]]).T  # not contiguous
    rows, mean, inverse_std = operators.layer_norm_resample(tokens, *geometry, EPS)
    scale = mean.new_full((), -1 / 3)
    dh = operators.layer_norm_resample_backward(grad, tokens, mean, inverse_std, *geometry)

    tokens[~in_loss] = grad[~in_loss] = torch.nan
    masked = operators.layer_norm_resample(tokens, *geometry, EPS, in_loss)
    # One element beyond the beginning of what is allocated: 16 bytes at a time do not go.
    around = torch.full((tokens.numel() + 2,), 7, dtype=dtype)
    for first in (0, 1):
        out = around[first : first + tokens.numel()].view(tokens.shape).fill_(torch.nan)
        operators.layer_norm_resample_backward_out(grad, tokens, *masked[1:], *geometry, out, in_loss, scale)
        for ours, unmasked in zip((*masked, out), (rows, mean, inverse_std, scale.double() * dh.double()), strict=True):
            assert_close(ours[in_loss], unmasked[in_loss].double(), mean.dtype)
            assert not ours[~in_loss].any()
    assert around[-1] == 7


# In the order of faults.cu.
FAULTS = {
    "nothing": "$",
    "not written": "thread 4 reads 4 bytes of shared memory at 20, which nothing has written",
    "no barrier": "reads 4 bytes of shared memory at .*, which (nothing has written|.* with no barrier in between)",
    "written while others read": "writes 4 bytes of shared memory .* another thread reads with no barrier in between",
    "beyond shared memory": "thread 63 writes 4 bytes of shared memory at 256, beyond the 256 it asked for",
    "beyond an array in shared memory": "thread 32 writes 4 bytes of shared memory at .*, beyond",
    "beyond a tensor": "thread 63 writes 4 bytes at 256 of a tensor of 256, which it may not",
    "an input": "writes 4 bytes at .* of a tensor of 256 that is only read",
    "not aligned": "writes 8 bytes at 4 of a tensor of 256, an address that is no multiple",
    "barriers in two branches": "thread 0 waits at a barrier in line 30, thread 32 waits at a barrier in line 32",
    "a barrier that one thread does not reach": "thread 0 waits at a barrier in line 32, thread 63 has left",
    "a shuffle of half a warp": "thread 0 waits at a shuffle in line 35, thread 16 waits at a barrier in line 38",
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = cuda_on_cpu.build([cuda_on_cpu.HERE / "faults.cu"], tmp_path_factory.mktemp("faults"), "faults")
    found = ctypes.CDLL(str(library))
    found.fault.restype, found.fault.argtypes = ctypes.c_char_p, [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    return found


@pytest.mark.parametrize(("fault", "found"), enumerate(FAULTS.values()), ids=list(FAULTS))
def test_what_is_wrong_in_a_kernel_is_found(faults: ctypes.CDLL, fault: int, found: str) -> None:
    taken, given = torch.arange(64.0), torch.full((64,), torch.nan)
    for _ in range(2):  # threads from the first, threads from the last
        assert re.search(found, faults.fault(fault, taken.data_ptr(), given.data_ptr()).decode())
    if fault == 0:
        assert torch.equal(given, taken.view(32, 2).flip(1).flatten())


# What is wrong, which file, what becomes what.
MUTATIONS = [
    ("a window is one too short", "geometry.h", "-floor_divide(-(centre + reach), step)", "floor_divide(centre, step)"),
    (
        "a window begins one early",
        "geometry.h",
        "floor_divide(centre - reach, step) + 1",
        "floor_divide(centre - reach, step)",
    ),
    ("no barrier after the tables", "cuda/resample.cu", "  __syncthreads();\n", ""),
    (
        "no barrier before the slots",
        "cuda/layer_norm.cu",
        "    __syncthreads();  // the line before has used the slots\n",
        "",
    ),
    ("no barrier in a sum", "cuda/layer_norm.cu", "  __syncthreads();\n  a = b = A(0);", "  a = b = A(0);"),
    ("one scratch for all sums", "cuda/layer_norm.cu", "scratch[x % 2]", "scratch[0]"),
    (
        "a slot too few",
        "cuda/layer_norm.cu",
        "line % v.most * stripe + column",
        "line % (v.most - 1) * stripe + column",
    ),
    (
        "slots of another line",
        "cuda/layer_norm.cu",
        "line % v.most * stripe - left",
        "(line + 1) % v.most * stripe - left",
    ),
    ("a reduction over half a warp", "cuda/layer_norm.cu", "offset = 16", "offset = 8"),
    ("no scale", "cuda/layer_norm.cu", "task.scale ? *static_cast<const A*>(task.scale) : A(1)", "A(1)"),
    ("frames outside the loss are read", "cuda/layer_norm.cu", "task.in_loss && !task.in_loss[place.frame]", "false"),
    (
        "shared memory is too small",
        "cuda/layer_norm.cu",
        "2 * task.vertical.most() * stripe * sizeof(A)",
        "(2 * task.vertical.most() - 1) * stripe * sizeof(A)",
    ),
    (
        "a table is too small",
        "cuda/gather.cuh",
        "gather.most() * sizeof(A)) + sizeof(A)",
        "(gather.most() - 1) * sizeof(A)) + sizeof(A)",
    ),
    (
        "a row too few a block",
        "cuda/resample.cu",
        "row < place.lines * place.columns",
        "row + 1 < place.lines * place.columns",
    ),
    ("the tile's rest is not cut off", "cuda/gather.cuh", "min(task.columns, task.width_to - x)", "task.columns"),
    ("a slot of held rows too few", "cuda/layer_norm.cu", "slot < kHeld", "slot < kHeld / 2 + kHeld % 2"),
    (
        "rows that are not aligned pass for aligned",
        "cuda/operators.cu",
        "aligned = aligned && whole",
        "aligned = aligned || whole",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("mutation", "file", "right", "wrong"), MUTATIONS, ids=[each[0] for each in MUTATIONS])
def test_a_mistake_in_the_kernels_is_found(mutation: str, file: str, right: str, wrong: str, tmp_path: Path) -> None:
    csrc = shutil.copytree(cuda_on_cpu.CSRC, tmp_path / "csrc")
    code = (csrc / file).read_text()
    assert right in code
    (csrc / file).write_text(code.replace(right, wrong))
    name = "mistake_" + re.sub(r"\W", "_", mutation)
    mistaken = cuda_on_cpu.load(tmp_path / "built", name, csrc)
    with pytest.raises((AssertionError, RuntimeError)) as found:
        for dtype, antialias, channels in itertools.product(TYPES, (True, False), (7, 64)):
            test_the_numbers_are_exact(mistaken, ((13, 9), (4, 2)), antialias, dtype)
            test_the_numbers_are_exact(mistaken, ((5, 7), (9, 3)), antialias, dtype)
            test_frames_outside_the_loss_are_not_read(mistaken, channels, antialias, dtype)
        test_strided_tokens_and_gradients(mistaken, torch.float32)
        for packs in (513, 1025, 2049):
            test_rows_that_each_kernel_of_the_backward_pass_holds(mistaken, packs, torch.float32)
    print(f"{mutation}: {found.value!s:.200}")
