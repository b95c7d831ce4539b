"""What the Triton backend's operators promise beside their numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from cases import GRADIENTS, Case, simple
from devices import DEVICES, on_a_gpu, on_each_device
from test_loss import Results
from test_triton import NARROW, check, chunks_of, to, triton_results
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from crepa_kernels import CrepaProjector, available_backends, crepa_loss
from crepa_kernels.backends.triton import launch, operator, self_check
from crepa_kernels.backends.triton.call import CHANGES, TENSORS, TYPES, Arguments, Call, operator_arguments
from crepa_kernels.backends.triton.operator import frame_alignment_backward_op, frame_alignment_op
from crepa_kernels.grid import plan_alignment
from crepa_kernels.inputs import LossInputs, check_inputs
from crepa_kernels.neighbours import Neighbours
from crepa_kernels.reduction import plan_reduction

pytestmark = pytest.mark.usefixtures("one_thread")
FRAME_MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]], dtype=torch.bool)
TEACHER_MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
MASKED = {"frame_mask": FRAME_MASK, "teacher_mask": TEACHER_MASK}
# One of each way through the kernels: raw tokens, resampled and pooled ones; both neighbour modes; masks; an index.
WAYS = [
    simple(teacher_grid=(3, 4)),
    simple(teacher_grid=(3, 4), cumulative=True, distance=3, **MASKED),
    simple(spatial_align="teacher", student_grid=(4, 6), frame_index=torch.tensor([3, 0, 1, 1]), distance=2, **MASKED),
    simple(spatial_align="pool", cumulative=True, distance=9, normalize_neighbour_sum=True),
    simple(distance=0, normalize_by_frames=False, affine="none", linear_bias=False, spatial_align="teacher"),
    simple(spatial_align="teacher", teacher_grid=(5, 4), **MASKED),
    simple(absent=True, hidden_size=8, teacher_grid=(3, 4), affine="none", linear_bias=False, **MASKED),
]
ways = pytest.mark.parametrize(
    ("case", "dtype", "recompute"),
    [
        pytest.param(WAYS[0], torch.bfloat16, False, id="raw"),
        pytest.param(WAYS[1], torch.bfloat16, True, id="combined-masked-recomputed"),
        pytest.param(WAYS[2], torch.float32, False, id="resampled-masked"),
        pytest.param(WAYS[3], torch.bfloat16, True, id="pooled-recomputed", marks=pytest.mark.slow),
        pytest.param(WAYS[4], torch.bfloat16, False, id="without-parameters"),
        pytest.param(WAYS[5], torch.bfloat16, False, id="growing"),
        pytest.param(WAYS[6], torch.bfloat16, False, id="without-projector"),
    ],
)
slow = pytest.mark.slow
half_or_single = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
recomputing = pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])


@pytest.fixture
def operator_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Arguments of every call of the forward operator."""
    calls: list[tuple[Any, ...]] = []

    def listed(inputs: LossInputs) -> tuple[Any, ...]:
        calls.append(operator_arguments(inputs))
        return calls[-1]

    monkeypatch.setattr(operator, "operator_arguments", listed)
    return calls


def loss_of(case: Case, h: torch.Tensor, tensors: dict[str, Any], **options: Any) -> torch.Tensor:
    projector = case.projector(tensors)
    return crepa_loss(h, tensors["y"], projector, backend="triton", **case.options, **options).loss


@pytest.mark.every(2)
@on_each_device
@ways
def test_opcheck(case: Case, recompute: bool, dtype: torch.dtype, device: str, operator_calls: list[Any]) -> None:
    """Schema, autograd registration, fake tensors, and tracing with dynamic shapes, forward and backward."""
    triton_results(case, to(device, case.tensors(dtype)), recompute)
    (arguments,) = operator_calls
    torch.library.opcheck(frame_alignment_op, arguments)
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    kept = list(frame_alignment_op(*detached)[3:])
    needs = [True, *(detached[i] is not None for i in (2, 3, 4, 5))]
    grad = torch.ones((), device=device)
    torch.library.opcheck(frame_alignment_backward_op, (grad, kept, needs, *detached))


