"""Bad input: one clear ValueError with the numbers in it, before any work."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from crepa_kernels import CrepaProjector, available_backends, crepa_loss, resample_tokens, similarity_matrix

ANYWHERE = pytest.mark.parametrize("backend", available_backends())
B, T, D, E = 2, 3, 16, 8
GRID, TEACHER_GRID = (3, 4), (2, 3)


def arguments() -> dict[str, Any]:
    """A valid call: (2, 3, 12, 16) hidden states, (2, 3, 6, 8) teacher features."""
    return {
        "hidden_states": torch.randn(B, T, 12, D),
        "teacher_features": torch.randn(B, T, 6, E),
        "projector": CrepaProjector(D, E),
        "student_grid": GRID,
        "teacher_grid": TEACHER_GRID,
    }


def norm_only() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(D))


def three_layers() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, E), nn.SiLU())


def rms_norm() -> nn.Module:
    return nn.Sequential(nn.RMSNorm(D), nn.Linear(D, E))


def lora_wrapped() -> nn.Module:
    """peft reaches the projector because the adapter was added after it."""
    import peft

    model = nn.ModuleDict({"crepa_projector": CrepaProjector(D, E)})
    config = peft.LoraConfig(r=2, target_modules=["crepa_projector.1"])
    return peft.inject_adapter_in_model(config, model)["crepa_projector"]


def peft_model() -> nn.Module:
    import peft

    return peft.get_peft_model(CrepaProjector(D, E), peft.LoraConfig(r=2, target_modules=["1"]))


def weight_normed() -> nn.Module:
    projector = CrepaProjector(D, E)
    torch.nn.utils.parametrizations.weight_norm(projector[1])
    return projector


def long(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int64)


def bools(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def float8(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape).to(torch.float8_e4m3fn)


SLICED = {"hidden_states": torch.randn(B, 12, D)}
# What is wrong, and what the message must say of it, as a regular expression.
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "student grid": ({"student_grid": (3, 5)}, r"student_grid \(3, 5\).*15.*\(2, 3, 12, 16\).* 12"),
    "teacher grid": ({"teacher_grid": (3, 3)}, r"teacher_grid \(3, 3\).*9.*\(2, 3, 6, 8\).* 6"),
    "grids exchanged": ({"student_grid": (2, 3), "teacher_grid": (3, 4)}, r"student_grid \(2, 3\).* 6 .*12"),
    "grid of three": ({"student_grid": (1, 3, 4)}, r"student_grid .*\(1, 3, 4\)"),
    "grid of zero": ({"teacher_grid": (0, 6)}, r"teacher_grid .*\(0, 6\)"),
    "negative grid": ({"student_grid": (-3, -4)}, r"student_grid .*\(-3, -4\)"),
    "grid of floats": ({"student_grid": (3.0, 4.0)}, r"student_grid .*\(3\.0, 4\.0\)"),
    "grid of a number": ({"student_grid": 12}, r"student_grid .*two positive integers, got 12"),
    "grid as text": ({"teacher_grid": "2x3"}, r"teacher_grid .*two positive integers, got '2x3'"),
    "antialias as text": ({"antialias": "yes"}, r"antialias must be True or False, got 'yes'"),
    "hidden size": ({"projector": CrepaProjector(D + 1, E)}, r"16.* 17"),
    "feature size": ({"projector": CrepaProjector(D, E + 1)}, r"8.* 9"),
    "integer hidden states": ({"hidden_states": long(B, T, 12, D)}, r"hidden_states .*floating.*int64"),
    "integer features": ({"teacher_features": torch.zeros(B, T, 6, E, dtype=torch.uint8)}, r"teacher_features .*uint8"),
    "complex hidden states": ({"hidden_states": torch.zeros(B, T, 12, D, dtype=torch.complex64)}, r"complex64"),
    "two axes": (
        {"hidden_states": torch.randn(12, D)},
        r"hidden_states .*\(B, T, P, D\) or \(B, T x P, D\).*\(12, 16\)",
    ),
    "clips without an axis": ({"hidden_states": torch.randn(T, 12, D)}, r"hidden_states have 3 clips.* 2"),
    "half a frame": (
        {"hidden_states": torch.randn(B, 42, D)},
        r"student_grid \(3, 4\) has 3 x 4 = 12 .*42.*\(2, 42, 16\)",
    ),
    "frames in one axis": ({"hidden_states": torch.randn(B, 48, D)}, r"4 frames.* 3.*frame_index"),
    "index of frames in one axis": (
        {"hidden_states": torch.randn(B, 48, D), "frame_index": [0, 1, 2]},
        r"frame_index .*\(4,\).*\(2, 4\).*got \(3,\)",
    ),
    "five axes": ({"teacher_features": torch.randn(B, T, 2, 3, E)}, r"\(B, S, N, E\).*\(2, 3, 2, 3, 8\)"),
    "no frames": ({"hidden_states": torch.randn(B, 0, 12, D)}, r"hidden_states .*\(2, 0, 12, 16\)"),
    "no clips": ({"hidden_states": torch.randn(0, T, 12, D)}, r"hidden_states .*\(0, 3, 12, 16\)"),
    "clips": ({"teacher_features": torch.randn(B + 1, T, 6, E)}, r"2 clips.* 3"),
    "frames without an index": ({"teacher_features": torch.randn(B, 5, 6, E)}, r"3 frames.* 5.*frame_index"),
    "index of floats": ({"frame_index": torch.zeros(T)}, r"frame_index .*integers.*float32"),
    "index of bools": ({"frame_index": bools(T)}, r"frame_index .*integers.*bool"),
    "list of floats": ({"frame_index": [0.0, 1.0, 2.0]}, r"frame_index .*integers.*float32"),
    "short index": ({"frame_index": long(T - 1)}, r"frame_index .*\(3,\).*\(2, 3\).*got \(2,\)"),
    "index turned": ({"frame_index": long(T, B)}, r"frame_index .*\(3,\).*\(2, 3\).*got \(3, 2\)"),
    "index past the end": ({"frame_index": [0, 1, 3]}, r"frame_index .*\[0, 3\).*0 to 3"),
    "negative index": ({"frame_index": torch.tensor([[0, 1, 2], [-1, 1, 2]])}, r"frame_index .*\[0, 3\).*-1 to 2"),
    "frame mask of integers": ({"frame_mask": long(B, T)}, r"frame_mask .*bool.*\(2, 3\).*int64"),
    "teacher mask of floats": ({"teacher_mask": torch.ones(B, T)}, r"teacher_mask .*bool.*\(2, 3\).*float32"),
    "frame mask without clips": ({"frame_mask": bools(T)}, r"frame_mask .*\(2, 3\).*\(3,\)"),
    "teacher mask turned": ({"teacher_mask": bools(T, B)}, r"teacher_mask .*\(2, 3\).*\(3, 2\)"),
    # The mask is of student frames, after temporal alignment, also where the teacher has more.
    "teacher mask of S frames": (
        {"teacher_features": torch.randn(B, 5, 6, E), "frame_index": [0, 2, 4], "teacher_mask": bools(B, 5)},
        r"teacher_mask .*\(2, 3\).*\(2, 5\)",
    ),
    "mask as a list": ({"frame_mask": [[True] * T] * B}, r"frame_mask .*bool.*list"),
    "mask of numpy": ({"frame_mask": np.ones((B, T), dtype=bool)}, r"frame_mask .*bool"),
    "numpy hidden states": ({"hidden_states": np.zeros((B, T, 12, D), dtype=np.float32)}, r"hidden_states .*ndarray"),
    "features as a list": ({"teacher_features": [[1.0]]}, r"teacher_features .*list"),
    "alignment": ({"spatial_align": "larger"}, r"student, teacher, smaller, pool.*'larger'"),
    "alignment of the config": ({"spatial_align": True}, r"spatial_align .*True"),
    "backend": ({"backend": "cuda"}, r"'auto'.*reference.*torch.*'cuda'"),
    "tau 0": ({"tau": 0.0}, r"tau .*above 0.*0\.0"),
    "negative tau": ({"tau": -1.5}, r"tau .*-1\.5"),
    "infinite tau": ({"tau": math.inf}, r"tau .*inf"),
    "nan tau": ({"tau": math.nan}, r"tau .*nan"),
    "tau as text": ({"tau": "1"}, r"tau .*'1'"),
    "negative distance": ({"distance": -1}, r"distance .*0.*-1"),
    "half a distance": ({"distance": 1.5}, r"distance .*integer.*1\.5"),
    "distance as bool": ({"distance": True}, r"distance .*integer.*True"),
    "tau as bool": ({"tau": True}, r"tau .*True"),
    "tau beyond any float": ({"tau": 10**400}, r"tau .*finite.*1000"),
    "distance beyond 64 bits": ({"distance": 2**63}, r"distance .*64 bits.*9223372036854775808"),
    "index beyond 64 bits": ({"frame_index": [0, 1, 2**63]}, r"frame_index .*64 bits"),
    "index of text": ({"frame_index": ["0", "1", "2"]}, r"frame_index .*integers"),
    "ragged index": ({"frame_index": [[0, 1, 2], [0, 1]]}, r"frame_index .*integers"),
    "student grid beyond 64 bits": ({"student_grid": (2**62, 4)}, r"student_grid .*64 bits"),
    "teacher grid beyond 64 bits": ({"teacher_grid": (2**63, 1)}, r"teacher_grid .*64 bits"),
    "range of a number": (
        SLICED | {"token_range": 4},
        r"token_range .*\(start, stop\).*\(4,\)",
    ),
    "range of floats": (
        SLICED | {"token_range": (0.0, 12.0)},
        r"token_range .*\(0\.0, 12\.0\)",
    ),
    "range beyond 64 bits": (
        SLICED | {"token_range": (0, 2**63)},
        r"token_range .*9223372036854775808",
    ),
    "8-bit hidden states": ({"hidden_states": float8(B, T, 12, D)}, r"hidden_states .*bfloat16, got torch\.float8"),
    "8-bit features": ({"teacher_features": float8(B, T, 6, E)}, r"teacher_features .*bfloat16, got torch\.float8"),
    "complex features": ({"teacher_features": torch.zeros(B, T, 6, E, dtype=torch.complex64)}, r"features .*complex64"),
    "8-bit projector": (
        {"projector": CrepaProjector(D, E).to(torch.float8_e4m3fn)},
        r"projector's .*got torch\.float8",
    ),
    "complex projector": (
        {"projector": nn.Sequential(nn.LayerNorm(D), nn.Linear(D, E, dtype=torch.complex64))},
        r"projector's .*complex64",
    ),
    "one linear": ({"projector": nn.Linear(D, E)}, r"CrepaProjector.*Linear"),
    "a function": ({"projector": nn.functional.normalize}, r"CrepaProjector.*function"),
    "widths without a projector": ({"projector": None}, r"width 16 and teacher_features 8: without a projector"),
    "axes without a projector": (
        {"projector": None, "hidden_states": torch.randn(12, E)},
        r"hidden_states .*\(B, T, P, E\) or \(B, T x P, E\).*\(12, 8\)",
    ),
    "devices without a projector": (
        {"projector": None, "hidden_states": torch.zeros(B, T, 12, E, device="meta")},
        r"hidden_states are on meta, teacher_features on cpu$",
    ),
    "norm over two axes": (
        {"projector": nn.Sequential(nn.LayerNorm((12, D)), nn.Linear(D, E))},
        r"\(12, 16\).* 16",
    ),
    "norm of another size": ({"projector": nn.Sequential(nn.LayerNorm(E), nn.Linear(D, E))}, r"\(8,\).* 16"),
    "meta projector": ({"projector": CrepaProjector(D, E).to("meta")}, r"cpu.*meta"),
    "meta features": ({"teacher_features": torch.zeros(B, T, 6, E, device="meta")}, r"cpu.*meta"),
    "meta hidden states": ({"hidden_states": torch.zeros(B, T, 12, D, device="meta")}, r"states are on meta.*on cpu"),
    "meta norm": (
        {"projector": nn.Sequential(nn.LayerNorm(D, device="meta"), nn.Linear(D, E))},
        r"states are on cpu.*the projector on cpu and meta",
    ),
    "meta linear": (
        {"projector": nn.Sequential(nn.LayerNorm(D), nn.Linear(D, E, device="meta"))},
        r"states are on cpu.*the projector on cpu and meta",
    ),
    "meta index": ({"frame_index": long(T).to("meta")}, r"frame_index is on meta, the hidden states on cpu"),
    "meta frame mask": ({"frame_mask": bools(B, T).to("meta")}, r"frame_mask is on meta, the hidden states on cpu"),
    "meta teacher mask": (
        {"teacher_mask": bools(B, T).to("meta")},
        r"teacher_mask is on meta, the hidden states on cpu",
    ),
}
# Built in the test: they need peft, or log at construction.
BAD_PROJECTORS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no linear": (norm_only, r"Sequential\(LayerNorm\)"),
    "an activation behind": (three_layers, r"Sequential\(LayerNorm, Linear, SiLU\)"),
    "another norm": (rms_norm, r"Sequential\(RMSNorm, Linear\)"),
    "LoRA inside": (lora_wrapped, r"CrepaProjector\(LayerNorm, Linear\).*adapters first"),
    "LoRA around": (peft_model, r"PeftModel.*adapters first"),
    "weight norm": (weight_normed, r"CrepaProjector\(LayerNorm, ParametrizedLinear\)"),
}


@pytest.mark.parametrize("flag", ["cumulative", "normalize_neighbour_sum", "normalize_by_frames", "recompute"])
def test_flags_are_true_or_false(flag: str) -> None:
    """ "no" would be true."""
    with pytest.raises(ValueError, match=f"{flag} must be True or False, got 'no'"):
        crepa_loss(**{**arguments(), flag: "no"})


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input(change: dict[str, Any], message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        crepa_loss(**{**arguments(), "backend": backend, **change})


@pytest.mark.parametrize(("make", "message"), BAD_PROJECTORS.values(), ids=BAD_PROJECTORS)
def test_bad_projector(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        crepa_loss(**{**arguments(), "projector": make()})


SIMILARITY = {name: row for name, row in BAD.items() if not row[0].keys() & {"distance", "tau", "backend"}}


@pytest.mark.parametrize(("change", "message"), SIMILARITY.values(), ids=SIMILARITY)
def test_bad_input_of_the_similarity_matrix(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        similarity_matrix(**{**arguments(), **change})


def test_unknown_argument_of_the_similarity_matrix() -> None:
    with pytest.raises(TypeError, match="neighbours"):
        similarity_matrix(**arguments(), neighbours=1)


def test_valid_arguments_are_valid() -> None:
    """The table changes one thing of a call that works."""
    loss = crepa_loss(**arguments()).loss
    assert loss.isfinite()
    for grid in ([3, 4], torch.Size((3, 4))):
        assert crepa_loss(**{**arguments(), "student_grid": grid}).loss.isfinite()


def test_bad_input_costs_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes before a projection or a resampling: on tensors without memory it is the same one."""
    calls = {**arguments(), "projector": CrepaProjector(D, E).to("meta")}
    calls["hidden_states"] = torch.empty(B, T, 10**9, D, device="meta")
    calls["teacher_features"] = torch.empty(B, T, 6, E, device="meta")
    with pytest.raises(ValueError, match=re.escape("1000000000")):
        crepa_loss(**calls)


