"""Token resampling: the values of ``resample_tokens``, its adjoint, and its fusion with LayerNorm.

Everything runs on whatever kernels are there; what only the extension promises is marked with ``needs_extension``.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from resampling import ODD, PAIRS, assert_rounded, draw, exact, exact_adjoint, exact_layer_norm, pair_id

from crepa_kernels import resample_tokens
from crepa_kernels.grid import Grid
from crepa_kernels.ops import has_extension
from crepa_kernels.ops.layer_norm_resample import layer_norm_resample_backward_op, layer_norm_resample_op
from crepa_kernels.ops.resample import resample, resample_tokens_adjoint_op

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
needs_extension = pytest.mark.skipif(not has_extension("cpu"), reason="the C++ extension is not built")
each_pair = pytest.mark.parametrize("pair", PAIRS, ids=pair_id)
each_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_filter = pytest.mark.parametrize("antialias", [True, False], ids=["antialias", "plain"])


@pytest.mark.every(3)
@needs_extension
@each_filter
@each_pair
def test_a_resampled_token_is_the_exact_weighted_sum(pair: tuple[Grid, Grid], antialias: bool) -> None:
    source, target = pair
    for dtype in TYPES:
        tokens = draw(source, dtype)
        out = resample_tokens(tokens, source, target, antialias)
        assert out.dtype == dtype
        # 3 roundings a weight (two axes, their product), 1 a product, and those of a sum of a few terms.
        scale = exact(tokens.abs(), source, target, antialias)
        assert_rounded(out, exact(tokens, source, target, antialias), scale, terms=12)


@pytest.mark.every(3)
@needs_extension
@each_filter
@each_pair
def test_the_adjoint_is_the_exact_transpose(pair: tuple[Grid, Grid], antialias: bool) -> None:
    source, target = pair
    for dtype in TYPES:
        grad = draw(target, dtype)
        out = resample_tokens_adjoint_op(grad, source, target, antialias)
        assert out.dtype == dtype
        # As above; up to 6 x 10 terms where the grid grows.
        scale = exact_adjoint(grad.abs(), source, target, antialias)
        assert_rounded(out, exact_adjoint(grad, source, target, antialias), scale, terms=60)


@each_filter
@each_pair
def test_equal_to_interpolate(pair: tuple[Grid, Grid], antialias: bool) -> None:
    source, target = pair
    tokens = draw(source, torch.float64)
    images = tokens.view(-1, *source, tokens.shape[-1]).permute(0, 3, 1, 2)
    expected = F.interpolate(images, size=target, mode="bilinear", antialias=antialias)
    out = resample_tokens(tokens, source, target, antialias)
    # interpolate rounds positions of up to 80 cells, whose error is 80 eps of a weight on each axis.
    bound = 400 * torch.finfo(torch.float64).eps
    torch.testing.assert_close(out, expected.permute(0, 2, 3, 1).reshape(out.shape), rtol=0, atol=bound)
    adjoint = resample_tokens_adjoint_op(out, source, target, antialias)
    torch.testing.assert_close(adjoint, resample(out, source, target, antialias, adjoint=True), rtol=0, atol=10 * bound)


@each_filter
@pytest.mark.parametrize("pair", ODD, ids=pair_id)
def test_adjoint_identity(pair: tuple[Grid, Grid], antialias: bool) -> None:
    source, target = pair
    x, y = draw(source, torch.float64), draw(target, torch.float64)
    forward = (resample_tokens(x, source, target, antialias) * y).sum()
    backward = (x * resample_tokens_adjoint_op(y, source, target, antialias)).sum()
    # Some thousand products of order one, summed in fp64.
    torch.testing.assert_close(forward, backward, rtol=1e-12, atol=1e-12)


@each_filter
@each_type
@pytest.mark.parametrize("ratio", [0, 10, 100])
@pytest.mark.parametrize("pair", [((15, 26), (8, 8)), ((15, 26), (18, 18)), *ODD[:5]], ids=pair_id)
def test_layer_norm_resample(pair: tuple[Grid, Grid], ratio: int, dtype: torch.dtype, antialias: bool) -> None:
    """Tokens whose mean is ``ratio`` standard deviations, as in residual streams."""
    source, target = pair
    eps = 1e-5
    tokens = (draw(source, torch.float64, channels=37) + ratio).to(dtype)
    grad = draw(target, dtype, channels=37)
    wide = tokens.double().requires_grad_()
    expected = exact(exact_layer_norm(wide, eps), source, target, antialias)
    (expected_grad,) = torch.autograd.grad(expected, wide, grad.double())

    out, mean, inverse_std = layer_norm_resample_op(tokens, source, target, antialias, eps)
    actual_grad = layer_norm_resample_backward_op(grad, tokens, mean, inverse_std, source, target, antialias)
    assert out.dtype == actual_grad.dtype == dtype
    assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    # The mean is exact to eps of itself, which shifts a normalised token by ratio x eps; PyTorch's interpolate, where
    # the extension is not built, rounds positions of 52 cells, and half types once more between its two steps.
    built = has_extension("cpu")
    sums = torch.finfo(mean.dtype).eps * (8 + 2 * ratio) * (1 if built else 30)
    storage = torch.finfo(dtype).eps * (0.51 if built else 2)
    magnitude = exact(exact_layer_norm(tokens, eps).abs(), source, target, antialias)
    assert ((out.double() - expected).abs() <= storage * magnitude + sums * (1 + magnitude)).all()
    # In the gradient the terms that cancel are as large as R'|grad| / std.
    scale = exact_adjoint(grad.abs(), source, target, antialias) + 1
    assert ((actual_grad.double() - expected_grad).abs() <= 3 * (storage + sums) * 4 * scale).all()


@needs_extension
def test_statistics_of_tokens_that_nothing_reads_are_zero() -> None:
    tokens = draw((9, 9), torch.float32)
    _, mean, inverse_std = layer_norm_resample_op(tokens, (9, 9), (3, 3), False, 1e-5)
    read = exact_adjoint(torch.ones(2, 9, 1), (9, 9), (3, 3), False)[..., 0] > 0
    assert not read.all()
    torch.testing.assert_close(mean[read], tokens.mean(dim=-1)[read])
    assert (inverse_std[read] > 0).all()
    assert (mean[~read] == 0).all()
    assert (inverse_std[~read] == 0).all()
    grad = layer_norm_resample_backward_op(
        draw((3, 3), torch.float32), tokens, mean, inverse_std, (9, 9), (3, 3), False
    )
    assert (grad[~read] == 0).all()


@needs_extension
@each_type
def test_special_values_pass_through(dtype: torch.dtype) -> None:
    """The identity grid multiplies by one: every value of the type, infinities, NaN and subnormals, comes back."""
    if dtype in (torch.float16, torch.bfloat16):
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    else:
        info = torch.finfo(dtype)
        values = torch.tensor(
            [0.0, -0.0, 1.0, info.max, -info.max, info.tiny, info.tiny / 8, float("inf")], dtype=dtype
        )
        values = torch.cat([values, -values, torch.tensor([float("nan")], dtype=dtype)])
    tokens = values.view(1, 1, -1).expand(1, 4, -1)
    out = resample_tokens(tokens, (2, 2), (2, 2), antialias=False)
    assert torch.equal(out.isnan(), tokens.isnan())
    assert torch.equal(out.nan_to_num(nan=0, posinf=1, neginf=-1), tokens.nan_to_num(nan=0, posinf=1, neginf=-1))