def test_a_call_reads_by_name_what_the_operators_take(operator_calls: list[Any]) -> None:
    """One table has the order: flags and sizes go through the schema as a list each."""
    case = replace(WAYS[2], required=("h", "bias"), tau=2.5)
    triton_results(case, case.tensors(torch.bfloat16))
    (arguments,) = operator_calls
    names = [argument.name for argument in frame_alignment_op._schema.arguments]
    assert names == [*Arguments._fields[:TENSORS], "flags", "sizes", "eps", "tau"]
    assert names == [argument.name for argument in frame_alignment_backward_op._schema.arguments[3:]]
    call = Call.unpacked(arguments)
    assert all(one is other for one, other in zip(call[:TENSORS], arguments, strict=False))
    assert (call.keep, call.keep_aligned, call.recompute, call.by_frames) == (True, False, False, True)
    assert (CHANGES[call.change], TYPES[call.compute]) == ("resample", torch.bfloat16)
    assert (call.frames, call.start, call.distance, call.tau) == (4, 0, 2, 2.5)
    assert call.geometry == (case.student_grid, case.teacher_grid, case.antialias)
    assert (call.student_per_frame, call.per_frame, call.rows, call.all_rows) == (24, 6, 24, 48)
    assert call.packed() == arguments


class Kernels(TorchDispatchMode):
    """How many operators work on memory: no views, nothing that only allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and "empty" not in func.overloadpacket.__name__
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("masks", "counted"), [({}, 17), (MASKED, 30)], ids=["plain", "masked"])
def test_the_frame_tables_are_one_launch_instead_of_many(masks: dict[str, Any], counted: int) -> None:
    """What ``frame_tables`` says of itself; a few more or fewer in another PyTorch change nothing about it."""
    case = simple(teacher_grid=(3, 4), **masks)
    tensors = case.tensors(torch.bfloat16)
    plan = plan_alignment("student", case.student_grid, case.teacher_grid)
    inputs = check_inputs(tensors["h"], tensors["y"], case.projector(tensors), plan, Neighbours(), **masks)
    with Kernels() as kernels:
        weights = inputs.neighbours.weights(inputs.frames, inputs.teacher_mask, torch.empty(0))
        plan_reduction(inputs, weights)
    assert abs(kernels.count - counted) <= 3
    with launch.recorded() as launches:
        triton_results(case, tensors)
    assert [each.name for each in launches].count("frame_tables") == 1
    assert len(launches) - 1 == 11


@pytest.mark.every(2)
@on_each_device
@ways
def test_two_runs_are_bitwise_equal_also_where_new_memory_holds_nan(
    case: Case, dtype: torch.dtype, recompute: bool, device: str
) -> None:
    """Uninitialized memory is never read: torch.empty gives NaN under deterministic algorithms, and nothing changes."""
    tensors = to(device, case.tensors(dtype))
    plain, again = (triton_results(case, tensors, recompute) for _ in range(2))
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3, device=device).isnan().all()
        poisoned = triton_results(case, tensors, recompute)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
    for name, value in plain.items():
        assert torch.equal(value, poisoned[name]), name


@on_each_device
@half_or_single
@recomputing
@pytest.mark.parametrize(
    "options",
    [pytest.param({}, id="adjacent"), pytest.param({"cumulative": True, "distance": 3}, id="cumulative", marks=slow)],
)
def test_frames_outside_the_loss_may_hold_nan(
    options: dict[str, Any], recompute: bool, dtype: torch.dtype, device: str
) -> None:
    case = simple(teacher_grid=(3, 4), **MASKED, **options)
    tensors = to(device, case.tensors(dtype))
    clean = triton_results(case, tensors, recompute)
    tensors["h"][~(FRAME_MASK & TEACHER_MASK).to(device)] = torch.nan
    tensors["y"][~TEACHER_MASK.to(device)] = torch.nan
    for name, value in triton_results(case, tensors, recompute).items():
        assert torch.equal(value, clean[name]), name


# Sizes that no tile divides, more than one tile of each kind, more than 32 frames, and tiles that divide evenly.
TILED: dict[str, dict[str, Any]] = {
    "odd": {"frames": 3, "teacher_frames": 3, "student_grid": (5, 9), "hidden_size": 150, "feature_size": 70},
    "even": {"frames": 2, "teacher_frames": 2, "student_grid": (4, 16), "hidden_size": 128, "feature_size": 192},
    "long": {
        "frames": 37, "teacher_frames": 37, "student_grid": (1, 2), "cumulative": True, "distance": 20, "tau": 9.0,
    },
}  # fmt: skip


def tilings() -> Iterator[Any]:
    """Sizes, types, kept or recomputed, device. Through the interpreter CI takes each pair of them, not the product."""
    places = itertools.product(enumerate(TILED), enumerate(NARROW), (False, True), DEVICES)
    for (at, name), (type_, dtype), recompute, device in places:
        left_out = [slow] if device is DEVICES[0] and (at + type_ + recompute) % 2 else []
        words = (name, str(dtype), "recomputed" if recompute else "kept", device.values[0])
        given = (TILED[name], dtype, recompute, *device.values)
        yield pytest.param(*given, marks=[*device.marks, *left_out], id="-".join(words))


@pytest.mark.few_on_a_gpu("odd-torch.bfloat16", "even", "long")
@pytest.mark.parametrize(("sizes", "dtype", "recompute", "device"), list(tilings()))
def test_several_tiles(sizes: dict[str, Any], recompute: bool, dtype: torch.dtype, device: str) -> None:
    case = simple(teacher_grid=sizes["student_grid"], batch=1, mean=10.0, **sizes)
    check(case, dtype, device, recompute, "one_pass")


@cache
def all_gradients(align: str, grid: tuple[int, int], dtype: torch.dtype, device: str) -> Results:
    case = simple(spatial_align=align, student_grid=grid)
    return triton_results(case, to(device, case.tensors(dtype)))


@pytest.mark.every(3)
@on_each_device
@pytest.mark.parametrize("subset", range(2 ** len(GRADIENTS)))
def test_each_subset_of_gradients(subset: int, device: str) -> None:
    """A gradient is made only if asked for, and is the same whatever else is asked for."""
    dtype = torch.bfloat16 if subset % 3 == 1 else torch.float32
    required = tuple(name for bit, name in enumerate(GRADIENTS) if subset >> bit & 1)
    case = simple(spatial_align="teacher" if subset % 2 else "student", student_grid=(4, 6 if subset % 4 > 1 else 3))
    tensors = to(device, case.tensors(dtype))
    everything = all_gradients(case.spatial_align, case.student_grid, dtype, device)
    found = triton_results(replace(case, required=required), tensors, path="split")
    assert set(found) & set(GRADIENTS) == set(required)
    for name in required:
        # db @ W by the vendor library instead of the fused kernel when dbeta alone is asked for: another order.
        assert torch.allclose(found[name], everything[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.every(3)
@on_each_device
@ways
def test_compiled_without_a_graph_break_and_with_dynamic_shapes(
    case: Case, dtype: torch.dtype, recompute: bool, device: str
) -> None:
    tensors = to(device, case.tensors(dtype))
    projector = case.projector(tensors)

    def loss(h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return crepa_loss(h, y, projector, backend="triton", recompute=recompute, **case.options).loss

    torch.compiler.reset()
    # Inductor's own part is the same for each of them, and takes a minute.
    backend = "inductor" if case is WAYS[0] or device == "cuda" else "aot_eager"
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    grads = []
    for call in (loss, compiled):
        h = tensors["h"].clone().requires_grad_()
        value = call(h, tensors["y"])
        trained = [] if projector is None else projector.parameters()
        grads.append((value.detach(), *torch.autograd.grad(value, [h, *trained])))
    for eager, traced in zip(*grads, strict=True):
        assert torch.equal(eager, traced)


@on_each_device
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, device: str) -> None:
    case = WAYS[0]
    tensors = to(device, case.tensors(torch.bfloat16))
    expected = triton_results(replace(case, required=("h",)), tensors)["h"]
    h = tensors["h"].clone().requires_grad_()
    checkpoint(lambda h: loss_of(case, h, tensors), h, use_reentrant=reentrant).backward()
    assert torch.equal(h.grad.cpu(), expected)


@on_each_device
def test_autocast_changes_nothing_but_the_products_of_fp32_tokens(device: str) -> None:
    case = WAYS[2]
    tensors = to(device, case.tensors(torch.bfloat16))
    outside = triton_results(case, tensors)
    with torch.autocast(device, torch.bfloat16):
        inside = triton_results(case, tensors)
    for name, value in outside.items():
        assert torch.equal(value, inside[name]), name


@on_each_device
def test_no_second_derivative(device: str) -> None:
    case = WAYS[0]
    tensors = to(device, case.tensors(torch.float32))
    h = tensors["h"].clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(case, h, tensors), h, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        grad.sum().backward()


@on_each_device
def test_recompute_keeps_nothing_of_size_tokens_by_features(device: str, operator_calls: list[Any]) -> None:
    case = simple(teacher_grid=(3, 4))
    tensors = to(device, case.tensors(torch.bfloat16))
    sizes = {}
    for recompute in (False, True):
        h = tensors["h"].clone().requires_grad_()
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            loss_of(case, h, tensors, recompute=recompute)
        sizes[recompute] = sum(kept)
    # r dp, and LayerNorm's slope.
    assert sizes[False] - sizes[True] == case.batch * case.frames * 12 * (case.feature_size + 1)


def test_bad_calls_name_the_reason() -> None:
    case = simple()
    tensors = case.tensors(torch.float64)
    with pytest.raises(ValueError, match="float64"):
        crepa_loss(tensors["h"], tensors["y"], case.projector(tensors), backend="triton", **case.options)
    assert "triton" in available_backends()


@on_each_device
def test_an_index_outside_the_teacher_is_nan_and_not_another_frame(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU its values cannot be checked without waiting for it."""
    case = simple(teacher_grid=(3, 4))
    tensors = to(device, case.tensors(torch.float32))
    index = torch.tensor([0, 1, 2, 4])
    with monkeypatch.context() as patched:
        patched.setattr(torch.compiler, "is_compiling", lambda: True)
        output = crepa_loss(
            tensors["h"], tensors["y"], case.projector(tensors), backend="triton",
            **case.options | {"frame_index": index},
        )  # fmt: skip
    assert output.loss.isnan()
    assert output.frame_similarity[:, :3].isfinite().all()


