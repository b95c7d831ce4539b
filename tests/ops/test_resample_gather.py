"""Resampling in PyTorch on devices other than a CPU, without the extension: a gather of rows, here run on a CPU.

Which way a device takes, and what it asks of it, is seen on the meta device, whose tensors have no values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from resampling import ODD, PAIRS, TRAINED, assert_rounded, draw, exact, exact_adjoint, exact_layer_norm, pair_id
from torch.utils._python_dispatch import TorchDispatchMode

from crepa_kernels.grid import Grid
from crepa_kernels.ops import resample as fallback
from crepa_kernels.ops.layer_norm_resample import in_new_memory, normalize_and_resample, normalize_and_resample_into
from crepa_kernels.ops.resample import frame_taps, gather, resample

pytestmark = pytest.mark.usefixtures("one_thread")
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SMALL: list[tuple[Grid, Grid]] = [
    ((2, 3), (3, 4)),
    ((4, 5), (2, 2)),
    ((3, 2), (2, 4)),
    ((3, 3), (1, 1)),
    ((1, 4), (3, 1)),
]
# The roundings of a weight are 3, of a product 1; a row has up to 6 x 10 of them.
TERMS = 64
each_small_pair = pytest.mark.parametrize("pair", SMALL, ids=pair_id)
each_filter = pytest.mark.parametrize("antialias", [True, False], ids=["antialias", "plain"])
each_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
# The exact numbers take a CPU seconds: a GPU makes those of a few grids.
each_pair_and_device = pytest.mark.parametrize(
    ("pair", "device"),
    [pytest.param(pair, "cpu", id=pair_id(pair)) for pair in PAIRS]
    + [pytest.param(pair, "cuda", id=pair_id(pair) + "-cuda", marks=ON_A_GPU) for pair in TRAINED[:4] + ODD],
)


@pytest.fixture
def gathering(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on other devices, on a CPU as well."""

    def resampler(
        like: torch.Tensor, source: Grid, target: Grid, antialias: bool, adjoint: bool = False
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        taps = frame_taps(like, source, target, antialias, adjoint)
        return lambda frames: gather(frames, taps)

    monkeypatch.setattr("crepa_kernels.ops.layer_norm_resample.resampler", resampler)


def gathered(tokens: torch.Tensor, source: Grid, target: Grid, antialias: bool, adjoint: bool = False) -> torch.Tensor:
    taps = frame_taps(tokens, source, target, antialias, adjoint)
    return gather(fallback.widened(tokens), taps).to(tokens.dtype)


class Watch(TorchDispatchMode):
    """Names of the operators that run, but for views, and the most bytes that an fp32 result takes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.widened = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.names.add(func.overloadpacket.__name__)
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                    self.widened = max(self.widened, 4 * tensor.numel())
        return out


@pytest.mark.every(3)
@each_filter
@each_pair_and_device
def test_every_row_is_the_exact_sum_rounded_once(pair: tuple[Grid, Grid], antialias: bool, device: str) -> None:
    source, target = pair
    for dtype, adjoint in itertools.product(TYPES, (False, True)):
        tokens = draw(target if adjoint else source, dtype, channels=4)
        right = exact_adjoint if adjoint else exact
        expected, scale = (right(each, source, target, antialias) for each in (tokens, tokens.abs()))
        on_device = tokens.to(device)
        found = gathered(on_device, source, target, antialias, adjoint)
        assert found.dtype == dtype
        assert_rounded(found.cpu(), expected, scale, TERMS)
        assert torch.equal(found, gathered(on_device, source, target, antialias, adjoint))
        # No less exact than interpolation in fp32, whose result is rounded once as well.
        peer = resample(fallback.widened(tokens), source, target, antialias, adjoint).to(dtype)
        off, peer_off = ((rows.cpu().double() - expected).abs().max() for rows in (found, peer))
        few_roundings = 3 * torch.finfo(scale.dtype if dtype == torch.float64 else torch.float32).eps * scale.max()
        assert off <= 2 * peer_off + few_roundings


@each_filter
@each_small_pair
def test_derivatives(pair: tuple[Grid, Grid], antialias: bool) -> None:
    tokens = draw(pair[0], torch.float64, channels=2).requires_grad_()
    grad = draw(pair[1], torch.float64, channels=2)
    assert torch.autograd.gradcheck(lambda each: gathered(each, *pair, antialias), tokens)
    (expected,) = torch.autograd.grad(gathered(tokens, *pair, antialias), tokens, grad)
    torch.testing.assert_close(gathered(grad, *pair, antialias, adjoint=True), expected, rtol=0, atol=1e-14)


@each_type
def test_memory_in_any_layout(dtype: torch.dtype) -> None:
    source, target = (5, 4), (3, 6)
    tokens = draw(source, dtype, channels=6, frames=3)
    layouts = {
        "contiguous": tokens,
        "channels first": tokens.mT.contiguous().mT,
        "batch inside": tokens.transpose(0, 1).contiguous().transpose(0, 1),
        "every other channel": tokens.repeat_interleave(2, dim=-1)[..., ::2],
        "expanded": tokens[:1].expand(3, -1, -1),
    }
    for name, laid in layouts.items():
        found = gathered(laid, source, target, True)
        expected, scale = (exact(each, source, target, True) for each in (laid, laid.abs()))
        assert_rounded(found, expected, scale, TERMS)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(gathered(laid, source, target, True), found), name


@each_device
@each_filter
@each_type
@pytest.mark.parametrize("masked", [False, True], ids=["all frames", "masked"])
@pytest.mark.parametrize("pair", [((15, 26), (8, 8)), ((15, 26), (18, 18)), ((5, 7), (9, 3))], ids=pair_id)
def test_layer_norm_with_it_is_rounded_once(
    pair: tuple[Grid, Grid], masked: bool, dtype: torch.dtype, antialias: bool, device: str, gathering: None
) -> None:
    """Statistics, the rows between the two steps and all sums are wide, whatever the tokens' type."""
    tokens, grad = draw(pair[0], dtype, channels=37), draw(pair[1], dtype, channels=37)
    wide = tokens.to(torch.float64, copy=True).requires_grad_()
    expected = exact(exact_layer_norm(wide, 1e-5), *pair, antialias)
    (dh,) = torch.autograd.grad(expected, wide, grad.double())
    magnitude = exact(exact_layer_norm(tokens, 1e-5).abs(), *pair, antialias)
    scale = exact_adjoint(grad.abs(), *pair, antialias) + 1
    tokens, grad, in_loss = tokens.to(device), grad.to(device), None
    if masked:
        in_loss = torch.tensor([True, False], device=device)
        tokens[1] = grad[1] = torch.nan
    out, mean, inverse_std = normalize_and_resample(tokens, *pair, antialias, 1e-5, in_loss)
    found = in_new_memory(normalize_and_resample_into)(grad, tokens, mean, inverse_std, *pair, antialias, in_loss)
    assert mean.dtype == inverse_std.dtype == torch.promote_types(dtype, torch.float32)
    for rows, right, size in ((out, expected.detach(), magnitude), (found, dh, 12 * scale)):
        assert rows.dtype == dtype
        inside = 1 if masked else 2
        assert_rounded(rows[:inside].cpu(), right[:inside], size[:inside] + 1, TERMS)
        assert (rows[inside:] == 0).all()
    again = in_new_memory(normalize_and_resample_into)(grad, tokens, mean, inverse_std, *pair, antialias, in_loss)
    assert torch.equal(found, again)


def test_parts_of_a_few_frames_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch, gathering: None) -> None:
    source, target, in_loss = (5, 4), (3, 6), torch.tensor([[True, False, True], [True, True, False]])
    tokens, grad = (draw(grid, torch.bfloat16, frames=6).unflatten(0, (2, 3)) for grid in (source, target))

    def results() -> list[torch.Tensor]:
        out, mean, inverse_std = normalize_and_resample(tokens, source, target, True, 1e-5, in_loss)
        statistics = (mean, inverse_std)
        dh = in_new_memory(normalize_and_resample_into)(grad, tokens, *statistics, source, target, True, in_loss)
        return [out, *statistics, dh]

    whole = results()
    # Frames are of 20 x 11 fp32 numbers: 4 and then 2 at once, and one at once where not even one fits.
    for limit in (4 * 20 * 11 * 4, 1):
        monkeypatch.setattr(fallback, "PART_BYTES", limit)
        assert all(map(torch.equal, results(), whole))


