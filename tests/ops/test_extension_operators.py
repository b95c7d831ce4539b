"""Token resampling as PyTorch operators: gradients, compilation, autocast, layouts, bad input, and the build itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from resampling import exact

from crepa_kernels import resample_tokens
from crepa_kernels.ops import extension, has_extension
from crepa_kernels.ops.layer_norm_resample import (
    layer_norm_resample_backward_op,
    layer_norm_resample_backward_out_op,
    layer_norm_resample_op,
)
from crepa_kernels.ops.resample import resample_tokens_adjoint_op, resample_tokens_op

needs_extension = pytest.mark.skipif(not has_extension("cpu"), reason="the C++ extension is not built")
each_filter = pytest.mark.parametrize("antialias", [True, False], ids=["antialias", "plain"])
GEOMETRY = ((5, 4), (3, 6))


def tokens_of(dtype: torch.dtype = torch.float64, channels: int = 3, frames: tuple[int, ...] = (2,)) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(*frames, 20, channels, dtype=torch.float64).to(dtype)


def test_a_compiler_means_that_the_extension_is_built() -> None:
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        pytest.skip("there is no C++ compiler")
    if os.environ.get("CREPA_KERNELS_EXTENSION") == "0":
        pytest.skip("CREPA_KERNELS_EXTENSION is 0")
    assert has_extension("cpu"), extension.why_no_extension("cpu")


@each_filter
def test_gradients_of_both_orders(antialias: bool) -> None:
    tokens = tokens_of().requires_grad_()

    def run(x: torch.Tensor) -> torch.Tensor:
        return resample_tokens(x, *GEOMETRY, antialias)

    assert torch.autograd.gradcheck(run, (tokens,))
    assert torch.autograd.gradgradcheck(run, (tokens,))


@each_filter
def test_gradient_of_layer_norm_resample(antialias: bool) -> None:
    tokens = tokens_of(channels=5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer_norm_resample_op(x, *GEOMETRY, antialias, 1e-5)[0], (tokens,))


def test_layer_norm_resample_says_that_it_has_one_derivative() -> None:
    tokens = tokens_of().requires_grad_()
    out = layer_norm_resample_op(tokens, *GEOMETRY, True, 1e-5)[0]
    (grad,) = torch.autograd.grad(out.square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    tokens = tokens_of(dtype, channels=8)
    grad = torch.randn(2, 18, 8).to(dtype)
    _, mean, inverse_std = layer_norm_resample_op(tokens, *GEOMETRY, True, 1e-5)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (resample_tokens_op, (tokens.clone().requires_grad_(), *GEOMETRY, True)),
        (resample_tokens_adjoint_op, (grad.clone().requires_grad_(), *GEOMETRY, True)),
        (layer_norm_resample_op, (tokens.clone().requires_grad_(), *GEOMETRY, True, 1e-5)),
        (layer_norm_resample_backward_op, (grad, tokens, mean, inverse_std, *GEOMETRY, True)),
        (layer_norm_resample_backward_out_op, (grad, tokens, mean, inverse_std, *GEOMETRY, True, tokens.clone())),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments)


def test_compiles_without_a_graph_break() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        rows, *_ = layer_norm_resample_op(x, *GEOMETRY, True, 1e-5)
        return (resample_tokens(x, *GEOMETRY).sin() * rows).sum()

    tokens = tokens_of(torch.float32).requires_grad_()
    (expected,) = torch.autograd.grad(step(tokens), tokens)
    (actual,) = torch.autograd.grad(torch.compile(step, fullgraph=True)(tokens), tokens)
    # Inductor's sine and product are rounded in another order.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_neither_type_nor_value(dtype: torch.dtype) -> None:
    tokens = tokens_of(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = resample_tokens(tokens, *GEOMETRY), layer_norm_resample_op(tokens, *GEOMETRY, True, 1e-5)[0]
    outside = resample_tokens(tokens, *GEOMETRY), layer_norm_resample_op(tokens, *GEOMETRY, True, 1e-5)[0]
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b)


def test_the_same_bits_twice_and_with_any_number_of_threads() -> None:
    tokens = torch.randn(3, 30 * 52, 100)
    grad = torch.randn(3, 256, 100)

    def run() -> list[torch.Tensor]:
        out, mean, inverse_std = layer_norm_resample_op(tokens, (30, 52), (16, 16), True, 1e-5)
        back = layer_norm_resample_backward_op(grad, tokens, mean, inverse_std, (30, 52), (16, 16), True)
        plain = resample_tokens(tokens, (30, 52), (37, 37))
        return [out, mean, inverse_std, back, plain, resample_tokens_adjoint_op(grad, (30, 52), (16, 16), True)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(3)
        together = run()
    finally:
        torch.set_num_threads(before)
    if has_extension("cpu"):
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(together, run() if before == 3 else _on_three(run), strict=True))


def _on_three(run: Any) -> list[torch.Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        return run()
    finally:
        torch.set_num_threads(before)


def strided(layout: str) -> torch.Tensor:
    """(2, 3, 20, 6) tokens in different memory."""
    torch.manual_seed(0)
    if layout == "channels of a wider tensor":
        return torch.randn(2, 3, 20, 10)[..., 2:8]
    if layout == "every other frame":
        return torch.randn(2, 6, 20, 6)[:, ::2]
    if layout == "frames before clips":
        return torch.randn(3, 2, 20, 6).transpose(0, 1)
    if layout == "one frame for all":
        return torch.randn(1, 1, 20, 6).expand(2, 3, 20, 6)
    if layout == "tokens backwards in another axis":
        return torch.randn(2, 20, 3, 6).transpose(1, 2)
    return torch.randn(2, 3, 6, 20).transpose(-1, -2)  # channels are not contiguous


@pytest.mark.parametrize(
    "layout",
    [
        "channels of a wider tensor",
        "every other frame",
        "frames before clips",
        "one frame for all",
        "tokens backwards in another axis",
        "channels apart",
    ],
)
def test_strided_tokens(layout: str) -> None:
    tokens = strided(layout)
    assert not tokens.is_contiguous()
    expected = resample_tokens(tokens.contiguous(), *GEOMETRY)
    torch.testing.assert_close(resample_tokens(tokens, *GEOMETRY), expected, rtol=0, atol=0)
    # So that the comparison cannot hold for two wrong results: fp32 sums of at most 9 terms.
    torch.testing.assert_close(expected.double(), exact(tokens, *GEOMETRY, True), rtol=1e-5, atol=1e-5)
    rows, mean, inverse_std = layer_norm_resample_op(tokens, *GEOMETRY, True, 1e-5)
    dense = layer_norm_resample_op(tokens.contiguous(), *GEOMETRY, True, 1e-5)
    torch.testing.assert_close(rows, dense[0], rtol=0, atol=0)
    grad = torch.randn(3, 2, 18, 6).transpose(0, 1)
    back = layer_norm_resample_backward_op(grad, tokens, mean, inverse_std, *GEOMETRY, True)
    dense_back = layer_norm_resample_backward_op(grad.contiguous(), tokens.contiguous(), *dense[1:], *GEOMETRY, True)
    torch.testing.assert_close(back, dense_back, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 20, 3), (2, 0, 20, 3), (2, 20, 0)])
def test_an_empty_batch_gives_an_empty_tensor(shape: tuple[int, ...]) -> None:
    tokens = torch.randn(shape, requires_grad=True)
    out = resample_tokens(tokens, *GEOMETRY)
    assert out.shape == (*shape[:-2], 18, shape[-1])
    out.sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.shape == shape
    rows, mean, inverse_std = layer_norm_resample_op(tokens.detach(), *GEOMETRY, True, 1e-5)
    assert rows.shape == out.shape
    assert mean.shape == inverse_std.shape == shape[:-1]
    back = layer_norm_resample_backward_op(rows, tokens.detach(), mean, inverse_std, *GEOMETRY, True)
    assert back.shape == shape


@pytest.mark.parametrize(
    ("arguments", "numbers"),
    [
        ((torch.zeros(2, 19, 3), (5, 4), (3, 6)), ["19", "20"]),
        ((torch.zeros(2, 20, 3), (5, 0), (3, 6)), ["5, 0"]),
        ((torch.zeros(2, 20, 3), (5, 4), (-3, 6)), ["-3, 6"]),
        ((torch.zeros(2, 20, 3), (5, 4), (3, 6, 1)), ["3, 6, 1"]),
        ((torch.zeros(20), (5, 4), (3, 6)), ["20"]),
        ((torch.zeros(2, 20, 3, dtype=torch.int64), (5, 4), (3, 6)), ["int64|Long"]),
        ((torch.zeros(2, 20, 3, dtype=torch.bool), (5, 4), (3, 6)), ["bool|Bool"]),
        # Products that are 20, 0 or negative once they are cut to 64 bits.
        ((torch.zeros(2, 20, 3), (2**62 + 5, 4), (3, 6)), ["64 bits"]),
        ((torch.zeros(2, 20, 3), (5, 4), (2**32, 2**32)), ["64 bits"]),
        ((torch.zeros(2, 20, 3), (5, 4), (2**40, 2**22)), ["64 bits"]),
        ((torch.zeros(1).expand(2**40, 1), (2**40, 1), (2**22, 1)), ["64 bits"]),
    ],
)
def test_bad_input_is_an_error_with_the_numbers(arguments: tuple[Any, ...], numbers: list[str]) -> None:
    with pytest.raises(ValueError, match=numbers[0]):
        resample_tokens(*arguments)
    for operator, rest in ((resample_tokens_op, (True,)), (layer_norm_resample_op, (True, 1e-5))):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            operator(*arguments, *rest)
        for number in numbers:
            assert any(part in str(caught.value) for part in number.split("|")), str(caught.value)


def test_the_gradient_is_written_where_it_is_asked_for() -> None:
    tokens = tokens_of(torch.float32)
    _, mean, inverse_std = layer_norm_resample_op(tokens, *GEOMETRY, True, 1e-5)
    grad = torch.randn(2, 18, 3)
    whole = torch.full((4, 20, 3), torch.nan)
    layer_norm_resample_backward_out_op(grad, tokens, mean, inverse_std, *GEOMETRY, True, whole[1:3])
    expected = layer_norm_resample_backward_op(grad, tokens, mean, inverse_std, *GEOMETRY, True)
    assert torch.equal(whole[1:3], expected)
    assert whole[0].isnan().all()
    assert whole[3].isnan().all()


@needs_extension
def test_a_backward_whose_tensors_do_not_match_is_an_error() -> None:
    tokens = tokens_of(torch.float32)
    _, mean, inverse_std = layer_norm_resample_op(tokens, *GEOMETRY, True, 1e-5)
    grad = torch.zeros(2, 18, 3)
    for wrong, match in (
        ((grad[:1], tokens, mean, inverse_std), r"\(2, 18, 3\), got \(1, 18, 3\)"),
        ((grad[..., :2], tokens, mean, inverse_std), r"\(2, 18, 3\), got \(2, 18, 2\)"),
        ((grad.half(), tokens, mean, inverse_std), "Half.*Float"),
        ((grad, tokens, mean[:, :3], inverse_std), r"\(2, 20\), got \(2, 3\)"),
        ((grad, tokens, mean.double(), inverse_std), "Float, got Double"),
    ):
        with pytest.raises(RuntimeError, match=match):
            layer_norm_resample_backward_op(*wrong, *GEOMETRY, True)


@pytest.mark.parametrize("elsewhere", ["grad", "tokens", "mean", "inverse_std", "out", "in_loss", "scale"])
def test_a_backward_on_two_devices_is_an_error_that_names_both(elsewhere: str) -> None:
    tokens = tokens_of(torch.float32)
    _, mean, inverse_std = layer_norm_resample_op(tokens, *GEOMETRY, True, 1e-5)
    given = {"grad": torch.zeros(2, 18, 3), "tokens": tokens, "mean": mean, "inverse_std": inverse_std}
    given |= {"in_loss": torch.ones(2, dtype=torch.bool), "scale": torch.ones(())}
    out = {"out": torch.empty_like(tokens)}
    message = "on cpu, the tokens on meta" if elsewhere == "tokens" else f"{elsewhere} is on meta, the tokens on cpu"
    geometry = dict(zip(("source_grid", "target_grid", "antialias"), (*GEOMETRY, True), strict=True))
    for operator, tensors in (
        (layer_norm_resample_backward_op, given),
        (layer_norm_resample_backward_out_op, given | out),
    ):
        if elsewhere in tensors:
            with pytest.raises(ValueError, match=message):
                operator(**{**tensors, elsewhere: tensors[elsewhere].to("meta")}, **geometry)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_the_extension_pytorch_does_the_work_and_says_why_once() -> None:
    code = """
