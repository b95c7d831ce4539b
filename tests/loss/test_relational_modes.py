"""What the relational loss is, by its equation written out and by problems that must have the same answer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import GRADIENTS
from oracle import row_norms
from relational import PAIRS, Related, Tensors, relational_truth, simply_related
from torch import nn

from benches.eager import eager_relations
from benches.measure import peak_bytes
from crepa_kernels import CrepaProjector, relational_loss
from crepa_kernels.ops import relation

pytestmark = pytest.mark.usefixtures("one_thread")
both_backends = pytest.mark.parametrize("backend", ["reference", "torch"])
every_pairs = pytest.mark.parametrize("pairs", PAIRS)
each_cost = pytest.mark.parametrize("margin", [None, 0.1], ids=["squared", "margin"])


@both_backends
def test_all_pairs_are_the_mean_over_all_tokens_of_the_clip(backend: str) -> None:
    """The mean square of the N x N differences; VideoREPA's with a margin, with its 0.1."""
    case = simply_related(teacher_grid=(3, 4)).case
    tensors = case.tensors(torch.float64)
    projector, grids = case.projector(tensors), {"student_grid": (3, 4), "teacher_grid": (3, 4)}
    p, y = (rows / row_norms(rows) for rows in (projector(tensors["h"]), tensors["y"]))
    p, y = p.flatten(1, 2), y.flatten(1, 2)
    difference = p @ p.mT - y @ y.mT
    squared = relational_loss(tensors["h"], tensors["y"], projector, **grids, backend=backend)
    torch.testing.assert_close(squared, difference.square().mean(), rtol=1e-12, atol=0)
    margin = relational_loss(tensors["h"], tensors["y"], projector, **grids, margin=0.1, backend=backend)
    torch.testing.assert_close(margin, (difference.abs() - 0.1).clamp(min=0).mean(), rtol=1e-12, atol=0)


@each_cost
def test_the_form_that_is_measured_against_is_the_same_loss(margin: float | None) -> None:
    related = simply_related(margin=margin, teacher_grid=(3, 4))
    tensors = related.case.tensors(torch.float64)
    loss = eager_relations(tensors["h"], tensors["y"], related.case.projector(tensors), margin)
    exact = relational_truth(related, tensors).results["loss"]
    torch.testing.assert_close(loss.detach(), exact, rtol=1e-12, atol=0)


@both_backends
@each_cost
def test_all_pairs_are_those_within_frames_and_across_them(margin: float | None, backend: str) -> None:
    """Four of sixteen pairs of frames are a frame with itself; neighbours of no decay are all, of distance 0 none."""
    case = simply_related().case
    tensors = case.tensors(torch.float64)

    def loss(pairs: str, **changes: Any) -> torch.Tensor:
        return Related(replace(case, **changes), pairs, margin).run(tensors, backend)["loss"]

    close = {"rtol": 1e-12, "atol": 0.0}
    torch.testing.assert_close(loss("all"), (loss("frame") + 3 * loss("cross")) / 4, **close)
    torch.testing.assert_close(loss("neighbours", distance=2**62, tau=1e300), loss("all"), **close)
    torch.testing.assert_close(loss("neighbours", distance=0), loss("frame"), **close)
    torch.testing.assert_close(loss("neighbours", tau=1e-50), loss("frame"), **close)
    # exp(-1) for each of the six pairs at distance 1, beside the four of distance 0.
    one = 10 * loss("neighbours", tau=1e300) - 4 * loss("frame")
    expected = (4 * loss("frame") + math.exp(-1) * one) / (4 + 6 * math.exp(-1))
    torch.testing.assert_close(loss("neighbours"), expected, **close)


@both_backends
def test_a_margin_that_nothing_exceeds_costs_nothing(backend: str) -> None:
    related = simply_related(margin=2.0)
    found = related.run(related.case.tensors(torch.float32), backend)
    assert all((value == 0).all() for value in found.values())


