"""`auto` tries the Triton kernels before it trusts them, and goes on with `torch` where they fail."""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from cases import Case, simple
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from crepa_kernels import crepa_loss
from crepa_kernels.backends.triton import availability, launch, self_check
from crepa_kernels.backends.triton.self_check import Sizes, Way
from crepa_kernels.grid import plan_alignment
from crepa_kernels.inputs import LossInputs, check_inputs
from crepa_kernels.neighbours import Neighbours

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not launch.INTERPRETED, reason="faults are put into interpreted kernels"),
]
CPU = torch.device("cpu")
KEPT = simple(teacher_grid=(3, 4))  # 2 clips of 4 frames of 12 tokens, D 16, E 8
SIZES = Sizes(2, 4, 12, 12)
OFF = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]], dtype=torch.bool)
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def eligible(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """`auto` may take interpreted kernels, and knows nothing yet; the arguments of each check that it makes."""
    checks: list[tuple[Any, ...]] = []
    real = self_check.self_check

    def counted(*arguments: Any) -> str | None:
        checks.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(self_check, "interpreting", lambda: False)
    monkeypatch.setattr(self_check, "self_check", counted)
    self_check.forget()
    yield checks
    self_check.forget()


def found(case: Case, backend: str = "auto", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Loss, metrics and gradients."""
    output, gradients = case.run(case.tensors(dtype), backend)
    return [*(value.detach() for value in output), *gradients.values()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def changed(monkeypatch: pytest.MonkeyPatch, kernel: str, change: Change) -> None:
    """Each launch of ``kernel`` with arguments changed."""
    real = launch.launch

    def launched(name: str, function: Any, grid: Any, cost: Any, **arguments: Any) -> None:
        if name == kernel:
            change(arguments)
        real(name, function, grid, cost, **arguments)

    for module in ("frames", "one_pass", "projector", "rows", "statistics", "teacher", "dx"):
        monkeypatch.setattr(f"crepa_kernels.backends.triton.{module}.launch", launched)


def zeroed(name: str) -> Change:
    return lambda arguments: arguments.update({name: torch.zeros_like(arguments[name])})


def raising(error: Exception) -> Change:
    def change(arguments: dict[str, Any]) -> None:
        raise error

    return change


@pytest.mark.every(4)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("way", "sizes"),
    [
        pytest.param(Way(), Sizes(), id="plain"),
        pytest.param(
            Way(reach=2, indexed=True, masked=True, teacher_masked=True, recompute=True), SIZES, id="combined"
        ),
        pytest.param(Way(student="resample", masked=True), Sizes(2, 4, 12, 6), id="resampled"),
        pytest.param(Way(student="resample"), Sizes(2, 4, 6, 12), id="growing"),
        pytest.param(Way(given=True, masked=True), Sizes(), id="given"),
        pytest.param(Way(given=True, student="resample", reach=2), Sizes(2, 4, 6, 12), id="given-growing"),
        pytest.param(Way(student="pool", teacher="pool", weight_type=torch.bfloat16), Sizes(2, 4, 12, 1), id="pooled"),
        pytest.param(Way(teacher="resample", reach=0, teacher_type=torch.float32), SIZES, id="teacher-resampled"),
        pytest.param(Way(compute=torch.bfloat16, masked=True), Sizes(3, 1, 12, 12), id="one-frame-autocast"),
    ],
)
def test_sound_kernels_agree(way: Way, sizes: Sizes, dtype: torch.dtype) -> None:
    assert self_check.self_check(CPU, dtype, 8 if way.given else 16, 8, way, sizes) is None


# A kernel that forgets something, and the result that shows it. The last frame's rows are the second tile's.
WRONG: dict[str, tuple[str, Change, Way]] = {
    "bias": ("fold", lambda a: a.update(HAS_BIAS=False), Way()),
    "affine offset": ("fold", lambda a: a.update(HAS_BETA=False), Way()),
    "mean": ("rows", zeroed("mean_in"), Way()),
    "neighbours": ("rows", lambda a: a.update(MODE=0), Way()),
    "neighbours, combined": ("combine", lambda a: a.update(weights=torch.eye(4).repeat(2, 1, 1)), Way(reach=2)),
    "last feature": ("rows", lambda a: a.update(features=7), Way()),
    "last row": ("rows", lambda a: a.update(rows=a["rows"] - 1), Way()),
    "layer norm's slope": ("dx", zeroed("slope_in"), Way()),
    "beta's part": ("weight_gradients", lambda a: a.update(HAS_BETA=False), Way()),
    "row means": ("weight_gradients", lambda a: a.update(CENTERED=False), Way()),
    "mask": ("frame_means", lambda a: a.update(MASKED=False), Way(masked=True)),
    "teacher mask": ("frame_tables", lambda a: a.update(TEACHER_MASKED=False), Way(teacher_masked=True)),
    "index": ("frame_tables", lambda a: a.update(HAS_INDEX=False), Way(indexed=True)),
    "norms": ("one_pass", lambda a: a["norms"].fill_(1), Way()),
    "one pass's mean": ("one_pass", zeroed("mean_in"), Way()),
    "inverse std": (
        "layer_norm_backward",
        lambda a: a["inverse_std_in"].mul_(1.1),
        Way(student="pool", teacher="pool"),
    ),
    "nan": ("finish", lambda a: a["own_in"].fill_(torch.nan), Way()),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("fault", WRONG)
def test_a_kernel_that_is_wrong_is_caught(fault: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, change, way = WRONG[fault]
    raw = dtype == torch.bfloat16 and way.student == "keep"
    if not raw and fault in ("mean", "layer norm's slope", "row means", "one pass's mean", "norms"):
        pytest.skip("fp32 tokens are normalised before they are projected")
    changed(monkeypatch, kernel, change)
    reason = self_check.self_check(CPU, dtype, 16, 8, way, SIZES._replace(tokens=1 if way.student == "pool" else 12))
    assert reason is not None
    assert "differs from that of 'torch' by" in reason, reason


FAULTS: dict[str, tuple[str, Change, str]] = {
    "raises": ("rows", raising(RuntimeError("PassManager::run failed")), "RuntimeError: PassManager::run failed"),
    "raises in the backward pass": ("weight_gradients", raising(ValueError("out of resource")), "ValueError: out of"),
    "wrong numbers": ("rows", lambda a: a.update(MODE=0), "differs from that of 'torch'"),
    "nothing runs": ("frame_tables", raising(OSError("no compiler")), "OSError: no compiler"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_warning_and_the_run_goes_on_with_torch(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, eligible: list[Any]
) -> None:
    kernel, change, words = FAULTS[fault]
    changed(monkeypatch, kernel, change)
    expected = found(KEPT, "torch")
    for case in (KEPT, KEPT, replace(KEPT, frame_mask=OFF)):
        assert same(found(case), found(case, "torch"))
    assert same(found(KEPT), expected)
    assert all(reason is not None for reason in self_check.answers.values())
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert words in record.getMessage()
    assert "width 16 and features of width 8 on cpu" in record.getMessage()
    assert len(eligible) == 1
    # What ends every kernel is known of other widths; a fault of these widths is not.
    other = replace(KEPT, hidden_size=24)
    assert same(found(other), found(other, "torch"))
    assert len(eligible) == (1 if fault == "nothing runs" else 2)
    assert len(caplog.records) == len(eligible)


def test_sound_kernels_are_taken_and_checked_once_for_each_way(
    caplog: pytest.LogCaptureFixture, eligible: list[Any]
) -> None:
    caplog.set_level(logging.INFO, "crepa_kernels")
    expected = found(KEPT, "triton")
    for _ in range(2):
        assert same(found(KEPT), expected)
    with torch.no_grad():
        found(replace(KEPT, required=()))
    assert len(eligible) == 1
    assert eligible[0][:4] == (CPU, torch.float32, 16, 8)
    for other in (
        replace(KEPT, hidden_size=24), replace(KEPT, feature_size=9), replace(KEPT, frame_mask=OFF),
        simple(spatial_align="pool"),
    ):  # fmt: skip
        before, expected = len(eligible), found(other, "triton")
        for _ in range(2):
            assert same(found(other), expected)
        assert len(eligible) == before + 1
    assert same(found(replace(KEPT, batch=1)), found(replace(KEPT, batch=1), "triton"))
    assert len(eligible) == 5
    assert all(record.levelno == logging.INFO for record in caplog.records)


def test_several_threads_wait_for_one_check(eligible: list[Any]) -> None:
    tensors = KEPT.tensors(torch.float32)
    plan = plan_alignment("student", KEPT.student_grid, KEPT.teacher_grid)
    inputs = check_inputs(tensors["h"], tensors["y"], KEPT.projector(tensors), plan, Neighbours())
    answers: list[bool] = []
    threads = [threading.Thread(target=lambda: answers.append(self_check.prefers_triton(inputs))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 4
    assert len(eligible) == 1


def test_nothing_is_tried_in_a_capture(monkeypatch: pytest.MonkeyPatch, eligible: list[Any]) -> None:
    """An earlier answer counts there; without one, what is known without a try."""
    other = replace(KEPT, hidden_size=24)
    with monkeypatch.context() as broken:
        changed(broken, "rows", raising(RuntimeError("broken")))
        assert same(found(KEPT), found(KEPT, "torch"))
    assert len(eligible) == 1
    monkeypatch.setattr(self_check, "is_capturing", lambda device: True)
    assert same(found(KEPT), found(KEPT, "torch"))
    assert same(found(other), found(other, "triton"))
    assert len(eligible) == 1


def test_nothing_is_tried_in_a_backward_pass(eligible: list[Any]) -> None:
    """The engine's threads would wait for the check as the check for them."""
    results: list[list[torch.Tensor]] = []
    x = torch.ones((), requires_grad=True)
    y = x * 2
    y.register_hook(torch.enable_grad()(lambda grad: results.append(found(KEPT))))
    y.backward()
    assert same(results[0], found(KEPT, "triton"))
    assert eligible == []


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sound", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_trace_checks_beside_it(
    sound: bool, dynamic: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, eligible: list[Any]
) -> None:
    tensors = KEPT.tensors(torch.float32)
    projector = KEPT.projector(tensors)

    def loss(h: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        return crepa_loss(h, tensors["y"], projector, backend=backend, **KEPT.options).loss

    torch.compiler.reset()
    with monkeypatch.context() as broken:
        if not sound:
            changed(broken, "rows", raising(RuntimeError("broken")))
        compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            value = compiled(tensors["h"])
    assert len(eligible) == 1
    ours = [record for record in caplog.records if record.name.startswith("crepa_kernels")]
    assert [record.levelno for record in ours] == ([] if sound else [logging.WARNING])
    assert eligible[0][4].compute == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss(tensors["h"], "triton" if sound else "torch")
    assert torch.allclose(value, expected, rtol=0 if sound else 1e-5, atol=0)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        self.operators: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


def test_the_caller_notices_nothing() -> None:
    """Random numbers, autograd's and other modes, types and devices by default, hooks."""
    packed: list[torch.Tensor] = []
    seen = Seen()
    state = torch.get_rng_state()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        stack.enter_context(torch.device("meta"))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t))
        stack.enter_context(seen)
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        try:
            assert self_check.self_check(CPU, torch.bfloat16, 16, 8, Way(masked=True), SIZES) is None
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.get_default_dtype() == torch.float64
        finally:
            torch.use_deterministic_algorithms(False)
            torch.set_default_dtype(torch.float32)
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.empty(()).is_meta
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert (packed, len(seen.operators)) == ([], 1)  # the one empty above
    assert torch.equal(state, torch.get_rng_state())
    with FakeTensorMode():
        assert self_check.self_check(CPU, torch.float32, 16, 8, Way(), SIZES) is None


