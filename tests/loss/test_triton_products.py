"""The vendor library's products in the Triton backend: dx added to LayerNorm's terms, and 16-bit products in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from cases import Case, simple
from devices import DEVICES, on_each_device
from test_triton import check, to, triton_results

from benches.measure import peak_bytes
from crepa_kernels import crepa_loss
from crepa_kernels.backends.triton import launch, tiles
from crepa_kernels.backends.triton.launch import product, recorded

pytestmark = pytest.mark.usefixtures("one_thread")
# Sizes that no power of two divides, so that rows have a second part.
CASE = simple(
    teacher_grid=(3, 5), student_grid=(3, 5), frames=3, teacher_frames=3, hidden_size=150, feature_size=70,
    full_precision_weights=True,
)  # fmt: skip
MASK = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.bool)


@pytest.fixture(params=DEVICES)
def vendor_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device on which dx is the vendor's product."""
    device = request.param
    choice = tiles.choose(torch.device(device), CASE.hidden_size, CASE.feature_size, torch.bfloat16)
    with tiles.forced(replace(choice, dx=tiles.VENDOR)):
        yield device


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    "mean", [pytest.param(0.0, marks=pytest.mark.slow), pytest.param(10.0, marks=pytest.mark.slow), 100.0]
)
def test_errors_are_those_of_eager_arithmetic(mean: float, recompute: bool, vendor_device: str) -> None:
    """LayerNorm's terms are rounded to bf16 before the product is added, and the scaled weight is its own rounding."""
    check(replace(CASE, mean=mean), torch.bfloat16, vendor_device, recompute, "split")


def test_frames_outside_the_loss_may_hold_nan(vendor_device: str) -> None:
    case = replace(CASE, frame_mask=MASK, garbage=True)
    check(case, torch.bfloat16, vendor_device, False, "split")
    found = triton_results(case, to(vendor_device, case.tensors(torch.bfloat16)))
    assert (found["h"][~MASK] == 0).all()


def gradients(case: Case, device: str, times: int) -> list[torch.Tensor]:
    """dh of one forward pass, made ``times`` times, for three times the loss."""
    tensors = to(device, case.tensors(torch.bfloat16))
    h = tensors["h"].clone().requires_grad_()
    loss = crepa_loss(h, tensors["y"], case.projector(tensors), backend="triton", **case.options).loss * 3
    return [torch.autograd.grad(loss, h, retain_graph=True)[0] for _ in range(times)]


def test_what_the_forward_pass_kept_stays_as_it_is(vendor_device: str) -> None:
    first, second = gradients(CASE, vendor_device, 2)
    assert torch.equal(first, second)


def test_the_losses_gradient_scales_dx(vendor_device: str) -> None:
    (thrice,) = gradients(CASE, vendor_device, 1)
    once = triton_results(CASE, to(vendor_device, CASE.tensors(torch.bfloat16)))["h"]
    difference = (thrice.cpu().float() - 3 * once.float()).norm() / (3 * once.float()).norm()
    assert difference < torch.finfo(torch.bfloat16).eps


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_products_in_fp32_keep_what_16_bits_would_lose(
    rows: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the vendor library has no such product, from fp32 copies of ``WIDE_ROWS`` rows at a time."""
    monkeypatch.setattr(launch, "WIDE_ROWS", rows)
    a, b = (torch.randn(40, n, generator=torch.Generator().manual_seed(n)).to(device, dtype) for n in (6, 10))
    found = product("dW", a.t(), b, to_fp32=True)
    assert found.dtype == torch.float32
    exact = a.double().t() @ b.double()
    assert (found.double() - exact).norm() <= 1e-6 * exact.norm()


def test_products_in_fp32_copy_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "WIDE_ROWS", 256)
    a, b = torch.ones(8192, 16, dtype=torch.bfloat16), torch.ones(8192, 512, dtype=torch.bfloat16)
    out, copies = 4 * 16 * 512, 4 * 256 * (16 + 512)
    # Two chunks may be there at once, as one is let go after the next is made.
    assert peak_bytes(lambda: product("dW", a.t(), b, to_fp32=True)) < 1.1 * (out + 2 * copies)
    with recorded() as launches:
        product("dW", a.t(), b, to_fp32=True)
    everything = 4 * 8192 * (16 + 512)
    assert launches[0].written == 32 * out + everything
    assert launches[0].read == 31 * out + everything + everything // 2