@both_backends
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_the_slope_at_the_margin_is_zero(margin: float, backend: str) -> None:
    """Student rows e1, e1 and teacher rows e1, r with <e1, r> = 1 - margin: |a| is the margin, in binary exactly."""
    y = torch.tensor([[1.0, 0.0], [1 - margin, math.sqrt(1 - (1 - margin) ** 2)]], dtype=torch.float64)[None, None]
    h = torch.tensor([[2.0, 0.0, -2.0, 0.0], [2.0, 0.0, -2.0, 0.0]], dtype=torch.float64)[None, None].requires_grad_()
    projector = nn.Sequential(nn.LayerNorm(4, 0.0, False), nn.Linear(4, 2, False)).double()
    with torch.no_grad():
        projector[1].weight.copy_(torch.eye(2, 4))
    grids = {"student_grid": (1, 2), "teacher_grid": (1, 2)}
    loss = relational_loss(h, y, projector, **grids, margin=margin, backend=backend)
    assert loss == 0
    assert not torch.autograd.grad(loss, h)[0].any()


def near(size: float, features: int, tokens: tuple[int, int]) -> tuple[Related, Tensors]:
    """fp32 inputs whose student rows differ from the teacher's by about ``size``, of a projector that does nothing."""
    related = simply_related(
        batch=1, frames=5, teacher_frames=5, student_grid=tokens, teacher_grid=tokens, hidden_size=features,
        feature_size=features, affine="none", linear_bias=False,
    )  # fmt: skip
    tensors = related.case.tensors(torch.float64)
    h = tensors["h"]
    x = (h - h.mean(dim=-1, keepdim=True)) / h.std(dim=-1, correction=0, keepdim=True)
    tensors |= {"y": x + size * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()}
    tensors["weight"] = torch.eye(features).double()
    return related, {name: None if tensor is None else tensor.float() for name, tensor in tensors.items()}


@every_pairs
@pytest.mark.parametrize("features", [16, 64])
@pytest.mark.parametrize("size", [1.0, 1e-1, 1e-2, 1e-3])
def test_a_student_near_the_teacher_loses_no_digits(size: float, features: int, pairs: str) -> None:
    """fp32 against float64: 1e-5 of the loss, where the difference of two products would lose all at 1e-3."""
    related, tensors = near(size, features, (6, 8))
    related = replace(related, pairs=pairs)
    exact = relational_truth(related, tensors).results["loss"]
    found = related.run(tensors, "torch")["loss"]
    assert abs(found.double() - exact) <= 1e-5 * exact


@every_pairs
def test_rows_that_are_turned_as_one_cost_nothing(pairs: str) -> None:
    related, tensors = near(0.0, 32, (6, 8))
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(2)).double())[0]
    tensors["y"] = (tensors["y"].double() @ turn).float()
    # Cosines that are right to 1e-7, squared, would be 1e-14; a sum of E x E products has that of its largest term.
    assert abs(replace(related, pairs=pairs).run(tensors, "torch")["loss"]) <= 1e-8


PADDED = {"equal": {"teacher_grid": (3, 4)}, "teacher": {}, "student": {"spatial_align": "teacher"}}


@pytest.mark.every(5)
@both_backends
@each_cost
@every_pairs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fill", [0.0, math.nan, math.inf], ids=str)
@pytest.mark.parametrize(("options", "front"), [("equal", 2), ("teacher", 0), ("student", 1)])
def test_a_padded_clip_is_its_own_unpadded_self(
    options: str, front: int, fill: float, dtype: torch.dtype, pairs: str, margin: float | None, backend: str
) -> None:
    """Whatever the padding holds, and not a trace of it in a gradient."""
    related = simply_related(pairs, margin, batch=1, distance=2, **PADDED[options])
    tensors = related.case.tensors(dtype)
    own = related.run(tensors, backend)

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        wide = torch.full((1, 7, *tensor.shape[2:]), fill, dtype=dtype)
        wide[:, front : front + 4] = tensor
        return wide

    mask = torch.zeros(1, 7, dtype=torch.bool)
    mask[:, front : front + 4] = True
    case = replace(related.case, frames=7, teacher_frames=7, frame_mask=mask, teacher_mask=mask)
    other = {**tensors, "h": padded(tensors["h"]), "y": padded(tensors["y"])}
    found = replace(related, case=case).run(other, backend)
    assert not found["h"][~mask].any()
    found["h"] = found["h"][:, front : front + 4]
    for name in ("loss", *GRADIENTS):
        # 8 roundings: products of another number of rows may be summed in another order.
        error = (found[name] - own[name]).double().norm()
        assert error <= 8 * torch.finfo(dtype).eps * own[name].double().norm(), name


