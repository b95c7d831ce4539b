"""The CUDA kernels on a CPU, thread by thread. A thread that reads or writes what it may not is an error."""

from __future__ import annotations

import random
from typing import Any

import cuda_on_cpu
import pytest
import torch
from resampling import ODD, TRAINED, assert_close, assert_exact_numbers, exact, exact_adjoint, exact_layer_norm, pair_id

from crepa_kernels.grid import Grid
from crepa_kernels.ops.layer_norm_resample import in_new_memory

pytestmark = [
    pytest.mark.skipif(cuda_on_cpu.compiler() is None, reason="there is no C++ compiler"),
    pytest.mark.usefixtures("one_thread", "nan_in_new_memory"),
]
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
each_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_filter = pytest.mark.parametrize("antialias", [True, False], ids=["antialias", "plain"])
EPS = 1e-5


@pytest.fixture(scope="session")  # torch registers a library once, and a worker may come back to this file
def operators(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cuda_on_cpu.load(tmp_path_factory.mktemp("cuda_on_cpu"))


def whole_packs(dtype: torch.dtype, packs: int) -> int:
    """Channels of rows of ``packs`` times 16 bytes."""
    return packs * 16 // dtype.itemsize


@pytest.mark.every(5)
@each_type
@each_filter
@pytest.mark.parametrize("pair", ODD, ids=pair_id)
def test_the_numbers_are_exact(operators: Any, pair: tuple[Grid, Grid], antialias: bool, dtype: torch.dtype) -> None:
    for channels in (7, whole_packs(dtype, 4), whole_packs(dtype, 9)):
        assert_exact_numbers(operators, pair, channels, antialias, dtype)


@each_type
@each_filter
def test_rows_of_one_channel_and_of_one_pack(operators: Any, antialias: bool, dtype: torch.dtype) -> None:
    geometry = ((5, 7), (3, 9), antialias)
    for channels in (1, whole_packs(dtype, 1)):
        tokens, grad = torch.randn(2, 35, channels).to(dtype), torch.randn(2, 27, channels).to(dtype)
        assert_close(operators.resample_tokens(tokens, *geometry), exact(tokens, *geometry), torch.float32)
        assert_close(operators.resample_tokens_adjoint(grad, *geometry), exact_adjoint(grad, *geometry), torch.float32)


@pytest.mark.every(3)
@each_type
@each_filter
@pytest.mark.parametrize("channels", [7, 16])
def test_the_grids_that_people_train(operators: Any, channels: int, antialias: bool, dtype: torch.dtype) -> None:
    assert_exact_numbers(operators, ((30, 52), (16, 16)), channels, antialias, dtype)


@pytest.mark.slow
@each_type
@each_filter
@pytest.mark.parametrize("pair", TRAINED, ids=pair_id)
def test_all_grids_that_people_train(
    operators: Any, pair: tuple[Grid, Grid], antialias: bool, dtype: torch.dtype
) -> None:
    assert_exact_numbers(operators, pair, 64, antialias, dtype)


@pytest.mark.slow
@each_type
@each_filter
def test_rows_as_long_as_people_train(operators: Any, antialias: bool, dtype: torch.dtype) -> None:
    assert_exact_numbers(operators, ((30, 52), (16, 16)), 1536, antialias, dtype)


@each_type
@pytest.mark.parametrize("packs", [512, 513, 1024, 1025, 2048, 2049])
def test_rows_that_each_kernel_of_the_backward_pass_holds(operators: Any, packs: int, dtype: torch.dtype) -> None:
    for channels in (whole_packs(dtype, packs), packs):  # the second are rows that are not aligned, for odd numbers
        assert_exact_numbers(operators, ((2, 3), (3, 2)), channels, False, dtype)


@pytest.mark.slow
def test_any_grid_and_channels(operators: Any) -> None:
    draw = random.Random(0)
    for _ in range(400):
        pair = tuple((draw.randint(1, 40), draw.randint(1, 40)) for _ in range(2))
        channels = draw.choice([draw.randint(1, 40), 8 * draw.randint(1, 20)])
        assert_exact_numbers(operators, pair, channels, draw.random() < 0.5, draw.choice(TYPES))


def test_a_tile_is_cut_until_its_tables_fit(operators: Any) -> None:
    """Down to one column and one line where 8 columns of statistics, or of weights, would need more than 48 KB."""
    for pair in (((48, 48), (2, 3)), ((1, 1700), (1, 3)), ((1, 3), (1, 1700)), ((1500, 1), (2, 1))):
        assert_exact_numbers(operators, pair, 8, True, torch.float64)


def widen_until_refused(operators: Any) -> None:
    for width in range(11_500, 12_400, 20):
        one, statistic = torch.ones(1, 1, 4), torch.ones(1, 1)
        geometry = ((1, 1), (1, width), True)
        in_new_memory(operators.layer_norm_resample_backward_out)(
            torch.ones(1, width, 4), one, statistic, statistic, *geometry
        )


def test_weights_that_do_not_fit_are_an_error(operators: Any) -> None:
    """Until then they fit together with what the kernel declares for itself."""
    with pytest.raises(RuntimeError, match=r"a token reads 1 x \d+ others: their weights need more than 48128 bytes"):
        widen_until_refused(operators)


def strided(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Ways in which (3, 2, 35, C) lie in memory, NaN in between."""

    def cut(*shape: int, first: int = 0, channels: int = 16) -> torch.Tensor:
        around = torch.full(shape, torch.nan, dtype=dtype)
        inside = around[..., first : first + channels]
        inside.copy_(torch.randn(inside.shape, dtype=torch.float64))
        return inside

    odd_frames = torch.randn(3, 2, 35 * 16 + 1).to(dtype)
    return {
        "part of each row": cut(3, 2, 35, 32, first=8),
        "part of each row, not aligned": cut(3, 2, 35, 32, first=9),
        "rows of an odd length": cut(3, 2, 35, 17),
        "frames and batch swapped": cut(2, 3, 35, 16).transpose(0, 1),
        "some of the frames": cut(3, 6, 35, 24)[:, 1::3],
        "frames of an odd length": odd_frames[..., :-1].unflatten(-1, (35, 16)),
        "some of the rows": cut(3, 2, 40, 16)[:, :, 2:37],
        "channels first": cut(3, 2, 16, 35, channels=35).transpose(2, 3),
        "the same frame again": cut(1, 1, 35, 16).expand(3, 2, 35, 16),
    }


@each_type
def test_strided_tokens_and_gradients(operators: Any, dtype: torch.dtype) -> None:
    geometry = ((5, 7), (7, 5), True)
    torch.manual_seed(0)
    for tokens, grad in zip(strided(dtype).values(), reversed(strided(dtype).values()), strict=True):
        rows, *statistics = operators.layer_norm_resample(tokens, *geometry, EPS)
        _, *expected_statistics = operators.layer_norm_resample(tokens.contiguous(), *geometry, EPS)
        dh = in_new_memory(operators.layer_norm_resample_backward_out)(grad, tokens, *statistics, *geometry)
        copies = (each.contiguous() for each in (grad, tokens, *statistics))
        exactly = [
            (operators.resample_tokens(tokens, *geometry), exact(tokens, *geometry)),
            (operators.resample_tokens_adjoint(grad, *geometry), exact_adjoint(grad, *geometry)),
            (rows, exact(exact_layer_norm(tokens, EPS), *geometry)),
            (dh, in_new_memory(operators.layer_norm_resample_backward_out)(*copies, *geometry).double()),
            (torch.stack(statistics), torch.stack(expected_statistics).double()),
        ]
        for actual, expected in exactly:
            assert_close(actual, expected, statistics[0].dtype)


def test_more_leading_axes_than_the_kernels_know(operators: Any) -> None:
    around = torch.randn(2, 3, 2, 3, 2, 6, 8, dtype=torch.float64)
    tokens = around[:, :2].transpose(1, 3)[:, :2].transpose(0, 4)
    geometry = ((2, 3), (3, 1), True)
    assert_close(operators.resample_tokens(tokens, *geometry), exact(tokens, *geometry), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [19, 64])
def test_the_gradient_of_large_tokens_keeps_both_of_its_parts(
    operators: Any, channels: int, dtype: torch.dtype
) -> None:
    """1/std is 1e-15, whose square an fp32 number holds with a few bits and whose cube not at all."""
    geometry = ((5, 4), (3, 6), True)
    torch.manual_seed(0)
    tokens, grad = (torch.randn(2, rows, channels) for rows in (20, 18))
    tokens, grad, gradients = (tokens * 1e15).to(dtype), grad.to(dtype), []
    for t, g in ((tokens, grad), (tokens.double(), grad.double())):
        _, *statistics = operators.layer_norm_resample(t, *geometry, EPS)
        gradients.append(
            in_new_memory(operators.layer_norm_resample_backward_out)(g, t, *statistics, *geometry).double()
        )
    ours, exact = gradients
    assert (ours - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


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
    dh = in_new_memory(operators.layer_norm_resample_backward_out)(grad, tokens, mean, inverse_std, *geometry)

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
