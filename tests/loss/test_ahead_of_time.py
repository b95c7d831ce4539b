"""The kernels compiled without a GPU, for every target and as the launchers call them, and the work they add up to.

CI compiles the choices at Wan 14B's shape; ``make aot`` the full product of targets, shapes, types and tiles.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compiled import SHARED_MEMORY, Request, choice_for, launches_of

from crepa_kernels.backends.triton import call
from crepa_kernels.backends.triton.tiles import VENDOR, ProductTile
from crepa_kernels.shapes import SHAPE_CLASSES

WAN_14B = {"hidden_size": 5120, "feature_size": 1536, "frames": 21, "tokens": 1560}
# All pairs of tokens of frames that are at most one apart, and by a margin.
PAIRS = WAN_14B | {"feature_size": 768, "margin": 0.1}
# A frame of up to 32 bytes is the compiler's own; spilled registers are more.
FRAME = 32
# Kernels over numbers per frame, not per token: how they load does not matter.
SMALL = {"frame_tables", "frame_means", "finish"}
# Where the choice is the vendor's product: what `tune` compares it with.
DX_TILES = {
    "sm_100": {"m": 128, "n": 256, "k": 64, "warps": 8, "stages": 3},
    "sm_120": {"m": 128, "n": 128, "k": 32, "warps": 8, "stages": 3},
}
slow = pytest.mark.slow
# Beside Hopper's CI compiles for the oldest cards and for AMD's; make aot for all.
others = pytest.mark.parametrize(
    "target",
    [
        pytest.param(target, marks=[] if target in ("sm_80", "gfx942") else slow)
        for target in sorted(set(SHARED_MEMORY) - {"sm_90"})
    ],
)


def compiled(request: Request) -> dict[str, dict[str, Any]]:
    """Facts by the kernel's name, after the checks that every chosen kernel must pass."""
    kernels = request.run()
    for facts in kernels:
        name = facts["name"]
        assert facts["stack"] <= FRAME, f"{name} spills: {facts}"
        assert facts["shared"] <= SHARED_MEMORY[request.target], f"{name} does not fit: {facts}"
        if name not in SMALL:
            assert facts["wide_loads"] > 0, f"{name} loads less than 128 bits at a time: {facts}"
    return {facts["name"]: facts for facts in kernels}


def test_training_kernels_on_hopper() -> None:
    found = compiled(Request("sm_90", "all", **WAN_14B))
    assert set(found) == {"fold", "statistics", "rows", "dx", "weight_gradients", *SMALL}
    assert found["dx"]["wgmma"] > 0
    # Each is a wait of all warps of a row for the slowest: 66 when its seven sums were taken one by one.
    assert found["rows"]["barriers"] <= 32
    assert all(facts["narrow_loads"] == 0 for facts in found.values())


def test_one_pass_kernel_on_hopper() -> None:
    facts = compiled(Request("sm_90", "one_pass", recompute=True, **WAN_14B))["one_pass"]
    assert facts["wgmma"] > 0
    assert facts["narrow_loads"] == 0


def test_combined_neighbours_on_hopper() -> None:
    facts = compiled(Request("sm_90", "frame_rows", cumulative=True, distance=8, **WAN_14B))["frame_rows"]
    assert facts["matrix"] > 0
    assert facts["narrow_loads"] == 0


def test_combined_neighbours_of_more_frames_than_a_tile_on_hopper() -> None:
    request = Request("sm_90", "combine", cumulative=True, distance=8, **WAN_14B | {"frames": 40})
    assert compiled(request)["combine"]["matrix"] > 0
    assert "rows" in compiled(replace(request, kernel="rows"))


def test_kernels_of_normalized_tokens_on_hopper() -> None:
    found = compiled(Request("sm_90", "all", dtype="float32", **WAN_14B))
    assert {"statistics", "rows", "layer_norm_backward", "weight_gradients"} <= set(found)


GIVEN = {"hidden_size": 1536, "feature_size": 1536, "frames": 21, "tokens": 1560, "given": True}


def test_kernels_of_given_p_on_hopper() -> None:
    """Rows are all that there is: read once forward and once backward, where their gradient is written."""
    request = Request("sm_90", "all", **GIVEN)
    found = compiled(request)
    assert set(found) == {"rows", *SMALL}
    assert found["rows"]["barriers"] <= 32
    assert found["rows"]["narrow_loads"] == 0
    launches = launches_of(request)
    assert [launch.name for launch in launches].count("rows") == 2
    p = request.frames * request.tokens * request.feature_size * 2
    assert sum(launch.written for launch in launches) <= 1.02 * p
    assert sum(launch.read for launch in launches) <= 1.02 * 4 * p


@pytest.mark.parametrize("kernel", ["rows", pytest.param("frame_rows", marks=slow)])
@others
def test_given_p_on_each_target(target: str, kernel: str) -> None:
    neighbours = {"cumulative": True, "distance": 8} if kernel == "frame_rows" else {}
    compiled(Request(target, kernel, masked=True, **neighbours, **GIVEN))


