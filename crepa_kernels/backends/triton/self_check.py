"""What ``backend="auto"`` does before it trusts the kernels: a try on a small slice, compared with ``torch``.

A machine without a C compiler, Python's headers or a libcuda that is found, a card or a Triton that nobody tried, one
kernel that is compiled wrongly: each costs one WARNING and the run goes on with ``torch``.

The slice has the call's own widths, types and options and sizes congruent to its own modulo 16, which is all of them
that Triton specializes on: what is compiled here is what the call launches next. Compiled for the call alone are
kernels of options that are in no ``Way`` (``normalize_sum``, ``by_frames``, a projector without bias or affine part),
of chunks that divide otherwise, and of a call that is traced, whose sizes may be symbols; and for the check alone the
path of calls without a gradient, where a run has none.
"""

from __future__ import annotations

import gc
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import torch

from ...grid import plan_alignment, should_project_first, should_save_aligned
from ...inputs import NO_PROJECTOR, LossInputs, ProjectorWeights
from ...neighbours import Neighbours, Relation
from ...ops.compiling import constant_when_compiled
from ...ops.relation import relate_frames_op
from ...output import CrepaOutput
from ..torch.autograd import crepa_torch
from .availability import forget_devices, interpreting, why_not_triton_for
from .call import Call, operator_arguments
from .operator import crepa_triton
from .relational import relate_tiles_op

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Scope = tuple[Any, ...]

# Rows (a token's gradient, a feature's weights) may differ by so many roundings of the products' type, as a share of
# their norm: both backends round operands and results of three products, which leaves up to 1.3 roundings in a row
# (measured, 16-bit types, widths 16 to 768), and a lost neighbour, mean or tile is 10 % and more. fp32 products may be
# TF32 by the user's setting, of 11 bits like fp16's.
ROW_ROUNDINGS = 4
# Means of cosines, at most 1, average such errors away: 0.04 is the most measured, of 8 features and 5 tokens.
MEAN_ROUNDINGS = 0.2
_GRADIENT = "gradient of "
FEWEST_ROWS = 160  # more than one tile of any kernel, and not a whole number of them


class Way(NamedTuple):
    """What beside device, type and widths decides which kernels a call launches; the default is a plain training call.

    Attributes:
        student: what happens to the student's grid, "keep", "resample" or "pool".
        teacher: the same of the teacher's.
        reach: 0: own frames only, 1: one neighbour on either side, 2: several, combined.
        indexed: with ``frame_index``.
        masked: with ``frame_mask``.
        teacher_masked: with ``teacher_mask``.
        recompute: as ``crepa_loss``.
        teacher_type: of the teacher's features; None: the hidden states'.
        weight_type: of the projector.
        compute: the type that products are asked for in; None: the hidden states'.
        given: without a projector.
    """

    student: str = "keep"
    teacher: str = "keep"
    reach: int = 1
    indexed: bool = False
    masked: bool = False
    teacher_masked: bool = False
    recompute: bool = False
    teacher_type: torch.dtype | None = None
    weight_type: torch.dtype = torch.float32
    compute: torch.dtype | None = None
    given: bool = False