@ANYWHERE
@pytest.mark.parametrize("cumulative", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_ends_of_what_is_allowed_are_right(masked: bool, cumulative: bool, backend: str) -> None:
    """A distance is clamped to the clip, tau beyond fp32 weighs every neighbour 1, tau that is 0 in fp32 none."""
    given = arguments() | {"backend": backend, "cumulative": cumulative}
    if masked:
        given["teacher_mask"] = torch.tensor([[True, True, False], [True] * 3])
    for end, same in (({"distance": 2**63 - 1}, {"distance": T}), ({"tau": 1e300}, {"tau": 1e30})):
        torch.testing.assert_close(crepa_loss(**given | end).loss, crepa_loss(**given | same).loss)
    alone = crepa_loss(**given | {"distance": 0}).loss
    torch.testing.assert_close(crepa_loss(**given, tau=1e-50).loss, alone)


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (-1, 4), (2**62, 4), (2**63, 2**63), ("4", 4), (4, 4.0), (True, 4)])
def test_bad_projector_sizes(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{sizes[0]!r} and {sizes[1]!r}"):
        CrepaProjector(*sizes)


BAD_RESAMPLING: dict[str, tuple[tuple[Any, ...], str]] = {
    "tokens": ((torch.randn(2, 13, 4), (3, 4), (2, 2)), r"\(2, 13, 4\).*\(3, 4\).* 12"),
    "one axis": ((torch.randn(12), (3, 4), (2, 2)), r"\(12,\)"),
    "integers": ((long(2, 12, 4), (3, 4), (2, 2)), r"floating.*int64"),
    "source of zero": ((torch.randn(2, 0, 4), (0, 4), (2, 2)), r"source_grid .*\(0, 4\)"),
    "target of zero": ((torch.randn(2, 12, 4), (3, 4), (2, 0)), r"target_grid .*\(2, 0\)"),
    "target of one number": ((torch.randn(2, 12, 4), (3, 4), (2,)), r"target_grid .*\(2,\)"),
    "target beyond 64 bits": ((torch.randn(2, 12, 4), (3, 4), (2**63, 1)), r"target_grid .*64 bits"),
    "target of tokens beyond 64 bits": ((torch.randn(2, 12, 4), (3, 4), (2**32, 2**32)), r"target_grid .*64 bits"),
    "result beyond 64 bits": ((torch.randn(2, 12, 4), (3, 4), (2**40, 2**22)), r"\(2, 12, 4\).*64 bits"),
    "weights beyond 64 bits": ((torch.randn(1).expand(2**40, 1), (2**40, 1), (2**22, 1)), r"axis .*64 bits"),
    "8-bit": ((float8(2, 12, 4), (3, 4), (2, 2)), r"tokens .*bfloat16, got torch\.float8"),
    "antialias as text": ((torch.randn(2, 12, 4), (3, 4), (2, 2), "no"), r"antialias must be True or False, got 'no'"),
    "target of floats": ((torch.randn(2, 12, 4), (3, 4), (2.5, 2)), r"target_grid .*2\.5"),
}


@pytest.mark.parametrize(("call", "message"), BAD_RESAMPLING.values(), ids=BAD_RESAMPLING)
def test_bad_resampling(call: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resample_tokens(*call)


def test_available_backends() -> None:
    """Slowest first, and each of them runs; Triton is there with a GPU, or with its interpreter switched on."""
    names = available_backends()
    assert names in (("reference", "torch"), ("reference", "torch", "triton"))
    for name in names:
        assert crepa_loss(**arguments(), backend=name).loss.isfinite()


@ANYWHERE
@pytest.mark.parametrize("options", [{}, {"distance": 2, "cumulative": True}], ids=["adjacent", "cumulative"])
@pytest.mark.parametrize("large", ["teacher", "weight"])
def test_a_norm_that_overflows_is_no_finite_loss(large: str, options: dict[str, Any], backend: str) -> None:
    """A row divided by infinity would be zeros, and the loss 0."""
    given = arguments() | options
    if large == "teacher":
        given["teacher_features"] *= 1e20
    else:
        with torch.no_grad():
            given["projector"][1].weight *= 1e20
    output = crepa_loss(**given, backend=backend)
    assert not output.loss.isfinite()
    assert not output.self_similarity.isfinite()


@pytest.mark.every(5)
@ANYWHERE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spatial_align", ["student", "teacher", "pool"])
@pytest.mark.parametrize("width", [16, 512])
def test_tokens_whose_variance_overflows_have_no_finite_loss(
    width: int, spatial_align: str, dtype: torch.dtype, backend: str
) -> None:
    """Divided by infinity they would all be LayerNorm's bias, with a gradient of 0; PyTorch's own are, if wide."""
    given = arguments() | {"spatial_align": spatial_align, "projector": CrepaProjector(width, E)}
    tokens = torch.randn(B, T, math.prod(GRID), width).to(dtype)
    tokens[0, 1] *= 1e20
    tokens.requires_grad_()
    output = crepa_loss(**given | {"hidden_states": tokens}, backend=backend)
    assert output.loss.isnan()
    assert output.frame_similarity.isnan().tolist() == [[False, True, False], [False] * 3]
    gradients = torch.autograd.grad(output.loss, [tokens, *given["projector"].parameters()])
    assert gradients[0][0, 1].isnan().all()
    assert all(gradient.isnan().any() for gradient in gradients[1:])


@pytest.mark.every(5)
@ANYWHERE
@pytest.mark.parametrize("grid", [GRID, TEACHER_GRID], ids=["equal", "resampled"])
@pytest.mark.parametrize("wrong", [-1, T])
def test_a_compiled_loss_does_not_wrap_the_frame_index(wrong: int, grid: tuple[int, int], backend: str) -> None:
    """It cannot read the index: the frame that is not there is NaN."""
    given = arguments() | {"backend": backend, "teacher_grid": grid}
    given["teacher_features"] = torch.randn(B, T, math.prod(grid), E)

    def loss(index: torch.Tensor) -> torch.Tensor:
        return crepa_loss(**given, frame_index=index).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager")
    index = torch.tensor([0, 1, 2])
    torch.testing.assert_close(compiled(index), loss(index), rtol=1e-5, atol=1e-6)
    assert compiled(torch.tensor([0, 1, wrong])).isnan()


def test_a_list_of_frames_does_not_follow_the_default_device() -> None:
    given = arguments()
    expected = crepa_loss(**given, frame_index=[0, 1, 2]).loss
    with torch.device("meta"):
        assert torch.equal(crepa_loss(**given, frame_index=[0, 1, 2], backend="torch").loss.cpu(), expected)