def test_a_growing_grid_is_projected_before_it_is_resampled_on_hopper() -> None:
    """A fifth of the operations; the kernels are those of normalised tokens."""
    grids = {"hidden_size": 1280, "feature_size": 1536, "frames": 1, "tokens": 37 * 37, "students": 256}
    request = Request("sm_90", "all", change="resample", **grids)
    assert {"statistics", "rows", "layer_norm_backward", "weight_gradients"} <= set(compiled(request))
    assert sum(launch.operations for launch in launches_of(request)) == 6 * 256 * 1280 * 1536


def test_pair_tiles_on_hopper() -> None:
    found = compiled(Request("sm_90", "all", **PAIRS))
    assert set(found) == {"differences", "relation_gradient"}
    assert all(facts["wgmma"] > 0 and facts["narrow_loads"] == 0 for facts in found.values())


@pytest.mark.parametrize("kernel", ["differences", pytest.param("relation_gradient", marks=slow)])
@others
def test_pair_tiles_on_each_target(target: str, kernel: str) -> None:
    assert compiled(Request(target, kernel, **PAIRS | {"distance": 0}))[kernel]["matrix"] > 0


@slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("feature_size", [384, 768, 1024, 1536])
@pytest.mark.parametrize("target", sorted(SHARED_MEMORY))
def test_pair_tiles_of_every_width_and_type(target: str, feature_size: int, dtype: str) -> None:
    compiled(Request(target, "all", dtype=dtype, **PAIRS | {"feature_size": feature_size}))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"masked": True}, id="masked", marks=pytest.mark.slow),
        pytest.param({"masked": True, "change": "resample", "recompute": True}, id="resampled"),
        pytest.param({"change": "pool", "tokens": 1}, id="pooled", marks=pytest.mark.slow),
    ],
)
def test_masks_and_moved_students_on_hopper(options: dict[str, Any]) -> None:
    """What a compile-time switch leaves out of the other tests' kernels."""
    compiled(Request("sm_90", "all", **WAN_14B | options))


@pytest.mark.parametrize("kernel", ["dx", "one_pass", "rows"])
@others
def test_each_target(target: str, kernel: str) -> None:
    tiles = {"dx": DX_TILES[target]} if target in DX_TILES and kernel == "dx" else {}
    facts = compiled(Request(target, kernel, recompute=kernel == "one_pass", tiles=tiles, **WAN_14B))[kernel]
    assert kernel == "rows" or facts["matrix"] > 0


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_rows_of_the_weights_gradient_fit_in_registers(target: str) -> None:
    assert "weight_gradients" in compiled(Request(target, "weight_gradients", **WAN_14B))


