"""The GPU report's judgement of where a step's time goes, on made-up times of real launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benches.gpu.bottleneck import GAPS, OTHERS, PRODUCTS, parts_of
from crepa_kernels import CrepaProjector, crepa_loss
from crepa_kernels.backends.triton.launch import Launch, recorded
from crepa_kernels.ops import has_extension

COPY, MATRIX = 1e9, 1e12  # so that a megabyte takes a millisecond, and a gigaflop as well


def launches(**options: Any) -> list[Launch]:
    h = torch.randn(1, 3, 6 * 8, 32).requires_grad_()
    y = torch.randn(1, 3, 3 * 4, 16)
    projector = CrepaProjector(32, 16)
    with recorded() as found:
        loss = crepa_loss(h, y, projector, student_grid=(6, 8), teacher_grid=(3, 4), backend="triton", **options).loss
        torch.autograd.grad(loss, [h, *projector.parameters()])
    return found


def as_profiled(launch: Launch) -> str:
    """The kernel's name as the profiler would give it."""
    if launch.kernel is not None:
        return launch.kernel.__name__
    return f"void crepa::(anonymous namespace)::{launch.name}_kernel<__nv_bfloat16, 8>(crepa::Task)"


@pytest.mark.parametrize("align", ["student", "teacher"])
def test_every_launch_is_found_by_its_kernels_name(align: str) -> None:
    found = launches(spatial_align=align)
    names = {launch.name for launch in found if launch.kernel is not None or launch.operations == 0}
    if align == "teacher" and has_extension("cpu"):
        assert {"layer_norm_resample", "layer_norm_resample_backward"} <= names
    kernels = {as_profiled(launch): 1.0 for launch in found if launch.name in names}
    parts = parts_of(found, kernels, float(len(kernels)), COPY, MATRIX)
    assert {part.name for part in parts} == names
    assert all(part.measured_ms == 1.0 for part in parts)


def test_floors_are_the_larger_of_bytes_and_operations_of_every_launch() -> None:
    found = launches()
    kernels = {"nvjet_hsh_128x256": 5.0, "void cutlass::Kernel2<x>": 1.0, "at::native::fill": 0.5}
    parts = {part.name: part for part in parts_of(found, kernels, 7.0, COPY, MATRIX)}
    assert {name: part.measured_ms for name, part in parts.items()} == {PRODUCTS: 6.0, OTHERS: 0.5, GAPS: 0.5}
    products = [launch for launch in found if launch.kernel is None and launch.operations > 0]
    assert len(products) >= 3
    floor = sum(max((each.read + each.written) / COPY, each.operations / MATRIX) for each in products)
    assert parts[PRODUCTS].floor_ms == pytest.approx(1e3 * floor)
    assert parts[OTHERS].floor_ms == parts[GAPS].floor_ms == 0


def test_the_part_furthest_above_its_floor_comes_first() -> None:
    made = [
        Launch("p", 4 * 10**9, 10**6, 0),  # bound by the products: 4 ms
        Launch("layer_norm_resample", 0, 3 * 10**6, 10**6),  # by memory: 4 ms
    ]
    parts = parts_of(made, {"gemm": 6.0, "layer_norm_resample_kernel<x>": 9.0}, 15.0, COPY, MATRIX)
    assert [str(part) for part in parts] == [
        "layer_norm_resample: 9.000 ms, 5.000 ms above its memory floor of 4.000",
        "vendor products: 6.000 ms, 2.000 ms above its matrix floor of 4.000",
    ]
    # The adjoint's kernel has the other's name in its own.
    both = [*made, Launch("layer_norm_resample_backward", 0, 10**6, 0), Launch("resample", 0, 10**6, 0)]
    times = {
        "layer_norm_resample_backward_kernel<x>": 1.0,
        "layer_norm_resample_kernel<x>": 2.0,
        "resample_kernel<x>": 3.0,
    }
    measured = {part.name: part.measured_ms for part in parts_of(both, times, 6.0, COPY, MATRIX)}
    assert measured == {"layer_norm_resample_backward": 1.0, "layer_norm_resample": 2.0, "resample": 3.0}