import logging, torch
logging.basicConfig(level=logging.INFO)
from crepa_kernels import resample_tokens
for _ in range(2):
    x = torch.arange(6.0).view(1, 6, 1).requires_grad_()
    out = resample_tokens(x, (2, 3), (1, 1))
    out.sum().backward()
    print(float(out), [round(v, 4) for v in x.grad.flatten().tolist()])
"""
    done = run_python(code, CREPA_KERNELS_EXTENSION="0")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second == "2.5 [0.1429, 0.2143, 0.1429, 0.1429, 0.2143, 0.1429]"
    assert done.stderr.count("CREPA_KERNELS_EXTENSION is 0") == 1


@needs_extension
@pytest.mark.parametrize("instructions", ["generic", pytest.param("avx2", marks=pytest.mark.slow)])
def test_older_processors_get_the_same_numbers(instructions: str) -> None:
    code = """
import torch
from crepa_kernels.ops.layer_norm_resample import layer_norm_resample_backward_op, layer_norm_resample_op
torch.manual_seed(0)
sums = []
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    x, g = torch.randn(1, 63, 133).to(dtype), torch.randn(1, 20, 133).to(dtype)
    out, mean, inverse_std = layer_norm_resample_op(x, (7, 9), (4, 5), True, 1e-5)
    back = layer_norm_resample_backward_op(g, x, mean, inverse_std, (7, 9), (4, 5), True)
    sums += [out.double().abs().sum().item(), back.double().abs().sum().item()]
