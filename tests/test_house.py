"""The house stands: few rooms, no circle of imports, nothing through a wall. ``tests/support/house.py`` prints it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from floors import floor, requirements
from house import (
    MOST_ROOMS,
    ROOT,
    against_the_walls,
    circle,
    deepest_way,
    imports,
    outside,
    pinned,
    private_names,
    rooms,
)
from packaging.requirements import Requirement

from crepa_kernels import CrepaProjector, crepa_loss


def test_a_reader_sees_the_wings_first() -> None:
    assert len(rooms()) <= MOST_ROOMS


def test_no_modules_import_each_other() -> None:
    assert circle(imports()) == []


def test_no_import_goes_through_a_wall() -> None:
    assert against_the_walls(imports()) == []


def test_a_circle_and_an_arrow_through_a_wall_are_found() -> None:
    arrows = {"crepa_kernels.loss": {"crepa_kernels.grid"}, "crepa_kernels.grid": {"crepa_kernels.config.schema"}}
    assert circle(arrows) == []
    assert against_the_walls(arrows) == ["crepa_kernels.grid -> crepa_kernels.config.schema"]
    arrows["crepa_kernels.config.schema"] = {"crepa_kernels.loss"}
    assert set(circle(arrows)) == arrows.keys()


@pytest.mark.parametrize(("backend", "most"), [("reference", 6), ("torch", 10), ("triton", 12)])
def test_the_way_from_the_call_to_the_arithmetic_is_short(backend: str, most: int) -> None:
    student, teacher = torch.randn(1, 2, 6, 8, requires_grad=True), torch.randn(1, 2, 8, 4)

    def step() -> None:
        grids: Any = {"student_grid": (2, 3), "teacher_grid": (2, 4), "spatial_align": "teacher"}
        crepa_loss(student, teacher, CrepaProjector(8, 4), **grids, backend=backend).loss.backward()

    step()  # loads what is loaded once
    assert 2 < len(deepest_way(step)) <= most


def test_no_test_pins_what_a_package_keeps_to_itself() -> None:
    private = private_names()
    tests = ROOT.glob("tests/**/*.py")
    assert {path.name: names for path in tests if (names := pinned(path.read_text(), private))} == {}


@pytest.mark.parametrize(
    "source",
    ["from crepa_kernels.some import _part", "some._part.x", 'patch("some.module._part")', 'patch(x, "_part")'],
)
def test_a_test_that_pins_a_part_is_found(source: str) -> None:
    assert pinned(source, {"_part"}) == ["_part"]
    assert pinned("self._part = _part", {"_part"}) == []


def test_whatever_is_imported_is_required_by_name() -> None:
    # pydantic brings pydantic_core in the one version that it works with.
    names = {"PIL": "pillow", "yaml": "pyyaml", "pydantic_core": "pydantic"}
    distributions = {names.get(name, name) for name in outside()}
    assert distributions - {requirement.name for requirement in requirements()} == set()


def test_every_requirement_has_one_oldest_version() -> None:
    oldest = {requirement.name: floor(requirement) for requirement in requirements()}
    assert oldest["torch"] == "2.10"
    with pytest.raises(ValueError, match=r"some>2 .*lower bound '>='"):
        floor(Requirement("some>2"))