@pytest.mark.parametrize("target", [pytest.param("sm_90", marks=slow), "sm_100", pytest.param("sm_120", marks=slow)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_pass_before_the_vendors_product(target: str, masked: bool) -> None:
    tiles: dict[str, Any] = {"dx": VENDOR}
    facts = compiled(Request(target, "layer_norm_term", masked=masked, tiles=tiles, **WAN_14B))["layer_norm_term"]
    assert facts["narrow_loads"] == 0


@others
def test_combined_neighbours_on_each_target(target: str) -> None:
    compiled(Request(target, "frame_rows", cumulative=True, distance=8, **WAN_14B))


@slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPE_CLASSES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("target", sorted(SHARED_MEMORY))
@pytest.mark.parametrize("mode", ["adjacent", "cumulative", "recompute"])
def test_the_full_product(target: str, shape: Any, dtype: str, mode: str) -> None:
    sizes = {"hidden_size": shape.hidden_size, "feature_size": shape.feature_size}
    request = Request(target, "all", **sizes, frames=shape.frames, tokens=shape.tokens, dtype=dtype)
    if mode != "adjacent":
        request = replace(request, recompute=mode == "recompute", cumulative=mode == "cumulative", distance=8)
    compiled(request)


def test_operations_are_those_of_three_products() -> None:
    """From the launch parameters, within 1 %: tiles that overhang and products done twice would show."""
    request = Request("sm_90", "all", **WAN_14B)
    rows = request.frames * request.tokens
    floor = 6 * rows * request.hidden_size * request.feature_size
    launches = launches_of(request)
    assert sum(launch.operations for launch in launches) == pytest.approx(floor, rel=0.01)
    tile = choice_for(request).dx
    assert isinstance(tile, ProductTile)
    (dx,) = (launch for launch in launches if launch.name == "dx")
    assert dx.grid[0] * tile.m * tile.n * request.feature_size * 2 == pytest.approx(floor / 3, rel=0.01)


def test_the_vendors_product_costs_one_more_pass_and_another_fold() -> None:
    plain, vendor = Request("sm_90", "all", **WAN_14B), Request("sm_100", "all", **WAN_14B)
    assert choice_for(vendor).dx == VENDOR
    one, other = ([launch.name for launch in launches_of(request)] for request in (plain, vendor))
    place = one.index("dx")
    assert sorted(other) == sorted([*one, "fold", "layer_norm_term"])
    assert other[other.index("layer_norm_term") + 1] == one[place] == "dx"
    operations = [sum(launch.operations for launch in launches_of(request)) for request in (plain, vendor)]
    assert operations[0] == operations[1]
    # dh is written and read once more; the weight is read and, in two bytes, written again.
    rows, width, features = vendor.frames * vendor.tokens, vendor.hidden_size, vendor.feature_size
    moved = [sum(launch.read + launch.written for launch in launches_of(request)) for request in (plain, vendor)]
    assert moved[1] - moved[0] == 2 * 2 * rows * width + (4 + 2) * features * width


@pytest.mark.parametrize("hidden_size", [1536, 5120])
def test_more_offsets_move_hardly_more_bytes(hidden_size: int) -> None:
    """z of several offsets is never written: only the parts of sum(dp) are, of each token instead of each program."""
    request = Request("sm_90", "all", **WAN_14B | {"hidden_size": hidden_size})
    adjacent, cumulative = (
        sum(launch.read + launch.written for launch in launches_of(each))
        for each in (request, replace(request, cumulative=True, distance=8))
    )
    assert cumulative <= 1.01 * adjacent


def launch_table(request: Request) -> list[str]:
    """One line a launch: matrix operations and bytes, and the bytes that must move at the end."""
    rows, size = request.frames * request.tokens, 2
    h = request.frames * (request.students or request.tokens) * request.hidden_size * size
    x, e = rows * request.hidden_size * size, rows * request.feature_size * size
    lines = ["| launch | GFLOP | read MB | written MB |", "|---|---|---|---|"]
    launches = launches_of(request)
    counted = [(launch.name, launch.operations, launch.read, launch.written) for launch in launches]
    counted.append(("all", *(sum(numbers) for numbers in list(zip(*counted, strict=True))[1:])))
    lines += [f"| {name} | {ops / 1e9:.0f} | {read / 1e6:.1f} | {out / 1e6:.1f} |" for name, ops, read, out in counted]
    operations = 6 * rows * request.hidden_size * request.feature_size
    if request.students:
        read, written, what = 2 * (h + e) + x, h + x, "h twice, y twice, x, dh"
    else:
        read, written, what = 2 * (h + e), h, "h, y twice, dh"
    lines.append(f"| floor: {what} | {operations / 1e9:.0f} | {read / 1e6:.1f} | {written / 1e6:.1f} |")
    return lines


DOCUMENTED = [
    Request("sm_90", "all", **WAN_14B),
    Request("sm_90", "all", recompute=True, **WAN_14B),
    Request("sm_90", "all", **WAN_14B | {"tokens": 37 * 37}, change="resample", students=30 * 52),
    Request("sm_90", "all", **WAN_14B | {"tokens": 256, "feature_size": 384}, change="resample", students=45 * 80),
]


def pairs_table(request: Request) -> list[str]:
    """One line a kernel, over all its launches, and by what the matrices of all tokens by all would be."""
    lines = ["| launch | times | GFLOP | read MB | written MB |", "|---|---|---|---|---|"]
    launches = launches_of(request)
    for name in ("differences", "relation_gradient"):
        own = [launch for launch in launches if launch.name == name]
        read, written = sum(launch.read for launch in own), sum(launch.written for launch in own)
        operations = sum(launch.operations for launch in own)
        lines.append(f"| {name} | {len(own)} | {operations / 1e9:.0f} | {read / 1e6:.0f} | {written / 1e6:.0f} |")
    slopes = max(launch.arguments["slopes"].nbytes for launch in launches if launch.name == "differences")
    matrix = 4 * (request.frames * request.tokens) ** 2
    return [
        *lines,
        "",
        f"Slopes held at a time: {slopes / 1e6:.0f} MB; one fp32 matrix of all pairs: {matrix / 1e6:.0f}.",
    ]


@pytest.mark.parametrize("distance", [1, 20], ids=["neighbours", "all"])
def test_the_documented_pair_tiles_are_those_that_run(distance: int) -> None:
    text = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    table = "\n".join(pairs_table(Request("sm_90", "all", **PAIRS | {"distance": distance})))
    assert table in text, f"docs/kernels.md lacks:\n{table}"


@pytest.mark.parametrize("request_", DOCUMENTED, ids=["equal grids", "recompute", "to 37x37", "to 16x16"])
def test_the_documented_launches_are_those_that_run(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "has_extension", lambda device_type: device_type == "cuda")
    text = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    table = "\n".join(launch_table(request_))
    assert table in text, f"docs/kernels.md lacks:\n{table}"
