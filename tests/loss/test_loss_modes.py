"""What the options mean, by numbers worked out by hand and by problems that must have the same answer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import GRADIENTS, Case, simple
from oracle import METRICS, grid_weights, row_norms, truth
from torch import nn

from crepa_kernels import CrepaOutput, CrepaProjector, crepa_loss, resample_tokens, similarity_matrix

pytestmark = pytest.mark.usefixtures("one_thread")
both_backends = pytest.mark.parametrize("backend", ["reference", "torch"])
W1, W2 = math.exp(-1), math.exp(-2)


def frames_apart(matrix: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor, nn.Module]:
    """Inputs whose similarity matrix (student frame x teacher frame) is ``matrix``: one token, fp64.

    LayerNorm and an identity Linear turn h = (v, -v) into itself, scaled; the teacher holds unit vectors.
    """
    s = torch.tensor(matrix, dtype=torch.float64)
    frames = len(matrix)
    rest = (1 - (s**2).sum(dim=1)).sqrt()  # makes each student row a unit vector
    student = torch.cat([s, rest[:, None]], dim=1)
    h = torch.cat([student, -student], dim=1)[None, :, None]
    y = torch.cat([torch.eye(frames, frames + 1), torch.zeros(frames, frames + 1)], dim=1).double()[None, :, None]
    width = 2 * (frames + 1)
    projector = nn.Sequential(nn.LayerNorm(width, 0.0, False), nn.Linear(width, width, False)).double()
    with torch.no_grad():
        projector[1].weight.copy_(torch.eye(width))
        projector[1].weight[frames + 1 :] = 0
    return h, y, projector


MATRIX = [[0.5, 0.1, 0.2, 0.3], [0.4, 0.6, 0.1, 0.2], [0.3, 0.2, 0.7, 0.1], [0.1, 0.4, 0.3, 0.8]]


@both_backends
@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({"distance": 0}, [0.5, 0.6, 0.7, 0.8]),
        ({"distance": 1}, [0.5 + W1 * 0.1, 0.6 + W1 * 0.5, 0.7 + W1 * 0.3, 0.8 + W1 * 0.3]),
        ({"distance": 2}, [0.5 + W2 * 0.2, 0.6 + W2 * 0.2, 0.7 + W2 * 0.3, 0.8 + W2 * 0.4]),
        (
            {"distance": 2, "cumulative": True},
            [
                0.5 + W1 * 0.1 + W2 * 0.2,
                0.6 + W1 * 0.5 + W2 * 0.2,
                0.7 + W1 * 0.3 + W2 * 0.3,
                0.8 + W1 * 0.3 + W2 * 0.4,
            ],
        ),
        # Clamped to 3 frames, and the weight is that of 3.
        ({"distance": 7}, [0.5 + math.exp(-3) * 0.3, 0.6, 0.7, 0.8 + math.exp(-3) * 0.1]),
        ({"distance": 2, "tau": 2.0}, [0.5 + W1 * 0.2, 0.6 + W1 * 0.2, 0.7 + W1 * 0.3, 0.8 + W1 * 0.4]),
    ],
    ids=["own-frame", "next", "second-next", "cumulative", "beyond-the-clip", "tau-2"],
)
def test_neighbours(options: dict[str, Any], total: list[float], backend: str) -> None:
    h, y, projector = frames_apart(MATRIX)
    grids = {"student_grid": (1, 1), "teacher_grid": (1, 1), "backend": backend}
    output = crepa_loss(h, y, projector, **grids, **options)
    close = {"rel": 1e-12}  # fp64
    assert output.loss.item() == pytest.approx(-sum(total) / 4, **close)
    assert output.alignment_score.item() == pytest.approx(sum(total) / 4, **close)
    assert output.self_similarity.item() == pytest.approx(2.6 / 4, **close)
    assert output.frame_similarity[0].tolist() == pytest.approx([0.5, 0.6, 0.7, 0.8], **close)
    # The sum of each frame's weights: how many neighbours it has at each offset.
    offsets = range(1, min(options["distance"], 3) + 1) if options.get("cumulative") else [min(options["distance"], 3)]
    tau = options.get("tau", 1.0)
    weights = [sum(math.exp(-o / tau) * ((f >= o) + (f + o < 4)) for o in offsets if o) for f in range(4)]
    mean = [t / (1 + w) for t, w in zip(total, weights, strict=True)]
    assert output.similarity.item() == pytest.approx(sum(mean) / 4, **close)
    divided = crepa_loss(h, y, projector, **grids, **options, normalize_neighbour_sum=True)
    assert divided.loss.item() == pytest.approx(-sum(mean) / 4, **close)
    assert divided.alignment_score.item() == pytest.approx(sum(mean) / 4, **close)
    assert divided.similarity.item() == pytest.approx(sum(mean) / 4, **close)
    summed = crepa_loss(h, y, projector, **grids, **options, normalize_by_frames=False)
    assert summed.loss.item() == pytest.approx(-sum(total), **close)
    assert summed.alignment_score.item() == pytest.approx(sum(total) / 4, **close)


@both_backends
def test_masks(backend: str) -> None:
    """Frame 0 is conditioning (a teacher for its neighbours, not in the loss), frame 3 padding; clip 1 has nothing."""
    h, y, projector = frames_apart(MATRIX)
    h, y = h.expand(2, -1, -1, -1), y.expand(2, -1, -1, -1)
    frame_mask = torch.tensor([[False, True, True, False], [False] * 4])
    teacher_mask = torch.tensor([[True, True, True, False], [False] * 4])
    options = {"student_grid": (1, 1), "teacher_grid": (1, 1), "backend": backend, "teacher_mask": teacher_mask}
    output = crepa_loss(h, y, projector, **options, frame_mask=frame_mask)
    total = [0.6 + W1 * (0.4 + 0.1), 0.7 + W1 * 0.2]
    mean = [total[0] / (1 + 2 * W1), total[1] / (1 + W1)]
    close = {"rel": 1e-12}  # fp64
    assert output.loss.item() == pytest.approx(-sum(total) / 2, **close)  # the empty clip is not in the batch mean
    assert output.similarity.item() == pytest.approx(sum(mean) / 2, **close)
    assert output.self_similarity.item() == pytest.approx(1.3 / 2, **close)
    expected = torch.tensor([[0, 0.6, 0.7, 0], [0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(output.frame_similarity, expected)
    # d = 3 is clamped to 3 existing frames - 1 = 2, with the weight of 2.
    clamped = crepa_loss(h, y, projector, **options, frame_mask=frame_mask, distance=3)
    assert clamped.loss.item() == pytest.approx(-(0.6 + 0.7 + W2 * 0.3) / 2, **close)


@both_backends
@pytest.mark.parametrize("by_frames", [True, False])
def test_a_batch_without_a_frame_has_loss_zero_and_zero_gradients(by_frames: bool, backend: str) -> None:
    none = torch.zeros(2, 4, dtype=torch.bool)
    case = simple(frame_mask=none, normalize_by_frames=by_frames)
    tensors = case.tensors(torch.float32)
    tensors["h"].fill_(torch.nan)
    output, gradients = case.run(tensors, backend)
    assert all((value == 0).all() for value in (*output, *gradients.values()))


PADDED = {
    "equal": {"teacher_grid": (3, 4)},
    "teacher": {"distance": 9},
    "student": {"spatial_align": "teacher", "cumulative": True, "distance": 3},
    "pooled": {"spatial_align": "pool", "normalize_by_frames": False, "normalize_neighbour_sum": True},
}


@pytest.mark.every(5)
@both_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fill", [0.0, 1e4, math.nan, math.inf], ids=str)
@pytest.mark.parametrize("options", list(PADDED.values()), ids=list(PADDED))
@pytest.mark.parametrize("front", [0, 2])
def test_a_padded_clip_is_its_own_unpadded_self(
    front: int, options: dict[str, Any], fill: float, dtype: torch.dtype, backend: str
) -> None:
    """Whatever the padding holds: loss, metrics and gradients, and not a trace of NaN."""
    case = simple(batch=1, frames=4, **options)
    tensors = case.tensors(dtype)
    output, gradients = case.run(tensors, backend)

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        wide = torch.full((1, 7, *tensor.shape[2:]), fill, dtype=dtype)
        wide[:, front : front + 4] = tensor
        return wide

    mask = torch.zeros(1, 7, dtype=torch.bool)
    mask[:, front : front + 4] = True
    other = replace(case, frames=7, teacher_frames=7, frame_mask=mask, teacher_mask=mask)
    found, found_gradients = other.run({**tensors, "h": padded(tensors["h"]), "y": padded(tensors["y"])}, backend)
    assert not found_gradients["h"][~mask].any()
    assert not found.frame_similarity[~mask].any()
    # 8 roundings of the type: products of another number of rows may be summed in another order.
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps / 100}
    for name in METRICS[:-1]:
        torch.testing.assert_close(getattr(found, name), getattr(output, name), **tolerance)
    torch.testing.assert_close(found.frame_similarity[mask], output.frame_similarity[0], **tolerance)
    found_gradients["h"] = found_gradients["h"][:, front : front + 4]
    for name in GRADIENTS:
        error = (found_gradients[name] - gradients[name]).double().norm()
        assert error <= 8 * torch.finfo(dtype).eps * gradients[name].double().norm(), name


@both_backends
def test_clips_of_other_lengths_in_a_batch_do_not_touch_each_other(backend: str) -> None:
    """The loss of a padded batch is the mean of its clips' losses, each gradient its clip's share."""
    lengths = [4, 1, 3]
    mask = torch.arange(4)[None, :] < torch.tensor(lengths)[:, None]
    case = simple(batch=3, frame_mask=mask, teacher_mask=mask, cumulative=True, distance=3)
    tensors = case.tensors(torch.float64)
    output, gradients = case.run(tensors, backend)
    losses = []
    for clip, length in enumerate(lengths):
        one = replace(case, batch=1, frames=length, teacher_frames=length, frame_mask=None, teacher_mask=None)
        own = {**tensors, **{name: tensors[name][clip : clip + 1, :length] for name in ("h", "y")}}
        found, found_gradients = one.run(own, backend)
        losses.append(found.loss)
        # fp64 in another order of summation.
        torch.testing.assert_close(gradients["h"][clip, :length], found_gradients["h"][0] / 3, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(output.loss, torch.stack(losses).mean(), rtol=1e-12, atol=0)


@both_backends
@pytest.mark.parametrize("per_clip", [False, True])
def test_frame_index_selects_teacher_frames(per_clip: bool, backend: str) -> None:
    index = torch.tensor([[5, 0, 0, 3], [1, 2, 4, 4]] if per_clip else [5, 0, 0, 3])
    case = simple(teacher_frames=6, frame_index=index, spatial_align="teacher")
    tensors = case.tensors(torch.float64)
    picked = torch.stack([tensors["y"][b, index[b] if per_clip else index] for b in range(2)])
    plain = replace(case, teacher_frames=4, frame_index=None).run({**tensors, "y": picked}, backend)
    for indices in (index, index.int(), index.tolist()):
        found = replace(case, frame_index=indices).run(tensors, backend)
        for one, other in zip((*plain[0], *plain[1].values()), (*found[0], *found[1].values()), strict=True):
            assert torch.equal(one, other)


@both_backends
def test_unused_teacher_frames_may_hold_anything(backend: str) -> None:
    case = simple(teacher_frames=6, frame_index=[5, 0, 0, 3])
    tensors = case.tensors(torch.float32)
    output, _ = case.run(tensors, backend)
    tensors["y"][:, [1, 2, 4]] = torch.nan
    again, gradients = case.run(tensors, backend)
    assert torch.equal(output.loss, again.loss)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@both_backends
@pytest.mark.parametrize("side", ["h", "y"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("align", ["student", "teacher", "pool"])
def test_one_nan_makes_the_loss_nan(align: str, dtype: torch.dtype, side: str, backend: str) -> None:
    case = simple(spatial_align=align)
    tensors = case.tensors(dtype)
    tensors[side][1, 2, 3, 4] = torch.nan
    output, _ = case.run(tensors, backend)
    assert output.loss.isnan()
    assert output.similarity.isnan()
    assert output.frame_similarity.isnan().tolist() == [[False] * 4, [False, False, True, False]]


@both_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("align", ["student", "teacher", "pool"])
def test_all_zero_rows(align: str, dtype: torch.dtype, backend: str) -> None:
    """p = 0 everywhere: similarity 0, and the gradient is that of dividing by 1e-12, never NaN."""
    case = simple(affine="none", linear_bias=False, spatial_align=align)
    tensors = case.tensors(dtype)
    tensors["h"].zero_()
    output, gradients = case.run(tensors, backend)
    assert all((value == 0).all() for value in output)
    assert not any(gradient.isnan().any() for gradient in gradients.values())
    if dtype in (torch.float64, torch.float32):
        # dp = g z / 1e-12 and LayerNorm of a zero row divides by sqrt(eps): 1e12 x 300 / the number of tokens.
        assert 1e10 < gradients["h"].abs().max() < 1e16


@both_backends
@pytest.mark.parametrize("affine", ["both", "scale", "none"])
@pytest.mark.parametrize("options", list(PADDED.values()), ids=list(PADDED))
def test_rows_below_the_floor(options: dict[str, Any], affine: str, backend: str) -> None:
    """0 < |p| < 1e-12, with and without an offset: divided by a constant, so nothing of p is projected out of dp."""
    case = simple(affine=affine, linear_bias=False, tiny=True, **options)
    tensors = case.tensors(torch.float64)
    exact = truth(case, tensors)
    assert exact.floored.all()
    output, gradients = case.run(tensors, backend)
    torch.testing.assert_close(output.loss, exact.results["loss"], rtol=1e-10, atol=0)  # fp64
    for name, gradient in gradients.items():
        assert (gradient - exact.results[name]).norm() <= 1e-10 * exact.results[name].norm(), name


def test_resampling_before_projecting_is_resampling_after() -> None:
    """``"teacher"`` is the loss of projected, then resampled tokens."""
    case = simple(spatial_align="teacher", hidden_size=12)
    tensors = case.tensors(torch.float64)
    projector = case.projector(tensors)
    p = resample_tokens(projector(tensors["h"]), case.student_grid, case.teacher_grid)
    y = tensors["y"]
    s = torch.einsum("bfme,bkme->bfk", p / row_norms(p), y / row_norms(y)) / p.shape[2]
    output = crepa_loss(tensors["h"], y, projector, backend="torch", **case.options)
    torch.testing.assert_close(output.frame_similarity, s.diagonal(dim1=1, dim2=2), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("align", ["student", "teacher", "smaller", "pool"])
@pytest.mark.parametrize("index", [None, [5, 0, 0, 3]])
def test_similarity_matrix(align: str, index: list[int] | None) -> None:
    """Every student frame with every teacher frame, alone: frame_similarity of the pair."""
    case = simple(spatial_align=align, teacher_frames=6 if index else 4, frame_index=index)
    tensors = case.tensors(torch.float64)
    projector = case.projector(tensors)
    matrix = similarity_matrix(tensors["h"].requires_grad_(), tensors["y"], projector, **case.options)
    assert matrix.shape == (2, 4, case.teacher_frames)
    assert matrix.dtype == torch.float64
    assert not matrix.requires_grad
    for k in range(case.teacher_frames):
        pair = replace(case, frame_index=[k] * 4).run(tensors, "reference")[0].frame_similarity
        torch.testing.assert_close(matrix[:, :, k], pair, rtol=1e-12, atol=1e-14)
    for dtype in (torch.float32, torch.bfloat16):
        narrow = case.tensors(dtype)
        found = similarity_matrix(narrow["h"], narrow["y"], case.projector(narrow), **case.options)
        assert found.dtype == torch.float32
        # Eight roundings of h's type in a mean of cosines.
        torch.testing.assert_close(found.double(), matrix, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_similarity_matrix_of_masked_frames_is_zero() -> None:
    mask = torch.tensor([[True, True, True, False], [False, True, True, True]])
    case = simple(frame_mask=mask, teacher_mask=mask)
    tensors = case.tensors(torch.float32)
    full = similarity_matrix(tensors["h"], tensors["y"], case.projector(tensors), **simple().options)
    tensors["h"][~mask] = tensors["y"][~mask] = torch.nan
    matrix = similarity_matrix(tensors["h"], tensors["y"], case.projector(tensors), **case.options)
    seen = mask[:, :, None] & mask[:, None, :]
    # The same products in fp32, beside other frames.
    torch.testing.assert_close(matrix[seen], full[seen], rtol=1e-5, atol=1e-6)
    assert not matrix[~seen].any()


def test_auto_is_a_backend_and_the_default() -> None:
    case = simple()
    tensors = case.tensors(torch.float32)
    projector = case.projector(tensors)
    losses = [
        crepa_loss(tensors["h"], tensors["y"], projector, **{**case.options, **backend}).loss
        for backend in ({}, {"backend": "auto"}, {"backend": "torch"})
    ]
    assert losses[0] == losses[1] == losses[2]


def test_projector_is_layer_norm_and_linear_with_plain_keys() -> None:
    projector = CrepaProjector(6, 3)
    assert list(projector.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert (projector.hidden_size, projector.feature_size) == (6, 3)
    plain = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3))
    plain.load_state_dict(projector.state_dict())
    h = torch.randn(2, 5, 6)
    assert torch.equal(projector(h), plain(h))


def test_a_crepa_projector_and_a_plain_sequential_give_the_same_loss() -> None:
    case: Case = simple()
    tensors = case.tensors(torch.float32)
    projector = case.projector(tensors)
    assert isinstance(projector, CrepaProjector)
    plain = nn.Sequential(*projector)
    found: list[CrepaOutput] = [
        crepa_loss(tensors["h"], tensors["y"], module, **case.options) for module in (projector, plain)
    ]
    assert torch.equal(found[0].loss, found[1].loss)


def test_a_line_against_a_line_is_the_published_interpolation() -> None:
    """``(1, P)`` against ``(1, N)`` flattens the grids, for who needs to compare."""
    case = simple(student_grid=(1, 12), teacher_grid=(1, 6), antialias=False)
    tensors = case.tensors(torch.float64)
    y = torch.nn.functional.interpolate(tensors["y"].flatten(0, 1).mT, size=12, mode="linear").mT.unflatten(0, (2, 4))
    torch.testing.assert_close(grid_weights((1, 6), (1, 12), False) @ tensors["y"], y)
    p = case.projector(tensors)(tensors["h"])
    own = (p / row_norms(p) * (y / row_norms(y))).sum(dim=-1).mean(dim=-1)
    for backend in ("reference", "torch"):
        found = case.run(tensors, backend)[0].frame_similarity
        torch.testing.assert_close(found, own.detach(), rtol=1e-12, atol=1e-14)
