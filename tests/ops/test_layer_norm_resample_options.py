"""``layer_norm_resample`` of frames that are not in the loss, and the scale of its gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from crepa_kernels.ops import has_extension
from crepa_kernels.ops.layer_norm_resample import (
    in_new_memory,
    layer_norm_resample_backward_op,
    layer_norm_resample_backward_out_op,
    layer_norm_resample_op,
    normalize_and_resample,
    normalize_and_resample_into,
)

SOURCE, TARGET, EPS = (5, 4), (3, 6), 1e-5
IN_LOSS = [[True, False, True], [False, True, True]]
FORWARD = {"operator": layer_norm_resample_op, "pytorch": normalize_and_resample}
BACKWARD = {"operator": layer_norm_resample_backward_op, "pytorch": in_new_memory(normalize_and_resample_into)}
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_way = pytest.mark.parametrize("way", list(FORWARD))
each_filter = pytest.mark.parametrize("antialias", [True, False], ids=["antialias", "plain"])


def drawn(dtype: torch.dtype, device: str = "cpu", channels: int = 19) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Tokens (2, 3, 20, C), a gradient (2, 3, 18, C), and which frames are in the loss."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.manual_seed(0)
    tokens, grad = (torch.randn(2, 3, rows, channels, dtype=torch.float64) for rows in (20, 18))
    return tokens.to(device, dtype), grad.to(device, dtype), torch.tensor(IN_LOSS, device=device)


@each_way
@each_filter
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_what_is_outside_the_loss_is_not_read(way: str, antialias: bool, device: str, dtype: torch.dtype) -> None:
    tokens, grad, in_loss = drawn(dtype, device)
    geometry = (SOURCE, TARGET, antialias)
    rows, mean, inverse_std = FORWARD[way](tokens, *geometry, EPS)
    dh = BACKWARD[way](grad, tokens, mean, inverse_std, *geometry)

    tokens[~in_loss] = grad[~in_loss] = torch.nan
    masked = FORWARD[way](tokens, *geometry, EPS, in_loss)
    masked_dh = BACKWARD[way](grad, tokens, *masked[1:], *geometry, in_loss)
    for ours, unmasked in zip((*masked, masked_dh), (rows, mean, inverse_std, dh), strict=True):
        assert torch.equal(ours[in_loss], unmasked[in_loss])
        assert torch.equal(ours[~in_loss], torch.zeros_like(ours[~in_loss]))


@each_way
@each_filter
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_gradient_is_scaled_before_it_is_rounded(
    way: str, antialias: bool, device: str, dtype: torch.dtype
) -> None:
    tokens, grad, in_loss = drawn(dtype, device)
    geometry = (SOURCE, TARGET, antialias)
    _, mean, inverse_std = layer_norm_resample_op(tokens, *geometry, EPS)
    one = BACKWARD[way](grad, tokens, mean, inverse_std, *geometry, in_loss)
    # A power of two rounds nothing, so that the results are the same numbers.
    scaled = BACKWARD[way](grad, tokens, mean, inverse_std, *geometry, in_loss, mean.new_full((), -0.25))
    assert torch.equal(scaled, -0.25 * one)
    third = mean.new_full((), 1 / 3)
    dh = BACKWARD[way](grad, tokens, mean, inverse_std, *geometry, None, third)
    exact = BACKWARD[way](*(each.double() for each in (grad, tokens, mean, inverse_std)), *geometry) * third.double()
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 100 * torch.finfo(mean.dtype).eps
    assert ((dh.double() - exact).abs() <= bound).all()


def test_into_memory_that_is_there() -> None:
    tokens, grad, in_loss = drawn(torch.float32)
    scale = torch.tensor(3.0)
    _, mean, inverse_std = layer_norm_resample_op(tokens, SOURCE, TARGET, True, EPS, in_loss)
    arguments = (grad, tokens, mean, inverse_std, SOURCE, TARGET, True)
    out = torch.full_like(tokens, torch.nan)
    layer_norm_resample_backward_out_op(*arguments, out, in_loss, scale)
    assert torch.equal(out, layer_norm_resample_backward_op(*arguments, in_loss, scale))


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_pytorch_writes_into_memory_of_any_layout(layout: str) -> None:
    tokens, grad, in_loss = drawn(torch.float32)
    _, mean, inverse_std = layer_norm_resample_op(tokens, SOURCE, TARGET, True, EPS, in_loss)
    arguments = (grad, tokens, mean, inverse_std, SOURCE, TARGET, True)
    out = torch.full((*tokens.shape, 2), torch.nan)[..., 0] if layout == "strided" else tokens * torch.nan
    normalize_and_resample_into(*arguments, out, in_loss)
    assert torch.equal(out, in_new_memory(normalize_and_resample_into)(*arguments, in_loss))


def test_opcheck_and_autograd() -> None:
    tokens, grad, in_loss = drawn(torch.float64, channels=3)
    tokens.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: layer_norm_resample_op(x, SOURCE, TARGET, True, EPS, in_loss)[0], (tokens,)
    )
    _, mean, inverse_std = layer_norm_resample_op(tokens, SOURCE, TARGET, True, EPS, in_loss)
    options = (in_loss, torch.tensor(2.0, dtype=torch.float64))
    arguments = (grad, tokens.detach(), mean.detach(), inverse_std.detach(), SOURCE, TARGET, True)
    for operator, inputs in (
        (layer_norm_resample_op, (tokens, SOURCE, TARGET, True, EPS, in_loss)),
        (layer_norm_resample_backward_op, (*arguments, *options)),
        (layer_norm_resample_backward_out_op, (*arguments, tokens.detach().clone(), *options)),
    ):
        assert set(torch.library.opcheck(operator, inputs).values()) == {"SUCCESS"}


@pytest.mark.skipif(not has_extension("cpu"), reason="the C++ extension is not built")
def test_options_that_do_not_fit_are_an_error() -> None:
    tokens, grad, in_loss = drawn(torch.float32)
    _, mean, inverse_std = layer_norm_resample_op(tokens, SOURCE, TARGET, True, EPS)
    forward = (tokens, SOURCE, TARGET, True, EPS)
    backward = (grad, tokens, mean, inverse_std, SOURCE, TARGET, True)
    for wrong, match in (
        (in_loss[:1], r"in_loss must have shape \(2, 3\), got \(1, 3\)"),
        (in_loss.flatten(), r"in_loss must have shape \(2, 3\), got \(6\)"),
        (in_loss.float(), "in_loss must be bool, on the tokens' device, got Float"),
    ):
        for call, arguments in ((layer_norm_resample_op, forward), (layer_norm_resample_backward_op, backward)):
            with pytest.raises(RuntimeError, match=match):
                call(*arguments, wrong)
    for scale in (torch.ones(2), torch.tensor(1.0, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="scale must be one number, on the tokens' device, in Float"):
            layer_norm_resample_backward_op(*backward, None, scale)


def test_every_frame_outside() -> None:
    tokens, grad, _ = drawn(torch.float32)
    none = torch.zeros(2, 3, dtype=torch.bool)
    tokens.fill_(torch.inf)
    for way, antialias in itertools.product(FORWARD, (True, False)):
        geometry = (SOURCE, TARGET, antialias)
        rows, mean, inverse_std = FORWARD[way](tokens, *geometry, EPS, none)
        dh = BACKWARD[way](grad, tokens, mean, inverse_std, *geometry, none)
        assert not any(each.any() for each in (rows, mean, inverse_std, dh))


@each_way
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [19, 64])
def test_the_gradient_of_large_tokens_keeps_both_of_its_parts(
    way: str, channels: int, device: str, dtype: torch.dtype
) -> None:
    """1/std is 1e-15, whose square an fp32 number holds with a few bits and whose cube not at all."""
    tokens, grad, _ = drawn(dtype, device, channels)
    tokens, geometry = tokens * 1e15, (SOURCE, TARGET, True)
    gradients = []
    for t, g in ((tokens, grad), (tokens.double(), grad.double())):
        _, mean, inverse_std = FORWARD[way](t, *geometry, EPS)
        gradients.append(BACKWARD[way](g, t, mean, inverse_std, *geometry).double())
    ours, exact = gradients
    assert (ours - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()
