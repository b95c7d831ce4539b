"""The relational loss's kernels against float64: over drawn configurations, and their tiles against every pair.

CI draws every tenth configuration, ``make test-full`` all of them. One again:
``pytest tests/loss/test_triton_relational.py -k seed17``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from cases import GRADIENTS
from devices import on_each_device
from relational import PAIRS, Related, draw_related, relational_truth, simply_related
from test_loss_autograd import HOLES
from test_relational import check
from test_relational_autograd import check_compiled
from test_relational_modes import OFFSETS, rows_of_a_clip
from test_triton import NARROW, to

from crepa_kernels.backends.triton import relational, self_check, tiles
from crepa_kernels.backends.triton.launch import recorded
from crepa_kernels.backends.triton.pair_tiles import relate
from crepa_kernels.backends.triton.relational import relate_tiles_op
from crepa_kernels.backends.triton.tiles import PairTiles, ProductTile
from crepa_kernels.ops import relation

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIGURATIONS = 200
IN_CI = CONFIGURATIONS // 10
MARGINS = (0.0, 0.05, 0.1, 0.4)
SMALL = PairTiles(ProductTile(16, 16, 16, 1, 1), ProductTile(16, 16, 16, 1, 1))
seeds = pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, id=f"seed{seed}", marks=[] if seed < IN_CI else pytest.mark.slow)
        for seed in range(CONFIGURATIONS)
    ],
)


def draw_margin(seed: int) -> Related:
    related = draw_related(seed)
    return related if related.margin is not None else replace(related, margin=MARGINS[seed % len(MARGINS)])


@on_each_device
@seeds
def test_errors_are_those_of_eager_arithmetic_in_the_same_type(seed: int, device: str) -> None:
    """Each seed takes one type; all of them come round. At most max(2 x eager's, 8 eps x the norm)."""
    related, dtype = draw_margin(seed), NARROW[seed // 4 % 3]
    tensors = related.case.tensors(dtype)
    found = to("cpu", related.run(to(device, tensors), "triton"))
    for name, value in found.items():
        assert not value.isnan().any(), f"{name} is NaN in {related}"
    exact = relational_truth(related, tensors)
    eps = torch.finfo(dtype).eps
    if exact.cancelled * eps > 0.1:
        return  # nothing is left of a row of p in this type, and its direction is anybody's
    if related.case.tiny and dtype == torch.float16:
        return  # which has no such weights
    check(related, tensors, exact, found, "triton", eps)


def rows_of(dtype: torch.dtype, frames: int, tokens: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Z and Z - Y of unit length, rounded to ``dtype``; the second frame is not in the loss."""
    generator = torch.Generator().manual_seed(tokens)
    z, y = torch.nn.functional.normalize(torch.randn(2, frames, tokens, features, generator=generator), dim=-1)
    if frames > 1:
        z[1] = y[1] = 0
    return z.to(dtype), (z - y).to(dtype)


def every_pair(
    z: torch.Tensor, d: torch.Tensor, weights: dict[int, float], margin: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient, times M, in float64 from matrices of all tokens by all tokens."""
    z, d = z.double().requires_grad_(), d.double()
    y, total = (z - d).detach(), torch.zeros((), dtype=torch.float64)
    for f in range(len(z)):
        for k in range(len(z)):
            a = z[f] @ z[k].mT - y[f] @ y[k].mT
            total = total + weights.get(abs(f - k), 0.0) * torch.relu(a.abs() - margin).mean()
    return total.detach(), z.shape[1] * torch.autograd.grad(total, z)[0]


@pytest.fixture(params=[(1 << 20, SMALL), (600, SMALL), (1 << 20, None)], ids=["one tile", "parts", "as chosen"])
def in_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 16 x 16, with all pairs of tokens in memory at a time or 600 of them; or those of the interpreter."""
    size, choice = request.param
    monkeypatch.setitem(relation.TILE, "cpu", size)
    if choice is not None:
        monkeypatch.setattr("crepa_kernels.backends.triton.pair_tiles.choose_pair_tiles", lambda *_: choice)


@pytest.mark.every(5)
@pytest.mark.usefixtures("in_tiles", "nan_in_new_memory")
@pytest.mark.parametrize("pairs", ["frame", "neighbours"])
@pytest.mark.parametrize(
    ("dtype", "frames", "tokens", "features"),
    [(torch.float32, 2, 35, 17), (torch.bfloat16, 2, 33, 32), (torch.float16, 3, 1, 1), (torch.float32, 1, 16, 16)],
)
def test_tiles_of_every_odd_size(dtype: torch.dtype, frames: int, tokens: int, features: int, pairs: str) -> None:
    """Y = Z - D is rounded to the rows' type once; slopes are signs, exact in each. Not a number outside is read."""
    weights = {offset: weight for offset, weight in OFFSETS[pairs].items() if offset < frames}
    z, d = rows_of(dtype, frames, tokens, features)
    exact, slope = every_pair(z, d, weights, 0.05)
    gradient = torch.full(z.shape, math.nan)
    found = relate_tiles_op(z, d, list(weights), list(weights.values()), 0.05, gradient)
    assert torch.equal(found, relate_tiles_op(z, d, list(weights), list(weights.values()), 0.05, gradient[:0]))
    # Interpreted products round nothing; beside the margin a slope of two may have the other side's.
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=1e-5)


def test_one_nan_makes_the_loss_and_its_rows_gradient_nan() -> None:
    z, d = rows_of(torch.bfloat16, 2, 20, 8)
    z[0, 3, 4] = math.nan
    gradient = torch.zeros(z.shape)
    assert relate_tiles_op(z, d, [0], [1.0], 0.1, gradient).isnan()
    assert gradient[0].isnan().all()
    assert gradient[1].isfinite().all()


def test_frames_that_are_not_compared_are_not_visited() -> None:
    """By the launches: the numbers that are multiplied are those of the pairs of frames that have a weight."""
    z = torch.empty(21, 1560, 768, dtype=torch.bfloat16, device="meta")
    gradient = torch.empty_like(z, dtype=torch.float32)

    def operations(weights: dict[int, float]) -> float:
        with recorded() as launches:
            relate(z, z, gradient, weights, 0.1, 1.0, tiles.pair_tiles(2, 227 * 1024))
        return sum(launch.operations for launch in launches) / (2 * 1560**2 * 768)

    # Of a frame with itself half of the two products, and one for its gradient; of two frames two and two.
    assert operations({0: 1.0}) == pytest.approx(21 * 2, rel=0.05)
    assert operations({0: 1.0, 1: 0.5}) == pytest.approx(21 * 2 + 20 * 4, rel=0.05)
    assert operations(dict.fromkeys(range(21), 1.0)) == pytest.approx(2 * 21**2, rel=0.05)


def test_the_definition_has_twice_the_operations_and_its_matrices() -> None:
    """At Wan's 480p tokens: every tile of a launch is a thirtieth of what one matrix of all by all would hold."""
    z = torch.empty(21, 1560, 768, dtype=torch.bfloat16, device="meta")
    gradient, choice = torch.empty_like(z, dtype=torch.float32), tiles.pair_tiles(2, 227 * 1024)
    with recorded() as launches:
        relate(z, z, gradient, dict.fromkeys(range(21), 1.0), 0.1, 1.0, choice)
    matrix = 2 * (21 * 1560) ** 2
    slopes = max(launch.arguments["slopes"].nbytes for launch in launches if launch.name == "differences")
    assert slopes <= matrix / 30
    # Two products of N x N x E each way are eight of these; ours are four in halves.
    assert sum(launch.operations for launch in launches) <= 1.05 * 4 * (21 * 1560) ** 2 * 768


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    z, d = rows_of_a_clip(dtype)
    for gradient in (torch.empty(z.shape), torch.empty(0)):
        arguments = (z, d, [0, 2], [1.0, 0.5], 0.1, gradient)
        torch.library.opcheck(relate_tiles_op, arguments)


@pytest.mark.parametrize("pairs", [p if p == "neighbours" else pytest.param(p, marks=pytest.mark.slow) for p in PAIRS])
def test_compiled_without_a_graph_break(pairs: str) -> None:
    related = simply_related(pairs, 0.1, distance=2, frame_mask=HOLES)
    check_compiled(related, "triton", backend="aot_eager")


def test_two_runs_are_bitwise_equal() -> None:
    related = simply_related("neighbours", 0.05, distance=2, frame_mask=HOLES)
    tensors = related.case.tensors(torch.bfloat16)
    one, two = (related.run(tensors, "triton") for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in ("loss", *GRADIENTS))


def test_squares_are_the_same_algebra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relational, "relate_tiles_op", None)
    related = simply_related("neighbours")
    tensors = related.case.tensors(torch.float32)
    ours, theirs = (related.run(tensors, backend) for backend in ("triton", "torch"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(ValueError, match="no squares"):
        relate_tiles_op(*rows_of(torch.float32, 1, 2, 3), [0], [1.0], None, torch.empty(0))


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``auto`` tries the interpreter as it would a GPU."""
    self_check.forget()
    monkeypatch.setattr(self_check, "interpreting", lambda: False)
    yield
    self_check.forget()


@pytest.mark.usefixtures("trusting")
def test_auto_takes_the_kernels_of_a_margin_after_their_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "FEWEST_ROWS", 20)
    calls: list[torch.Size] = []
    op = relational.relate_tiles_op
    monkeypatch.setattr(relational, "relate_tiles_op", lambda *given: calls.append(given[0].shape) or op(*given))
    tensors = simply_related().case.tensors(torch.float32)
    squared = simply_related("neighbours").run(tensors, "auto")["loss"]
    assert not calls
    assert torch.equal(squared, simply_related("neighbours").run(tensors, "torch")["loss"])
    simply_related("neighbours", 0.1).run(tensors, "auto")
    assert len(calls) == 2  # clips
    (answer,) = [key for key in self_check.answers if "pairs" in key]
    assert self_check.answers[answer] is None


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize(
    ("wrong", "message"), [("loss", "its loss differs"), ("gradient", "its gradient of rows"), ("raise", "broken")]
)
def test_a_kernel_that_is_wrong_is_found(
    wrong: str, message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One WARNING, and ``torch`` from then on."""
    monkeypatch.setattr(self_check, "FEWEST_ROWS", 20)
    op = relate_tiles_op

    def broken(*given: object) -> torch.Tensor:
        if wrong == "raise":
            raise RuntimeError("broken")
        found = op(*given)
        if wrong == "gradient":
            given[-1].mul_(1.01)
        return found * 1.01 if wrong == "loss" else found

    monkeypatch.setattr(self_check, "relate_tiles_op", broken)
    related = simply_related("neighbours", 0.1)
    tensors = related.case.tensors(torch.float32)
    found = [related.run(tensors, "auto")["loss"] for _ in range(2)]
    assert torch.equal(found[0], related.run(tensors, "torch")["loss"])
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert message in warnings[0]
    assert "relational_loss" in warnings[0]