print(sums)
"""
    here, there = run_python(code), run_python(code, CREPA_KERNELS_CPU=instructions)
    assert here.returncode == there.returncode == 0, here.stderr + there.stderr
    # Thousands of roundings in another order, of which some fall the other way.
    assert eval(there.stdout) == pytest.approx(eval(here.stdout), rel=1e-4)


@pytest.mark.slow
@needs_extension
def test_more_than_two_billion_elements() -> None:
    """Elements beyond 2^31 are where they belong: 9 GB of bf16 and its result."""
    frames, channels = 1025, 32768
    tokens = torch.zeros(frames, 64, channels, dtype=torch.bfloat16)
    assert tokens.numel() > 2**31
    tokens[-1] = torch.arange(64, dtype=torch.bfloat16)[:, None]
    out = resample_tokens(tokens, (8, 8), (2, 2))
    last = exact(tokens[-1:, :, :1], (8, 8), (2, 2), True)
    # bf16 keeps 8 bits of numbers up to 63.
    torch.testing.assert_close(out[-1:].double(), last.expand(1, 4, channels), rtol=2**-8, atol=0)
    assert not out[:-1].any()
    back = resample_tokens_adjoint_op(out, (8, 8), (2, 2), True)
    assert back.shape == tokens.shape
    assert back[-1].all()
    assert not back[:-1].any()


@needs_extension
def test_the_extension_has_one_form_of_the_backward_pass() -> None:
    """What returns the gradient is made of what writes it."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has("crepa_kernels::layer_norm_resample_backward_out", "CPU")
    assert not has("crepa_kernels::layer_norm_resample_backward", "CPU")
