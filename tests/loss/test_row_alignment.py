"""Rows of projected tokens against the teacher's rows: the extension's kernels against the equations in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from crepa_kernels.ops import has_extension
from crepa_kernels.ops.rows import (
    align_rows_backward_op,
    align_rows_op,
    layer_norm_rows_op,
    normalize_rows_op,
    wide_statistics,
)

FRAMES, FIRST, COUNT, TOKENS, FEATURES = 6, 1, 3, 5, 37
OFFSETS = [-2, -1, 1, 2]
WIDE = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32}
# (projected, teacher, q)
TYPES = [
    (torch.float64, torch.float64, torch.float64),
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float16),
    (torch.float32, torch.float16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float16, torch.bfloat16),
]
needs_extension = pytest.mark.skipif(not has_extension("cpu"), reason="the C++ extension is not built")


@dataclass
class Call:
    """The arguments of ``align_rows``: the clip's frames 0 to 5, of which 1 to 3 are asked for."""

    projected: Tensor
    fold: tuple[Tensor | None, Tensor | None, Tensor | None]
    offset: Tensor | None
    teacher: list[Tensor]
    weights: Tensor
    q: Tensor
    rows: tuple[int, int] = (0, COUNT * TOKENS)
    base: int = 0
    first: int = FIRST
    offsets: tuple[int, ...] = tuple(OFFSETS)

    def arguments(self) -> tuple[Any, ...]:
        return (
            self.projected, *self.fold, self.offset, self.teacher, self.base, self.weights, self.first, self.offsets,
            *self.rows, self.q,
        )  # fmt: skip

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own, total, inverse_norm, q_dot_p = align_rows_op(*self.arguments())
        return own, total, inverse_norm, q_dot_p


def a_call(types: tuple[torch.dtype, torch.dtype, torch.dtype], folded: bool = True, with_offset: bool = True) -> Call:
    p, y, q = types
    wide = WIDE[p]
    torch.manual_seed(0)
    rows = COUNT * TOKENS
    fold = (torch.randn(rows).to(wide), torch.rand(rows).to(wide) + 0.5, torch.randn(FEATURES).to(wide))
    # Rows of a wider tensor: the step from row to row is not the row's length.
    teacher = [torch.randn(TOKENS, FEATURES + 3).to(y)[:, :FEATURES] for _ in range(FRAMES)]
    frame = torch.arange(FRAMES)
    distance = (frame[None] - frame[:, None]).abs()
    weights = torch.exp(-distance.to(wide)) * ((distance > 0) & (distance <= 2))
    return Call(
        torch.randn(rows, FEATURES).to(p),
        fold if folded else (None, None, None),
        torch.randn(FEATURES).to(wide) if with_offset else None,
        teacher,
        weights,
        torch.full((rows, FEATURES), math.nan).to(q),
    )