@both_backends
@each_cost
@every_pairs
def test_clips_of_other_lengths_in_a_batch_do_not_touch_each_other(
    pairs: str, margin: float | None, backend: str
) -> None:
    """The loss is the mean of the clips' own, each gradient its clip's share; a clip without a pair is in none."""
    lengths = [4, 1, 3]
    mask = torch.arange(4)[None, :] < torch.tensor(lengths)[:, None]
    related = simply_related(pairs, margin, batch=3, frame_mask=mask, teacher_mask=mask, distance=2)
    tensors = related.case.tensors(torch.float64)
    together = related.run(tensors, backend)
    clips = [clip for clip, length in enumerate(lengths) if pairs != "cross" or length > 1]
    losses = []
    for clip in clips:
        changes = {"batch": 1, "frames": lengths[clip], "teacher_frames": lengths[clip]}
        case = replace(related.case, frame_mask=None, teacher_mask=None, **changes)
        own = {**tensors, **{name: tensors[name][clip : clip + 1, : lengths[clip]] for name in ("h", "y")}}
        found = replace(related, case=case).run(own, backend)
        losses.append(found["loss"])
        share = found["h"][0] / len(clips)
        torch.testing.assert_close(together["h"][clip, : lengths[clip]], share, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(together["loss"], torch.stack(losses).mean(), rtol=1e-12, atol=0)


@both_backends
@every_pairs
def test_a_frame_outside_one_mask_is_as_if_it_were_not_there(pairs: str, backend: str) -> None:
    """A conditioning frame is a teacher frame that exists: its relations are nobody's all the same."""
    keep = torch.tensor([[False, True, True, True]]).expand(2, 4)
    related = simply_related(pairs, frame_mask=keep)
    tensors = related.case.tensors(torch.float64)
    tensors["y"][:, 0] = torch.nan
    found = related.run(tensors, backend)
    case = replace(related.case, frames=3, teacher_frames=3, frame_mask=None)
    own = {**tensors, "h": tensors["h"][:, 1:], "y": tensors["y"][:, 1:]}
    expected = replace(related, case=case).run(own, backend)["loss"]
    torch.testing.assert_close(found["loss"], expected, rtol=1e-12, atol=0)
    assert not found["h"][:, 0].any()


@both_backends
@each_cost
@every_pairs
def test_a_batch_without_a_frame_has_loss_zero_and_zero_gradients(
    pairs: str, margin: float | None, backend: str
) -> None:
    related = simply_related(pairs, margin, frame_mask=torch.zeros(2, 4, dtype=torch.bool))
    tensors = related.case.tensors(torch.float32)
    tensors["h"].fill_(torch.nan)
    assert all((value == 0).all() for value in related.run(tensors, backend).values())


@both_backends
@each_cost
def test_one_frame_has_no_pairs_across_frames(margin: float | None, backend: str) -> None:
    related = simply_related("cross", margin, frames=1, teacher_frames=1)
    found = related.run(related.case.tensors(torch.float32), backend)
    assert all((value == 0).all() for value in found.values())


@both_backends
@each_cost
@every_pairs
@pytest.mark.parametrize("side", ["h", "y"])
def test_one_nan_makes_the_loss_nan(side: str, pairs: str, margin: float | None, backend: str) -> None:
    related = simply_related(pairs, margin)
    tensors = related.case.tensors(torch.float32)
    tensors[side][1, 2, 3, 4] = torch.nan
    found = related.run(tensors, backend)
    assert found["loss"].isnan()
    if backend == "torch":  # PyTorch's own slope of |NaN| is 0
        assert found["h"][1, 2].isnan().any()


@both_backends
@pytest.mark.parametrize("large", ["y", "weight", "h"])
def test_a_norm_that_overflows_is_no_finite_loss(large: str, backend: str) -> None:
    related = simply_related()
    tensors = related.case.tensors(torch.float32)
    tensors[large] *= 1e20
    assert not related.run(tensors, backend)["loss"].isfinite()


@both_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_zero_rows_have_no_nan(dtype: torch.dtype, backend: str) -> None:
    related = simply_related(affine="none", linear_bias=False)
    tensors = related.case.tensors(dtype)
    tensors["h"].zero_()
    found = related.run(tensors, backend)
    assert found["loss"] > 0
    assert not any(value.isnan().any() for value in found.values())


def rows_of_a_clip(dtype: torch.dtype, features: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Z and Z - Y of five frames of seven tokens; the third frame is not in the loss."""
    generator = torch.Generator().manual_seed(0)
    z, y = torch.nn.functional.normalize(torch.randn(2, 5, 7, features, generator=generator).double(), dim=-1)
    z[2] = y[2] = 0
    return z.to(dtype), (z - y).to(dtype)


OFFSETS = {
    "all": dict.fromkeys(range(5), 1.0),
    "frame": {0: 1.0},
    "cross": dict.fromkeys(range(1, 5), 1.0),
    "neighbours": {0: 1.0, 1: 0.5, 2: 0.25},
    "far": {3: 0.5},
}


def related_frames(
    rows: tuple[torch.Tensor, torch.Tensor], offsets: dict[int, float], margin: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    gradient = torch.full_like(rows[0], math.nan, dtype=torch.promote_types(rows[0].dtype, torch.float32))
    args = (*rows, list(offsets), list(offsets.values()), margin)
    loss = relation.relate_frames_op(*args, gradient)
    assert torch.equal(loss, relation.relate_frames_op(*args, gradient[:0])) or margin is None
    return loss, gradient


@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("tile", [1, 10, 49, 200, 10**6])
@each_cost
def test_the_ways_and_tiles_change_nothing(
    offsets: dict[int, float], tile: int, margin: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By features and by tokens, in tiles that part a frame or hold many: the definition's number."""
    rows = z, d = rows_of_a_clip(torch.float64)
    z = z.clone().requires_grad_()
    y = z.detach() - d
    expected: Any = 0.0
    for f in range(5):
        for k in range(5):
            a = z[f] @ z[k].mT - y[f] @ y[k].mT
            cost = a.square() if margin is None else torch.relu(a.abs() - margin)
            expected = expected + offsets.get(abs(f - k), 0.0) * cost.mean()
    (slope,) = torch.autograd.grad(expected, z)
    monkeypatch.setitem(relation.TILE, "cpu", tile)
    for by_tokens in (True, False):
        monkeypatch.setattr(relation, "prefers_tokens", lambda *_, by_tokens=by_tokens: by_tokens)
        loss, gradient = related_frames(rows, offsets, margin)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient, 7 * slope, rtol=1e-11, atol=1e-13)


def test_wide_features_are_multiplied_by_quarters() -> None:
    """An odd number of them, of which the halves are wide enough once and the quarters are not."""
    rows = rows_of_a_clip(torch.float64, 301)[1].flatten(0, 1)
    torch.testing.assert_close(relation.gram(rows), rows.mT @ rows, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("features", [4, 40])
@each_cost
def test_16_bit_rows_are_summed_in_fp32(offsets: dict[int, float], features: int, margin: float | None) -> None:
    """As a GPU multiplies them: what rounding their slopes to bf16 costs a gradient is one part in 2^8, and no sum."""
    rows = rows_of_a_clip(torch.bfloat16, features)
    loss, gradient = related_frames(rows, offsets, margin)
    exact, slope = related_frames((rows[0].double(), rows[1].double()), offsets, margin)
    assert loss.dtype == gradient.dtype == torch.float32
    assert abs(loss - exact) <= 2**-8 * exact  # Y = Z - D is rounded to bf16 again
    if margin is None:
        assert (gradient - slope).norm() <= 2**-7 * slope.norm()


MEASURED = {"grid": (16, 16), "frames": 6, "features": 48}  # N = 1536: a matrix of N x N has 9.4 MB


def step(backend: str, pairs: str, margin: float | None) -> Any:
    torch.manual_seed(0)
    grid, frames, features = MEASURED.values()
    h = torch.randn(1, frames, 256, 32, requires_grad=True)
    y, projector = torch.randn(1, frames, 256, features), CrepaProjector(32, features)

    def run() -> None:
        options = {"student_grid": grid, "teacher_grid": grid, "pairs": pairs, "margin": margin, "backend": backend}
        relational_loss(h, y, projector, **options).backward()
        h.grad = None
        projector.zero_grad()

    return run


@each_cost
@every_pairs
def test_no_matrix_of_all_tokens_is_made(pairs: str, margin: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of forward and backward is some rows and a tile: a quarter of one such matrix; theirs are six."""
    monkeypatch.setitem(relation.TILE, "cpu", 1 << 16)
    matrix = 4 * (MEASURED["frames"] * 256) ** 2
    assert peak_bytes(step("torch", pairs, margin)) <= matrix / 4 + 4 * 4 * (1 << 16)
    assert peak_bytes(step("reference", pairs, margin)) >= 4 * matrix