class Sizes(NamedTuple):
    """B, T, P and M of a call."""

    batch: int = 1
    frames: int = 5
    student_tokens: int = 40
    tokens: int = 40

    def shrunk(self) -> Sizes:
        """A small call that Triton compiles the same kernels for, of ``FEWEST_ROWS`` rows if this one has as many."""
        batch, frames = _congruent(self.batch, 1), _congruent(self.frames, 48)
        least = -(-FEWEST_ROWS // (batch * frames))
        tokens, student_tokens = _congruent(self.tokens, least), _congruent(self.student_tokens, least)
        # Whether the backward pass finds the rows of the common grid or makes them again.
        if should_save_aligned(self.tokens, self.student_tokens):
            student_tokens += 16 * max(0, -(-(4 * tokens - student_tokens) // 16))
        # And which of the two is projected.
        if should_project_first(self.tokens, self.student_tokens):
            tokens += 16 * max(0, (student_tokens - tokens) // 16 + 1)
        elif should_project_first(tokens, student_tokens):
            student_tokens += 16 * -(-(tokens - student_tokens) // 16)
        return Sizes(batch, frames, student_tokens, tokens)


def _congruent(size: int, least: int) -> int:
    """The smallest number from ``least`` rounded up to 16 on that is ``size`` modulo 16; ``size`` if it is smaller."""
    return min(size, -(-least // 16) * 16 + size % 16)


# Of every check so far: why Triton is not taken for a device, or for widths on it in a type; None for a way there that
# passed.
answers: dict[Scope, str | None] = {}
_lock = threading.Lock()


def prefers_triton(inputs: LossInputs) -> bool:
    """Whether ``auto`` takes ``triton`` for this call: known to run, and checked against ``torch`` at the first one.

    Inside a CUDA graph capture or a backward pass, where nothing can be tried, an earlier answer counts; without one
    what is known without a try does.
    """
    h, plan, neighbours = inputs.hidden_states, inputs.plan, inputs.neighbours
    if _ruled_out(h.device, h.dtype):
        return False
    weight = inputs.projector.weight
    weight_type = torch.float32 if weight is None else weight.dtype
    reach = 0 if neighbours.distance == 0 else 2 if neighbours.cumulative and neighbours.distance > 1 else 1
    way = (
        plan.student, plan.teacher, reach, inputs.frame_index is not None, inputs.frame_mask is not None,
        inputs.teacher_mask is not None, inputs.recompute, inputs.teacher_features.dtype, weight_type,
        inputs.compute_dtype, weight is None,
    )  # fmt: skip
    # While a trace goes on sizes may be symbols, but for the grids and the projector.
    clips = (1, 5) if torch.compiler.is_compiling() else (inputs.batch, inputs.frames)
    sizes = (*clips, plan.student_grid[0] * plan.student_grid[1], plan.tokens)
    features, width = (int(h.shape[-1]),) * 2 if weight is None else weight.shape
    return _trusted(h.device, h.dtype, width, features, way, sizes)


def prefers_pair_tiles(inputs: LossInputs, relation: Relation) -> bool:
    """``prefers_triton`` for the relational loss: its kernels are those of a margin, checked against ``torch``'s."""
    h = inputs.hidden_states
    if relation.margin is None or inputs.context_group is not None or _ruled_out(h.device, h.dtype):
        return False
    weight = inputs.projector.weight
    features = int(h.shape[-1]) if weight is None else weight.shape[0]
    return _trusted_with_pairs(h.device, inputs.compute_dtype, features, inputs.plan.tokens)


def forget() -> None:
    """Forgets what is known of devices and of every check: the next call of each kind tries again."""
    answers.clear()
    _why_ruled_out.cache_clear()
    forget_devices()


@cache
def _why_ruled_out(device: torch.device, dtype: torch.dtype) -> str | None:
    reason = why_not_triton_for(device, dtype) or ("its interpreter is for tests" if interpreting() else None)
    if reason is not None:
        logger.info("crepa_loss(backend='auto') takes 'torch' on %s, not 'triton': %s", device.type, reason)
    return reason


@constant_when_compiled
def _ruled_out(device: torch.device, dtype: torch.dtype) -> bool:
    return _why_ruled_out(device, dtype) is not None


@constant_when_compiled
def _trusted(
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int,
    feature_size: int,
    way: Sequence[Any],
    sizes: Sequence[int],
) -> bool:
    widths = (device, dtype, hidden_size, feature_size)
    names = f"crepa_loss: {dtype} tokens of width {hidden_size} and features of width {feature_size} on {device}"
    check = partial(self_check, *widths, Way(*way), Sizes(*sizes))
    return _answer((*widths, Way(*way)), check, names)


@constant_when_compiled
def _trusted_with_pairs(device: torch.device, dtype: torch.dtype, feature_size: int, tokens: int) -> bool:
    tokens = _congruent(tokens, FEWEST_ROWS)
    widths = (device, dtype, "pairs", feature_size)
    names = f"relational_loss: {dtype} rows of width {feature_size} on {device}"
    return _answer((*widths, tokens), partial(self_check_of_pairs, device, dtype, feature_size, tokens), names)


def _answer(call: Scope, check: Callable[[], str | None], names: str) -> bool:
    """Whether ``call``, of a device and widths and a way, is trusted: as is known, or by ``check``'s reason if not."""
    device, widths = call[0], call[:-1]
    if (answer := _known(call)) is not None:
        return answer
    # A look at the result would end a capture; a backward pass's threads would wait for the check as it for them.
    if is_capturing(device) or torch._C._current_graph_task_id() != -1:
        return True
    with _lock:  # whoever waited for it finds the answer
        if (answer := _known(call)) is not None:
            return answer
        start = time.perf_counter()
        reason = check()
        if reason is None:
            answers[call] = None
            seconds = time.perf_counter() - start
            logger.info("backend='auto' takes 'triton' for %s: checked in %.1f s", names, seconds)
            return True
        # What ends the smallest kernel too is the machine's: no other width need try again.
        scope: Scope = (device,) if _aside(_smallest_kernel, device) else widths
        for known in [known for known in answers if known[: len(scope)] == scope]:
            del answers[known]
        answers[scope] = reason
        logger.warning(
            "backend='auto' takes 'torch' from now on, not 'triton', for %s: %s. "
            "`python -m crepa_kernels.info` tries again", names, reason,
        )  # fmt: skip
        return False


def _known(call: Scope) -> bool | None:
    """The answer for a call, from one of its own kind or a failure of its widths or device; None without one."""
    if call in answers:
        return True
    return False if call[:-1] in answers or call[:1] in answers else None


def is_capturing(device: torch.device) -> bool:
    """Whether the caller's stream on ``device`` is in a CUDA graph's capture."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def self_check(
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int,
    feature_size: int,
    way: Way | None = None,
    sizes: Sizes | None = None,
) -> str | None:
    """Runs the kernels on a small slice, forward and backward and without a gradient, and compares with ``torch``.

    The caller's random numbers, autograd mode, autocast, streams and current device stay as they are; its memory is
    freed: 0.2 GB for a moment at D 5120 and E 1536 in bf16, 0.3 in fp32 (counted on a CPU).

    Args:
        device: the tensors' own.
        dtype: of the hidden states.
        hidden_size: D.
        feature_size: E.
        way: the kernels to try; those of a plain training call if not given.
        sizes: of the call that is to come.

    Returns:
        Why the kernels are not to be used: what was raised, or what differs; None if all is well.
    """
    way, sizes = way or Way(), (sizes or Sizes()).shrunk()
    reason = _aside(_disagreement, device, dtype, hidden_size, feature_size, way, sizes)
    gc.collect()  # what is imported at an operator's first call leaves cycles that hold the slice
    return reason


def self_check_of_pairs(device: torch.device, dtype: torch.dtype, feature_size: int, tokens: int) -> str | None:
    """As ``self_check``, of the relational loss's kernels: rows of three frames of so many tokens."""
    return _aside(_disagreement_of_pairs, device, dtype, feature_size, tokens)


def _aside(attempt: Callable[..., str | None], device: torch.device, *arguments: Any) -> str | None:
    """``attempt(device, *arguments)`` in a thread of its own; its reason, or what it raised in words.

    A new thread has the defaults of all that the caller may have set for its own: autograd mode, autocast, inference
    mode, saved tensors' hooks, the default device, modes that see every operator (of a trace too), current device and
    stream.
    """

    def run() -> str | None:
        if device.type != "cuda":
            return attempt(device, *arguments)
        with torch.cuda.device(device):
            # Looking at the result waits for the device, which the caller may have forbidden to all threads.
            if not (forbidden := torch.cuda.get_sync_debug_mode()):
                return attempt(device, *arguments)
            torch.cuda.set_sync_debug_mode("default")
            try:
                return attempt(device, *arguments)
            finally:
                torch.cuda.set_sync_debug_mode(forbidden)

    with ThreadPoolExecutor(1, "crepa-kernels-self-check") as pool:
        try:
            return pool.submit(run).result()
        except Exception as error:
            logger.debug("the Triton kernels' self-check on %s", device, exc_info=True)
            text = " ".join(f"{type(error).__name__}: {error}".split())
            return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"


def _smallest_kernel(device: torch.device) -> None:
    from .frames import frame_tables

    inputs = small_call(device, torch.float32, 1, 1, Way(), Sizes(1, 2, 1, 1))
    frame_tables(Call.unpacked(operator_arguments(inputs))).distance.tolist()


def _disagreement(
    device: torch.device, dtype: torch.dtype, hidden_size: int, feature_size: int, way: Way, sizes: Sizes
) -> str | None:
    inputs = small_call(device, dtype, hidden_size, feature_size, way, sizes)
    expected, found = results_of(crepa_torch, replace(inputs, recompute=False)), results_of(crepa_triton, inputs)
    rounding = max(torch.finfo(inputs.compute_dtype).eps, 2**-10)
    errors = {
        name: _row_error(found[name], expected[name])
        if name.startswith(_GRADIENT)
        else (found[name].float() - expected[name].float()).abs().max()
        for name in expected
    }
    return _beyond(errors, lambda name: (ROW_ROUNDINGS if name.startswith(_GRADIENT) else MEAN_ROUNDINGS) * rounding)


def _disagreement_of_pairs(device: torch.device, dtype: torch.dtype, feature_size: int, tokens: int) -> str | None:
    """Rows of small integers, whose products are exact in every type, and a margin that none of their sums is near."""
    generator = torch.Generator(device).manual_seed(0)
    z, y = torch.randint(-1, 2, (2, 3, tokens, feature_size), generator=generator, device=device, dtype=torch.float32)
    how = ([0, 1], [1.0, 0.5], math.isqrt(feature_size) + 0.5)
    gradients = [torch.empty_like(z) for _ in range(2)]
    expected = relate_frames_op(z, z - y, *how, gradients[0])
    rows = (z.to(dtype), (z - y).to(dtype))
    found, without = (relate_tiles_op(*rows, *how, gradient) for gradient in (gradients[1], z.new_empty(0)))
    errors = {
        "loss": (found - expected).abs() / expected,
        "loss without gradients": (without - expected).abs() / expected,
        f"{_GRADIENT}rows": _row_error(gradients[1], gradients[0]),
    }
    return _beyond(errors, lambda name: 2**-10)  # of the weights of torch's slopes, where products are TF32


def _beyond(errors: dict[str, torch.Tensor], allowed: Callable[[str], float]) -> str | None:
    for name, error in zip(errors, torch.stack(list(errors.values())).tolist(), strict=True):
        if not error <= allowed(name):  # NaN is no agreement
            return f"its {name} differs from that of 'torch' by {error:.2g}, and rounding explains {allowed(name):.2g}"
    return None


def small_call(
    device: torch.device, dtype: torch.dtype, hidden_size: int, feature_size: int, way: Way, sizes: Sizes
) -> LossInputs:
    """A call that a kernel which is wrong gives itself away in: no mean, weight or neighbour could be left out.

    Tokens have means of twenty deviations, frames share half of what they are, and the cosines are about 0.5.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    def parameter(values: torch.Tensor) -> torch.Tensor:
        return values.to(way.weight_type).requires_grad_()

    batch, frames, student_tokens, tokens = sizes
    # Grids of one line; where the teacher's is not the common one, it has a token more.
    teacher_tokens = tokens if way.teacher == "keep" else student_tokens + 1
    align = {"keep": "student", "resample": "teacher", "pool": "pool"}[way.student]
    plan = plan_alignment(align, (1, student_tokens), (1, teacher_tokens))  # type: ignore[arg-type]
    h = normal(batch, 1, student_tokens, hidden_size) + normal(batch, frames, student_tokens, hidden_size)
    mean, offset = 30 * normal(batch, frames, student_tokens, 1), normal(feature_size)
    h = (h + (offset if way.given else mean)).to(dtype).requires_grad_()
    y = offset + 0.7 * normal(batch, 1, teacher_tokens, feature_size)
    y = y + 0.7 * normal(batch, frames, teacher_tokens, feature_size)
    weights = NO_PROJECTOR if way.given else ProjectorWeights(
        parameter(1 + 0.3 * normal(hidden_size)), parameter(0.3 * normal(hidden_size)),
        parameter(normal(feature_size, hidden_size) / math.sqrt(hidden_size)), parameter(offset), 1e-5,
    )  # fmt: skip
    frame = torch.arange(frames, device=device).expand(batch, frames)
    exists = frame < max(frames - 1, 1)
    counted = (frame > 0) | (frames == 1)
    mask = None
    if way.masked or way.teacher_masked:
        mask = (counted if way.masked else True) & (exists if way.teacher_masked else frame >= 0)
    return LossInputs(
        hidden_states=h,
        teacher_features=y.to(way.teacher_type or dtype),
        projector=weights,
        plan=plan,
        neighbours=Neighbours((0, 1, 3)[way.reach], 1.0, way.reach == 2),
        normalize_by_frames=True,
        frame_index=frames - 1 - frame if way.indexed else None,
        frame_mask=mask,
        teacher_mask=exists if way.teacher_masked else None,
        frames=frames,
        compute_dtype=way.compute or dtype,
        recompute=way.recompute,
    )


def results_of(backend: Callable[[LossInputs], CrepaOutput], inputs: LossInputs) -> dict[str, torch.Tensor]:
    """Loss, metrics and gradients of a training call, and loss and metrics of one without gradients, by name."""
    gamma, beta, weight, bias, _ = inputs.projector
    given = {"h": inputs.hidden_states, "gamma": gamma, "beta": beta, "weight": weight, "bias": bias}
    leaves = {name: leaf for name, leaf in given.items() if leaf is not None}
    output = backend(inputs)
    # Of the size of one token's gradient, which fp16 holds.
    scale = output.loss.new_full((), output.frame_similarity.numel() * inputs.plan.tokens)
    grads = torch.autograd.grad(output.loss, list(leaves.values()), scale)
    with torch.no_grad():
        without = backend(inputs)
    results = {name.replace("_", " "): value.detach() for name, value in output._asdict().items()}
    results |= {f"{name.replace('_', ' ')} without gradients": value for name, value in without._asdict().items()}
    return results | {f"{_GRADIENT}{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _row_error(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The largest error of a row, as a share of the row's norm, or of a mean row's if that is larger."""
    found, expected = found.float(), expected.float()
    norms = expected.norm(dim=-1)
    typical = norms.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return ((found - expected).norm(dim=-1) / norms.clamp_min(typical)).max()