@pytest.mark.every(5)
@pytest.mark.few_on_a_gpu("plain-triton-torch.bfloat16")
@on_each_device
@half_or_single
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize(
    "options", [{}, {"cumulative": True, "distance": 3}, MASKED], ids=["plain", "cumulative", "masked"]
)
def test_shards_of_the_tokens_add_up(options: dict[str, Any], backend: str, dtype: torch.dtype, device: str) -> None:
    """Sequence parallelism: losses, metrics and gradients of token ranges sum to those of the whole clip."""
    case = simple(**options)
    tensors = to(device, case.tensors(dtype))

    def run(h: torch.Tensor, **extra: Any) -> list[torch.Tensor]:
        projector = CrepaProjector(16, 8).to(device)
        projector.load_state_dict({
            "0.weight": tensors["gamma"], "0.bias": tensors["beta"], "1.weight": tensors["weight"],
            "1.bias": tensors["bias"],
        })  # fmt: skip
        h, y = h.detach().requires_grad_(), tensors["y"].clone()
        if extra:
            # What no token of the range is compared with is not read.
            first, last = extra["token_range"][0] // 12, -(-extra["token_range"][1] // 12)
            y[:, : max(0, first - case.distance)], y[:, last + case.distance :] = torch.nan, torch.nan
        output = crepa_loss(h, y, projector, backend=backend, **case.options, **extra)
        return [*(t.detach() for t in output), *torch.autograd.grad(output.loss, [h, *projector.parameters()])]

    whole, flat = run(tensors["h"]), tensors["h"].flatten(1, 2)
    summed: list[torch.Tensor] | None = None
    for start, stop in ((0, 7), (7, 24), (24, 48)):
        part = run(flat[:, start:stop], token_range=(start, stop))
        part[5] = torch.nn.functional.pad(part[5], (0, 0, start, 48 - stop)).view_as(whole[5])
        summed = part if summed is None else [a + b for a, b in zip(summed, part, strict=True)]
    assert summed is not None
    for value, total in zip(whole, summed, strict=True):
        # Sums in another order; the eager backends round each shard's weight gradient to bf16 products' type first.
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert (total - value).norm() <= tolerance * value.norm() + 1e-7