@pytest.mark.parametrize("sound", [True, False])
def test_the_slice_is_let_go_of(sound: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []
    real = self_check.small_call

    def watched(*arguments: Any) -> LossInputs:
        inputs = real(*arguments)
        kept.extend(weakref.ref(each) for each in (inputs.hidden_states, inputs.projector.weight))
        return inputs

    monkeypatch.setattr(self_check, "small_call", watched)
    if not sound:
        changed(monkeypatch, "weight_gradients", lambda arguments: 1 / 0)
    assert (self_check.self_check(CPU, torch.bfloat16, 16, 8, Way(), SIZES) is None) == sound
    assert [ref() for ref in kept] == [None, None]


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(1, 21, 1560, 1560), Sizes(2, 21, 1560, 1369), Sizes(1, 21, 3600, 256), Sizes(4, 1, 16, 16),
        Sizes(1, 16, 384, 384), Sizes(1, 121, 35, 5), Sizes(3, 4, 12, 1), Sizes(17, 65, 1, 1), SIZES,
        Sizes(1, 21, 256, 1369), Sizes(1, 21, 1560, 1561), Sizes(1, 21, 1561, 1560),
    ],
    ids=str,
)  # fmt: skip
def test_a_slice_is_small_and_triton_specializes_it_as_the_call(sizes: Sizes) -> None:
    """Triton knows of an integer whether 16 divides it and whether it is 1; the tiles whether T is above 16 or 32."""
    small = sizes.shrunk()
    for one, other in zip(small, sizes, strict=True):
        assert one <= other
        assert one % 16 == other % 16
        assert (one == 1) == (other == 1) or one == 17
    assert (4 * small.tokens <= small.student_tokens) == (4 * sizes.tokens <= sizes.student_tokens)
    assert (small.tokens > small.student_tokens) == (sizes.tokens > sizes.student_tokens)
    assert small.frames == sizes.frames or small.frames > 32
    rows = small.batch * small.frames * small.tokens
    assert min(160, sizes.batch * sizes.frames * sizes.tokens) <= rows or sizes.batch > 16
    assert rows <= 2100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("way", "sizes"),
    [
        pytest.param(Way(), Sizes(1, 21, 1560, 1560), id="wan"),
        pytest.param(Way(reach=2), Sizes(2, 16, 384, 384), id="ltx-combined"),
        pytest.param(Way(student="pool", teacher="pool"), Sizes(1, 13, 1350, 1), id="pooled"),
        pytest.param(Way(student="resample"), Sizes(2, 1, 256, 1369), id="growing"),
        pytest.param(Way(given=True), Sizes(1, 21, 1560, 1560), id="given"),
    ],
)
def test_the_call_launches_what_the_slice_compiled(way: Way, sizes: Sizes, dtype: torch.dtype) -> None:
    """The same kernels for the same types, constants and properties of integers and addresses."""

    def compiled(sizes: Sizes) -> set[Any]:
        inputs = self_check.small_call(CPU, dtype, 32 if way.given else 48, 32, way, sizes)
        with launch.recorded() as launches:
            self_check.results_of(self_check.crepa_triton, inputs)
        return {(each.name, each.warps, each.stages, *map(property_of, each.arguments.items())) for each in launches}

    def property_of(argument: tuple[str, Any]) -> Any:
        name, value = argument
        if isinstance(value, torch.Tensor):
            return name, value.dtype, value.data_ptr() % 16
        if name.isupper() or not isinstance(value, int):
            return name, str(value) if name.isupper() else type(value)
        return name, value % 16 == 0, value == 1

    of_slice, of_call = compiled(sizes.shrunk()), compiled(sizes)
    assert of_slice <= of_call
    # Chunks of several sizes, where tokens are normalised some frames at a time, have more of some kernels.
    assert of_slice == of_call or dtype == torch.float32 or way.student == "pool"


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of which torch says that the first, the current one, is too old."""
    monkeypatch.setattr(availability, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    capabilities = {torch.device("cuda", 0): (7, 5), torch.device("cuda", 1): (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    availability.forget_devices()
    yield
    availability.forget_devices()


@pytest.mark.usefixtures("two_gpus")
def test_the_device_asked_is_that_of_the_tensors() -> None:
    reason = availability.why_not_triton_for(torch.device("cuda", 0), torch.bfloat16)
    assert reason == "compute capability (7, 5) of cuda:0 is below (8, 0)"
    assert availability.why_not_triton_for("cuda", torch.bfloat16) == reason
    assert availability.why_not_triton_for(torch.device("cuda", 1), torch.bfloat16) is None
    assert "float64" in (availability.why_not_triton_for(torch.device("cuda", 1), torch.float64) or "")
    assert availability.why_not_triton_for("cpu", torch.bfloat16) == "the hidden states are on cpu"
    assert availability.why_no_triton() is None


@cache
def found_by(backend: str) -> list[torch.Tensor]:
    return found(KEPT, backend)


@pytest.mark.parametrize("given", ["auto", "torch", "reference", "triton"])
@pytest.mark.parametrize("forced", ["reference", "torch", "triton", "auto", ""])
def test_the_environment_overrides_every_backend(given: str, forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = forced or given
    expected = found_by("torch" if name == "auto" else name)
    monkeypatch.setenv("CREPA_BACKEND", forced)
    assert same(found(KEPT, given), expected)


def test_no_two_backends_give_the_same_bits() -> None:
    """So that which of them ran shows in what they give."""
    results = [found_by(name) for name in ("reference", "torch", "triton")]
    assert not any(same(*pair) for pair in itertools.combinations(results, 2))


@pytest.mark.parametrize("given", ["auto", "torch"])
def test_a_wrong_environment_is_named(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREPA_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"^CREPA_BACKEND must be 'auto' or one of reference, torch, triton.*'cuda'$"):
        found(KEPT, given)