def exact(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """own, total and q in float64, by the definition."""
    p = call.projected.double()
    mean, inverse_std, row_sums = call.fold
    if mean is not None and inverse_std is not None and row_sums is not None:
        p = (p - mean.double()[:, None] * row_sums.double()) * inverse_std.double()[:, None]
    if call.offset is not None:
        p = p + call.offset.double()
    unit = torch.nn.functional.normalize(torch.stack([frame.double() for frame in call.teacher]), dim=-1, eps=1e-12)
    weights = call.weights.double() + torch.eye(FRAMES, dtype=torch.float64)
    z = torch.einsum("fk,kme->fme", weights, unit)[FIRST : FIRST + COUNT].flatten(0, 1)
    y = unit[FIRST : FIRST + COUNT].flatten(0, 1)
    norm = p.norm(dim=-1)
    total = (p * z).sum(dim=-1) / norm
    return (p * y).sum(dim=-1) / norm, total, z - (total / norm)[:, None] * p


@pytest.mark.parametrize("types", TYPES, ids=lambda types: "-".join(str(t).removeprefix("torch.") for t in types))
@pytest.mark.parametrize("folded", [True, False], ids=["folded", "plain"])
@pytest.mark.parametrize("with_offset", [True, False], ids=["offset", "no-offset"])
def test_rows_agree_with_float64(types: tuple[Any, Any, Any], folded: bool, with_offset: bool) -> None:
    call = a_call(types, folded, with_offset)
    own, total, _, q_dot_p = call.run()
    exact_own, exact_total, exact_q = exact(call)
    # Sums of 37 products of numbers of about 1, each within a few units in the last place of their own type.
    near = 64 * torch.finfo(own.dtype).eps
    torch.testing.assert_close(own.double(), exact_own, rtol=0, atol=near)
    torch.testing.assert_close(total.double(), exact_total, rtol=0, atol=near)
    kept = torch.finfo(call.q.dtype).eps
    torch.testing.assert_close(call.q.double(), exact_q, rtol=kept, atol=max(kept * 0.1, near))
    assert not q_dot_p.any()


@needs_extension
@pytest.mark.parametrize("types", TYPES[:2] + TYPES[4:5], ids=str)
def test_rows_outside_the_range_are_zeros(types: tuple[Any, Any, Any]) -> None:
    whole, part = a_call(types), a_call(types)
    part.rows = (4, 11)
    expected, found = whole.run(), part.run()
    for one, other in zip((*expected[:2], whole.q), (*found[:2], part.q), strict=True):
        assert torch.equal(one[4:11], other[4:11])
        assert not other[:4].any()
        assert not other[11:].any()


def test_a_frame_of_no_weight_is_not_read() -> None:
    call = a_call(TYPES[1])
    call.weights[:, 5] = 0
    expected = call.run()
    if has_extension("cpu"):
        call.teacher[5] = torch.full_like(call.teacher[5], math.nan)
    assert all(torch.equal(one, other) for one, other in zip(expected, call.run(), strict=True))


def test_a_row_of_zeros_keeps_the_gradient_of_the_floor() -> None:
    call = a_call(TYPES[0], folded=False, with_offset=False)
    call.projected[2] = 0
    call.projected[3] *= 1e-14
    own, total, inverse_norm, q_dot_p = call.run()
    assert (own[2], total[2]) == (0, 0)
    assert inverse_norm[2] == inverse_norm[3] == 1e12
    z = exact(a_call(TYPES[0], folded=False, with_offset=False))[2]
    assert not torch.equal(call.q[3], z[3])  # nothing is projected out of it
    torch.testing.assert_close(q_dot_p[3], (call.projected[3] * call.q[3]).sum())


@pytest.mark.parametrize("kept", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_offset", [True, False], ids=["offset", "no-offset"])
def test_gradient_rows_agree_with_float64(kept: torch.dtype, with_offset: bool) -> None:
    torch.manual_seed(0)
    wide = torch.promote_types(kept, torch.float32)
    narrow = torch.float32 if kept == torch.float16 else kept
    rows, width = 70 * TOKENS, 11  # more than one block of rows
    q = torch.randn(rows, FEATURES).to(kept)
    grad, inverse_norm, q_dot_p, inverse_std = (torch.rand(n).to(wide) for n in (70, rows, rows, rows))
    offset = torch.randn(FEATURES).to(wide) if with_offset else None
    g, scaled = q.new_empty(q.shape, dtype=narrow), q.new_empty(q.shape, dtype=narrow)
    along, total = q.new_empty(rows, dtype=wide), torch.ones(FEATURES, dtype=wide)
    align_rows_backward_op(q, grad, inverse_norm, q_dot_p, offset, inverse_std, width, g, scaled, along, total)
    scale = (grad.double() / TOKENS).repeat_interleave(TOKENS) * inverse_norm.double()
    exact_g = q.double() * scale[:, None]
    dot = 0 if offset is None else exact_g @ offset.double()
    exact_along = (dot - q_dot_p.double() * scale) * inverse_std.double() / width
    near = 2 * torch.finfo(narrow).eps
    torch.testing.assert_close(g.double(), exact_g, rtol=near, atol=0)
    torch.testing.assert_close(scaled.double(), exact_g * inverse_std.double()[:, None], rtol=near, atol=0)
    fine = torch.finfo(wide).eps
    torch.testing.assert_close(along.double(), exact_along, rtol=0, atol=64 * fine)
    torch.testing.assert_close(total.double(), 1 + exact_g.sum(dim=0), rtol=16 * fine, atol=16 * fine)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistics_and_normalized_rows_agree_with_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens = (torch.randn(2, 3, 8, FEATURES) * 2 + 50).to(dtype)[:, :, 1:6]
    x, mean, low, inverse_std = layer_norm_rows_op(tokens, 1e-5, True)
    rows = tokens.double().flatten(0, 2)
    fine = torch.finfo(mean.dtype).eps
    torch.testing.assert_close(mean.double(), rows.mean(dim=-1), rtol=4 * fine, atol=0)
    exact_inverse = (rows.var(dim=-1, correction=0) + 1e-5).rsqrt()
    torch.testing.assert_close(inverse_std.double(), exact_inverse, rtol=64 * fine, atol=0)
    out = tokens.new_empty(rows.shape)
    normalize_rows_op(tokens, mean, low, inverse_std, out)
    exact_x = (rows - rows.mean(dim=-1, keepdim=True)) * exact_inverse[:, None]
    # PyTorch keeps the mean as one number: 50 eps are lost where it is taken off. So does this test in float64.
    lost = 4 if has_extension("cpu") and dtype != torch.float64 else 50
    for found in (x, out):
        torch.testing.assert_close(found.double(), exact_x, rtol=torch.finfo(dtype).eps, atol=lost * fine)
    nothing, *again = layer_norm_rows_op(tokens, 1e-5, False)
    assert nothing.shape == (0, FEATURES)
    assert all(torch.equal(one, other) for one, other in zip(again, (mean, low, inverse_std), strict=True))


@needs_extension
def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    rows = 1000 * TOKENS
    q, ones = torch.randn(rows, FEATURES), torch.rand(rows)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            total = torch.zeros(FEATURES)
            g = torch.empty(0)
            align_rows_backward_op(q, torch.rand(1000, generator=torch.Generator().manual_seed(1)), ones, ones, None, ones, 8, g, g, g, total)  # fmt: skip # noqa: E501
            found.append(total)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_offsets_that_lead_out_of_the_clip_from_every_frame_are_nobodys() -> None:
    plain, more = a_call(TYPES[1]), a_call(TYPES[1])
    more.offsets = (*more.offsets, 2**63 - 1, -(2**63), FRAMES, -FRAMES)
    for one, other in zip(plain.run(), more.run(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("types", [TYPES[0], TYPES[4]], ids=str)
def test_opcheck(types: tuple[Any, Any, Any]) -> None:
    call = a_call(types)
    rows, wide = COUNT * TOKENS, call.weights.dtype
    q = torch.randn(rows, FEATURES).to(types[2])
    ones = torch.ones(rows, dtype=wide)
    g, scaled, along, total = torch.empty_like(q), torch.empty_like(q), ones.clone(), torch.zeros(FEATURES, dtype=wide)
    tokens = torch.randn(2, 3, 8).to(types[0])
    statistics = layer_norm_rows_op(tokens, 1e-5, True)[1:]
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (align_rows_op, (*call.arguments()[:-1], q.clone())),
        (align_rows_backward_op, (q, ones[:COUNT].clone(), ones, ones, call.offset, ones, 8, g, scaled, along, total)),
        (layer_norm_rows_op, (tokens, 1e-5, True)),
        (normalize_rows_op, (tokens, *statistics, torch.empty(6, 8, dtype=types[0]))),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments)


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": [torch.zeros(TOKENS, FEATURES)]}, "frame 1 is not among the 1 frames from 0"),
        ({"teacher": [torch.zeros(TOKENS, FEATURES + 1)] * FRAMES}, r"must be \(5, 37\)"),
        ({"teacher": [torch.zeros(4, FEATURES)] * FRAMES}, "15 rows are no frames of 4 tokens"),
        ({"weights": torch.zeros(3, 3)}, "the 3 frames from 1 are not within a clip of 3"),
        ({"first": 2**63 - 1}, "frames from 9223372036854775807 are not within a clip of 6"),
        ({"base": -(2**63)}, "frame 1 is not among the 6 frames from -9223372036854775808"),
        ({"offset": torch.zeros(FEATURES + 1)}, "offset must be a contiguous Float of shape"),
        ({"q": torch.zeros(2, FEATURES)}, "q must be a contiguous Float of shape"),
        ({"fold": (torch.zeros(15), None, None)}, "belong together"),
        ({"teacher": [torch.zeros(TOKENS, FEATURES, dtype=torch.float64)] * FRAMES}, "a teacher of Double"),
    ],
)
def test_bad_input_is_an_error_with_the_numbers_in_it(change: dict[str, Any], message: str) -> None:
    call = a_call(TYPES[1])
    for name, value in change.items():
        setattr(call, name, value)
    with pytest.raises(RuntimeError, match=message):
        call.run()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_layer_norm_of_half_tokens_has_fp32_statistics(dtype: torch.dtype) -> None:
    """PyTorch's own has not, which is why there is a weight of ones; the normalised tokens are the same."""
    torch.manual_seed(0)
    tokens = (100 + torch.randn(5, 64)).to(dtype)
    exact = tokens.double().mean(dim=1)
    plain, rounded, _ = torch.native_layer_norm(tokens, (64,), None, None, 1e-5)
    rows, mean, inverse_std = torch.native_layer_norm(tokens, (64,), wide_statistics(tokens), None, 1e-5)
    assert rounded.dtype == dtype
    assert mean.dtype == inverse_std.dtype == torch.float32
    torch.testing.assert_close(mean[:, 0].double(), exact, rtol=2e-7, atol=0)  # two roundings of fp32
    assert torch.equal(rows, plain)
    assert wide_statistics(tokens.float()) is None
