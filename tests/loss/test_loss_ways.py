"""The ways through the ``torch`` backend that a small problem on this machine would not take by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from cases import draw, simple
from oracle import truth
from test_loss import FP64_TOLERANCE, IN_CI, eager_results, errors, results, yardstick

from crepa_kernels.backends.torch.chunks import ChunkPolicy, chunked

pytestmark = pytest.mark.usefixtures("one_thread")


FEW = 20  # 1 to 20 frames of the drawn cases
POLICIES = {
    "without-host-reads": ChunkPolicy(reads=False),
    "few-tokens-at-a-time": ChunkPolicy(tokens=FEW),
    "both": ChunkPolicy(tokens=FEW, reads=False),
}


@pytest.fixture(params=POLICIES)
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Of a device whose memory the host does not read, and of clips that do not fit into one chunk."""
    with chunked(POLICIES[request.param]):
        yield


@pytest.mark.every(5)
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("seed", range(IN_CI))
def test_float64_results_are_exact(seed: int) -> None:
    case = draw(seed)
    tensors = case.tensors(torch.float64)
    exact = truth(case, tensors)
    for floored in (False, True):
        for name, error in errors(exact, results(case, tensors, "torch"), floored).items():
            assert error <= FP64_TOLERANCE * exact.size(name, floored), f"{name} floored={floored} in {case}"


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("distance", [1, 3, 30])
@pytest.mark.parametrize("cumulative", [True, False])
def test_a_long_clip(distance: int, cumulative: bool) -> None:
    """Teacher rows are made once and dropped when passed: neighbours on both sides of every chunk still see them."""
    case = simple(batch=2, frames=21, teacher_frames=21, distance=distance, cumulative=cumulative)
    for mask in (None, torch.arange(21)[None, :] < torch.tensor([[21], [13]])):
        masked = replace(case, frame_mask=mask, teacher_mask=mask)
        tensors = masked.tensors(torch.float64)
        exact = truth(masked, tensors)
        for name, error in errors(exact, results(masked, tensors, "torch"), floored=False).items():
            assert error <= FP64_TOLERANCE * exact.size(name), name


@pytest.mark.every(5)
@pytest.mark.parametrize("native", [True, False], ids=["bf16-products", "fp32-products"])
@pytest.mark.parametrize("seed", range(IN_CI))
def test_bf16_with_and_without_bf16_products(seed: int, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has none multiplies in fp32, whatever the machine that runs this test can do."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    case = draw(seed)
    tensors = case.tensors(torch.bfloat16)
    exact = truth(case, tensors)
    if exact.cancelled * torch.finfo(torch.bfloat16).eps > 0.1:
        return
    for floored in (False, True):
        eager = yardstick(exact, eager_results(case, "torch"), tensors, floored)
        for name, error in errors(exact, results(case, tensors, "torch"), floored).items():
            bound = max(2 * eager[name], 8 * torch.finfo(torch.bfloat16).eps * exact.size(name, floored))
            assert error <= bound, f"{name} floored={floored}: {error:.3e} > {bound:.3e} in {case}"
