"""A resampled student in the Triton backend: with the extension's one pass over the tokens each way, and without."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, simple
from devices import on_each_device
from test_triton import check

from crepa_kernels import CrepaProjector, crepa_loss
from crepa_kernels.backends.triton import call, student
from crepa_kernels.ops import has_extension

pytestmark = pytest.mark.usefixtures("one_thread")
# The student's rows on the common grid are kept for the backward pass, or made again.
GRIDS = {"kept": ((6, 8), (3, 4)), "made again": ((3, 5), (4, 3))}
OPERATORS = ("layer_norm_resample_op", "layer_norm_resample_backward_out_op")


def resampled(grids: str, masked: bool = False) -> Case:
    """Two clips, each third frame outside the loss and full of NaN if ``masked``."""
    ours, theirs = GRIDS[grids]
    case = simple(student_grid=ours, teacher_grid=theirs, spatial_align="teacher", batch=2, mean=5.0)
    if not masked:
        return case
    mask = torch.ones(case.batch, case.frames, dtype=torch.bool)
    mask[:, ::3] = False
    return replace(case, frame_mask=mask, garbage=True)


@pytest.mark.every(3)
@on_each_device
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("extension", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grids", list(GRIDS))
def test_errors_are_those_of_eager_arithmetic(
    grids: str, dtype: torch.dtype, extension: bool, recompute: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not extension:
        monkeypatch.setattr(call, "has_extension", lambda device_type: False)
    for masked in (False, True):
        check(resampled(grids, masked), dtype, device, recompute, "split")


@pytest.mark.skipif(not has_extension("cpu"), reason="the C++ extension is not built")
@pytest.mark.parametrize(("grids", "forward_passes"), [("kept", 1), ("made again", 2)])
def test_the_tokens_are_read_once_forward_and_once_or_twice_backward(
    grids: str, forward_passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()

    def counted(name: str) -> Any:
        operator = getattr(student, name)

        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return operator(*arguments)

        return call

    for name in OPERATORS:
        monkeypatch.setattr(student, name, counted(name))
    ours, theirs = GRIDS[grids]
    h = torch.randn(2, 3, ours[0] * ours[1], 24).requires_grad_()
    y = torch.randn(2, 3, theirs[0] * theirs[1], 8)
    options: dict[str, Any] = {"student_grid": ours, "teacher_grid": theirs, "spatial_align": "teacher"}
    crepa_loss(h, y, CrepaProjector(24, 8), backend="triton", **options).loss.backward()
    assert calls == {"layer_norm_resample_op": forward_passes, "layer_norm_resample_backward_out_op": 1}