def calls_on(device: str, dtype: torch.dtype, frames: int, channels: int) -> list[Callable[[], Any]]:
    """Everything that runs without the extension, on 16x16 tokens to 6x8 and back."""
    source, target = (16, 16), (6, 8)
    tokens, grad = (draw(grid, dtype, channels, frames).to(device) for grid in (source, target))
    in_loss = torch.ones(frames, device=device, dtype=torch.bool)
    mean = torch.ones(frames, 256, device=device, dtype=torch.promote_types(dtype, torch.float32))
    geometry = (source, target, True)
    return [
        lambda: resample(tokens, *geometry),
        lambda: resample(grad, *geometry, adjoint=True),
        lambda: normalize_and_resample(tokens, *geometry, 1e-5, in_loss)[0],
        lambda: in_new_memory(normalize_and_resample_into)(grad, tokens, mean, mean, *geometry, in_loss, mean[0, 0]),
    ]


@each_type
def test_a_device_is_asked_for_no_atomics_no_products_and_no_wait(dtype: torch.dtype) -> None:
    """No interpolation, whose backward pass adds atomically, and nothing that TF32 or autocast could round.

    Nor is anything read from the device or copied to it: a CUDA graph can capture any call.
    """
    arithmetic = {
        "abs_", "add", "clamp_", "clamp_min_", "div", "div_", "eq", "masked_fill_", "mul", "mul_", "rsub", "sub", "sum",
        "where", "gather", "native_layer_norm", "native_layer_norm_backward", "_embedding_bag_forward_only",
    }  # fmt: skip
    memory = {"arange", "copy_", "_to_copy", "empty_like", "new_empty", "promote_types", "repeat", "scalar_tensor"}
    for call in calls_on("meta", dtype, frames=2, channels=4):
        with Watch() as watch:
            call()
        assert "_embedding_bag_forward_only" in watch.names
        assert watch.names <= arithmetic | memory


def test_only_some_frames_are_widened_at_a_time() -> None:
    """Of 128 frames, 64 MiB in fp32."""
    for call in calls_on("meta", torch.bfloat16, frames=128, channels=512):
        with Watch() as watch:
            call()
        assert watch.widened == 32 << 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@each_type
def test_a_graph_captures_it(dtype: torch.dtype) -> None:
    for call in calls_on("cuda", dtype, frames=2, channels=40):
        expected, graph = call(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for _ in range(2):
            captured.fill_(torch.nan)
            graph.replay()
            assert torch.equal(captured, expected)
