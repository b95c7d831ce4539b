"""Patches line up: a token's features are its own place in the frame, and stay so on the common grid."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import grid_weights
from torch import nn

from crepa_kernels import crepa_loss, resample_tokens
from crepa_kernels.grid import SpatialPlan, plan_alignment

pytestmark = pytest.mark.usefixtures("one_thread")
Grid = tuple[int, int]
STUDENTS: list[Grid] = [(30, 52), (30, 45), (16, 24), (45, 80), (32, 48), (22, 40)]
TEACHERS: list[Grid] = [(37, 37), (16, 16)]
PAIRS = list(itertools.product(STUDENTS, TEACHERS))
# Mean distance on either axis, in parts of the frame's width or height, by antialias. The plain filter is off at the
# border alone, beyond which there is nothing to see. The widened one, cut into whole cells, is not quite centred
# between them either: by up to 0.0017 at 24 cells to 16, to both sides alike, so that the mean offset stays 0.
MEAN_DISTANCE = {False: 0.001, True: 0.002}
MEAN_OFFSET = 1e-12  # fp64 positions

pairs = pytest.mark.parametrize(
    ("student", "teacher"), PAIRS, ids=["{}x{}-and-{}x{}".format(*student, *teacher) for student, teacher in PAIRS]
)
modes = pytest.mark.parametrize("mode", ["student", "teacher", "smaller"])
filters = pytest.mark.parametrize("antialias", [True, False], ids=["widened", "plain"])
both_backends = pytest.mark.parametrize("backend", ["reference", "torch"])


def places(grid: Grid) -> torch.Tensor:
    """(N, 2): x and y of each token's centre, as parts of the frame's width and height."""
    height, width = grid
    y, x = torch.meshgrid(
        (torch.arange(height, dtype=torch.float64) + 0.5) / height,
        (torch.arange(width, dtype=torch.float64) + 0.5) / width,
        indexing="ij",
    )
    return torch.stack([x, y], dim=-1).flatten(0, 1)


def half_a_cell(plan: SpatialPlan) -> torch.Tensor:
    """(2,): half the width and height of a token of the side that is resampled."""
    height, width = plan.student_grid if plan.student == "resample" else plan.teacher_grid
    return torch.tensor([0.5 / width, 0.5 / height], dtype=torch.float64)


def check(offset: torch.Tensor, plan: SpatialPlan) -> None:
    """(M, 2) offsets between the two sides of each pair of tokens on the common grid."""
    assert (offset.mean(dim=0).abs() <= MEAN_OFFSET).all()
    assert (offset.abs().mean(dim=0) <= MEAN_DISTANCE[plan.antialias]).all()
    assert (offset.abs() <= half_a_cell(plan)).all()


@filters
@modes
@pairs
def test_both_sides_of_every_pair_of_tokens_are_the_same_place(
    student: Grid, teacher: Grid, mode: str, antialias: bool
) -> None:
    plan = plan_alignment(mode, student, teacher, antialias)
    places_of = {"student": places(student), "teacher": places(teacher)}
    kept = "student" if plan.student == "keep" else "teacher"
    offset = plan.align(places_of["student"], "student") - plan.align(places_of["teacher"], "teacher")
    check(offset, plan)
    if not antialias:
        inside = (places_of[kept] > half_a_cell(plan)) & (places_of[kept] < 1 - half_a_cell(plan))
        assert offset[inside].abs().max() < 1e-12  # fp64


@pytest.mark.parametrize(("student", "teacher"), [pair for pair in PAIRS if pair[0][0] != pair[1][0]])
def test_a_flattened_grid_pairs_each_patch_with_a_far_one(student: Grid, teacher: Grid) -> None:
    """What the measure above is worth: where the rows differ, interpolating the raster as a line is a third off."""
    count = {side: grid[0] * grid[1] for side, grid in (("student", student), ("teacher", teacher))}
    line = resample_tokens(places(teacher), (1, count["teacher"]), (1, count["student"]), antialias=False)
    error = (line - places(student)).abs().mean(dim=0)
    assert error[0] > 0.2


# Eight orthogonal rows of +1 and -1; all but the first have mean 0.
HADAMARD = torch.tensor([[(-1) ** bin(i & j).count("1") for j in range(8)] for i in range(8)], dtype=torch.float64)


def projector() -> nn.Module:
    """LayerNorm leaves a sum of rows 1 to 7 as it is, but for its length; Linear reads the parts of rows 1 to 4."""
    layers = nn.Sequential(nn.LayerNorm(8, eps=0.0), nn.Linear(8, 4, bias=False)).double()
    with torch.no_grad():
        layers[1].weight.copy_(HADAMARD[1:5] / 8)
    return layers


@both_backends
@filters
@pairs
def test_the_loss_pulls_each_student_token_to_its_own_place(
    student: Grid, teacher: Grid, antialias: bool, backend: str
) -> None:
    """The teacher is resampled, and what a student token is pulled toward is its gradient.

    Teacher features are (x, y, 1, 0) and each p is (0, 0, 0, 1), orthogonal to them all: then dp is the unit row of
    the resampled teacher, up to a factor, and x is its first number over its third.
    """
    place = places(teacher)
    y = torch.cat([place, torch.ones(len(place), 1), torch.zeros(len(place), 1)], dim=1)[None, None]
    h = HADAMARD[4].expand(1, 1, student[0] * student[1], 8).clone().requires_grad_()
    module = projector()
    crepa_loss(
        h, y, module, student_grid=student, teacher_grid=teacher, antialias=antialias, distance=0, backend=backend
    ).loss.backward()
    pull = h.grad[0, 0] @ HADAMARD[1:5].T
    found = pull[:, :2] / pull[:, 2:3]
    check(found - places(student), plan_alignment("student", student, teacher, antialias))


@pytest.mark.every(5)
@both_backends
@filters
@pairs
def test_the_loss_compares_each_teacher_token_with_the_student_at_its_place(
    student: Grid, teacher: Grid, antialias: bool, backend: str
) -> None:
    """The student is resampled, and read token by token: each frame's teacher is zero but for one number of one token.

    Student tokens are (x, y, 1, w) with w so that all have one length, which LayerNorm then leaves alone.
    """
    place = places(student)
    code = torch.cat([place, torch.ones(len(place), 1), (2 - (place**2).sum(dim=1, keepdim=True)).sqrt()], dim=1)
    height, width = teacher
    # Corners, middles of the sides, the centre, and some between.
    rows, columns = ([0, 1, side // 3, side // 2, side - 1] for side in teacher)
    probes = torch.tensor([row * width + column for row in rows for column in columns])
    frames = 3 * len(probes)
    y = torch.zeros(1, frames, height * width, 4, dtype=torch.float64)
    y[0, torch.arange(frames), probes.repeat_interleave(3), torch.arange(3).repeat(len(probes))] = 1
    h = (code @ HADAMARD[1:5]).expand(1, frames, -1, -1)
    output = crepa_loss(
        h, y, projector(), student_grid=student, teacher_grid=teacher, spatial_align="teacher", antialias=antialias,
        distance=0, backend=backend,
    )  # fmt: skip
    read = output.frame_similarity[0].view(-1, 3)
    found = read[:, :2] / read[:, 2:3]
    error = (found - places(teacher)[probes]).abs()
    assert (error <= half_a_cell(plan_alignment("teacher", student, teacher, antialias))).all()
    # fp64, and a ratio of numbers of order one.
    expected = grid_weights(student, teacher, antialias) @ place
    torch.testing.assert_close(found, expected[probes], rtol=0, atol=1e-10)