@pytest.mark.parametrize(
    ("token_range", "tokens", "options", "message"),
    [
        ((0, 49), 49, {}, "0 <= start < stop <= T x P = 4 x 12 = 48"),
        ((5, 5), 1, {}, "start < stop"),
        ((0, 8), 9, {}, "8 tokens, hidden_states have 9"),
        ((0, 8), 8, {"spatial_align": "teacher"}, "student's grid"),
    ],
)
def test_bad_token_ranges(token_range: Any, tokens: int, options: dict[str, Any], message: str) -> None:
    case = simple(**options)
    tensors = case.tensors(torch.float32)
    h = tensors["h"].flatten(1, 2).repeat(1, 2, 1)[:, :tokens]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        crepa_loss(h, tensors["y"], case.projector(tensors), token_range=token_range, **case.options)


@on_a_gpu
@ways
def test_no_host_synchronization_and_a_graph_that_replays(
    case: Case, dtype: torch.dtype, recompute: bool, device: str
) -> None:
    tensors = to(device, case.tensors(dtype))
    options = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in case.options.items()
    }
    projector = case.projector(tensors)
    h = tensors["h"].clone().requires_grad_()
    inputs = [h, *projector.parameters()]

    def step() -> list[torch.Tensor]:
        loss = crepa_loss(h, tensors["y"], projector, backend="triton", recompute=recompute, **options).loss
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    expected = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for value, replayed in zip(expected, captured, strict=True):
        assert torch.equal(value, replayed)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_auto_trusts_the_kernels_of_this_gpu_after_a_check(
    dtype: torch.dtype, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the caller forbids to wait for the GPU."""
    case = WAYS[0]
    tensors, here = to(device, case.tensors(dtype)), torch.device(device, torch.cuda.current_device())
    assert self_check.self_check(here, dtype, 16, 8) is None
    caplog.set_level("INFO", "crepa_kernels")
    state, memory = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    self_check.answers.clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, _ = case.run(tensors, "auto")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [record.levelname for record in caplog.records] == ["INFO"], caplog.text
    assert torch.equal(output.loss, case.run(tensors, "triton")[0].loss)
    assert torch.equal(state, torch.cuda.get_rng_state())
    del output
    assert torch.cuda.memory_allocated() == memory


@on_each_device
def test_chunks_cover_all_rows_once(device: str) -> None:
    case = simple(teacher_grid=(3, 4))
    tensors = to(device, case.tensors(torch.bfloat16))
    with chunks_of(1):
        small = triton_results(case, tensors, recompute=True)
    large = triton_results(case, tensors)
    for name in GRADIENTS:
        assert torch.allclose(small[name].float(), large[name].float(), rtol=2e-2, atol=1e-4), name


@pytest.mark.parametrize("name", ["gamma", "beta", "bias"])
@pytest.mark.parametrize("layout", ["strided", "expanded"])
@on_each_device
def test_parameters_may_lie_anyhow(layout: str, name: str, device: str) -> None:
    case = simple(teacher_grid=(3, 4))
    tensors = to(device, case.tensors(torch.float32))
    found = []
    for contiguous in (True, False):
        projector = case.projector(tensors).to(device)
        layer, key = {"gamma": (0, "weight"), "beta": (0, "bias"), "bias": (1, "bias")}[name]
        values = tensors[name]
        laid = torch.stack([values, values + 9], 1)[:, 0] if layout == "strided" else values[:1].expand(len(values))
        laid = laid.contiguous() if contiguous else laid
        setattr(projector[layer], key, torch.nn.Parameter(laid))
        h = tensors["h"].detach().requires_grad_()
        loss = crepa_loss(h, tensors["y"], projector, backend="triton", **case.options).loss
        found.append((loss, *torch.autograd.grad(loss, [h, *projector.parameters()])))
    assert not laid.is_contiguous()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
