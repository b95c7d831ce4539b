"""One call of the loss: the arguments of its operators, and what they say of sizes, types and path."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from ...grid import SpatialPlan, should_project_first, should_save_aligned
from ...inputs import LossInputs, frames_at
from ...ops import has_extension

if TYPE_CHECKING:
    from .tiles import Choice

# What happens to the student's grid; the operators take the place in the list.
CHANGES = ("keep", "resample", "pool")
KEEP, RESAMPLE, POOL = range(3)
TYPES = (torch.float32, torch.float16, torch.bfloat16)
# How the neighbours' rows reach the kernels: not at all, as one row on either side, or combined beforehand.
OWN, PAIR, COMBINED = range(3)


class Arguments(NamedTuple):
    """What both operators take, in this order: tensors, flags, sizes, and two numbers.

    Attributes:
        tokens: (B, L, D) hidden states, L = T x P or the rows of ``token_range``; last axis contiguous.
        teacher: (B, S, M, E), on the common grid already; last axis contiguous.
        gamma, beta, weight, bias: the projector's (D,), (D,), (E, D) and (E,); those of one axis are contiguous. The
            tokens are p without a weight.
        frame_index: (B, T) int64, teacher frames.
        frame_mask, teacher_mask: (B, T) bool, student frames in the loss, and teacher frames that exist.
        keep: some gradient is wanted.
        keep_aligned: gamma's or the weight's is, so that aligned rows may be kept.
        recompute: nothing of size tokens x E is kept.
        antialias: of the resampling.
        cumulative, normalize_sum, distance, tau: ``Neighbours``.
        by_frames: divide by the clip's frames in the loss.
        change: index in ``CHANGES``.
        compute: index in ``TYPES``, the type that products are asked for in: the tokens', or a narrower one for fp32.
        frames, start: T, and the clip's token that its first row is.
        student_height, student_width, height, width: the student's grid and the common one.
        eps: LayerNorm's.
    """

    tokens: Tensor
    teacher: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    frame_index: Tensor | None
    frame_mask: Tensor | None
    teacher_mask: Tensor | None
    keep: bool
    keep_aligned: bool
    recompute: bool
    antialias: bool
    cumulative: bool
    normalize_sum: bool
    by_frames: bool
    change: int
    compute: int
    frames: int
    start: int
    distance: int
    student_height: int
    student_width: int
    height: int
    width: int
    eps: float
    tau: float

    def packed(self) -> tuple[Any, ...]:
        """As ``SCHEMA`` has them."""
        return (*self[:TENSORS], [*self[TENSORS:_SIZES]], [*self[_SIZES:_NUMBERS]], *self[_NUMBERS:])


_KINDS = get_type_hints(Arguments)
TENSORS = sum(kind in (Tensor, Tensor | None) for kind in _KINDS.values())
_SIZES = TENSORS + [*_KINDS.values()].count(bool)
_NUMBERS = _SIZES + [*_KINDS.values()].count(int)
# Flags and sizes are a list each: torch.library goes through a schema once for every argument it has, in each call.
SCHEMA = ", ".join(
    [f"Tensor{'' if kind is Tensor else '?'} {name}" for name, kind in [*_KINDS.items()][:TENSORS]]
    + ["bool[] flags", "SymInt[] sizes"]
    + [f"float {name}" for name in [*_KINDS][_NUMBERS:]]
)


def operator_arguments(inputs: LossInputs) -> tuple[Any, ...]:
    """What ``frame_alignment`` takes, of a call."""
    h, (gamma, beta, weight, bias, eps), plan = inputs.hidden_states, inputs.projector, inputs.plan
    trained = [tensor for tensor in (h, gamma, beta, weight, bias) if tensor is not None]
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained)
    keep_aligned = keep and any(tensor is not None and tensor.requires_grad for tensor in (gamma, weight))
    tokens = h if inputs.token_range is not None else h.flatten(1, 2)
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    teacher, frame_index = _teacher(inputs)
    # Kernels read them one element after the other.
    gamma, beta, bias = (None if tensor is None else tensor.contiguous() for tensor in (gamma, beta, bias))
    neighbours = inputs.neighbours
    return Arguments(
        tokens, teacher, gamma, beta, weight, bias, frame_index, inputs.frame_mask, inputs.teacher_mask,
        keep, keep_aligned, inputs.recompute, plan.antialias, neighbours.cumulative, neighbours.normalize_sum,
        inputs.normalize_by_frames, CHANGES.index(plan.student), TYPES.index(inputs.compute_dtype), inputs.frames,
        0 if inputs.token_range is None else inputs.token_range[0], neighbours.distance, *plan.student_grid,
        *plan.grid, eps, neighbours.tau,
    ).packed()  # fmt: skip


def _teacher(inputs: LossInputs) -> tuple[Tensor, Tensor | None]:
    """Teacher features on the common grid (B, S, M, E), last axis contiguous, and the frame index still to apply."""
    teacher, index, plan, taught = inputs.teacher_features, inputs.frame_index, inputs.plan, inputs.taught_frames
    if index is None and len(taught) < inputs.frames:
        # The others are nobody's: they are those at the ends.
        teacher = teacher[:, taught.start : taught.stop]
        frame = torch.arange(inputs.frames, device=teacher.device)
        index = (frame.clamp(taught.start, taught.stop - 1) - taught.start).expand(inputs.batch, -1)
    if plan.teacher != "keep":
        with torch.no_grad():
            if index is not None and teacher.shape[1] > inputs.frames:
                teacher, index = frames_at(teacher, index), None
            kind = resampled_type(teacher.dtype, inputs.compute_dtype)
            teacher = plan.align(teacher.to(kind), "teacher")
    if teacher.dtype not in TYPES:
        teacher = teacher.float()
    return (teacher if teacher.stride(-1) == 1 else teacher.contiguous()), index


def resampled_type(teacher: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """A 16-bit teacher beside 16-bit products stays so; otherwise it is resampled into fp32."""
    return torch.promote_types(teacher, torch.bfloat16 if compute == torch.bfloat16 else torch.float32)


class Call(Arguments):
    """The arguments as the launchers read them.

    Attributes:
        mask: (B, T) uint8, the ``frame_mask`` as the kernels read it; None: all frames are in the loss.
        compute_dtype: the products' type.
        choice: path and tiles, by the products' type, which need not be that of the tokens.
    """

    @classmethod
    def unpacked(cls, arguments: Sequence[Any]) -> Call:
        """Of arguments as ``SCHEMA`` has them."""
        *tensors, flags, sizes, eps, tau = arguments
        return cls._make([*tensors, *flags, *sizes, eps, tau])

    @classmethod
    def of_shapes(
        cls, tensors: Sequence[Tensor | None], plan: SpatialPlan, frames: int, dtype: torch.dtype, recompute: bool
    ) -> Call:
        """Of tokens, teacher and projector that have no values, in training; the other options are anything."""
        return cls._make((
            *tensors, None, None, None, True, True, recompute, plan.antialias, False, False, True,
            CHANGES.index(plan.student), TYPES.index(dtype), frames, 0, 1, *plan.student_grid, *plan.grid, 0.0, 1.0,
        ))  # fmt: skip

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.tokens.shape[2]

    @property
    def feature_size(self) -> int:
        return self.teacher.shape[3]

    @property
    def teacher_frames(self) -> int:
        return self.teacher.shape[1]

    @property
    def per_frame(self) -> int:
        """M, tokens a frame on the common grid."""
        return self.height * self.width

    @property
    def student_per_frame(self) -> int:
        """P."""
        return self.student_height * self.student_width

    @property
    def rows(self) -> int:
        """Rows a clip on the common grid, T x M or those of ``token_range``."""
        return self.tokens.shape[1] if self.change == KEEP else self.frames * self.per_frame

    @property
    def all_rows(self) -> int:
        return self.batch * self.rows

    @property
    def student_rows(self) -> int:
        return self.batch * self.tokens.shape[1]

    @property
    def given(self) -> bool:
        """Whether the tokens are p, and there is no projector."""
        return self.weight is None

    @property
    def resamples_p(self) -> bool:
        """Whether p goes to the common grid, and not the tokens: p that is given, or whose tokens are fewer."""
        if self.change == KEEP or self.given:
            return self.change != KEEP
        return self.change == RESAMPLE and should_project_first(self.per_frame, self.student_per_frame)

    @property
    def projected_rows(self) -> int:
        """Rows of all clips that are projected."""
        return self.student_rows if self.resamples_p else self.all_rows

    @property
    def joined(self) -> bool:
        """Whether the tokens of all clips are rows of one matrix."""
        tokens = self.tokens
        return tokens.shape[0] == 1 or tokens.stride(0) == tokens.shape[1] * tokens.stride(1)

    @property
    def fused(self) -> bool:
        """Whether the extension normalises and resamples the student in one pass over the tokens, each way."""
        if self.change != RESAMPLE or self.resamples_p:
            return False
        # Tensors without memory stand for a GPU's, in a call whose launches are recorded.
        device_type = "cuda" if self.tokens.is_meta else self.tokens.device.type
        # Its rows have the tokens' type, and fp32 ones are rounded to the products' afterwards.
        same_type = self.tokens.dtype in (self.compute_dtype, torch.float32)
        return same_type and has_extension(device_type)

    @property
    def geometry(self) -> tuple[Sequence[int], Sequence[int], bool]:
        """Of the student's resampling."""
        return (self.student_height, self.student_width), (self.height, self.width), self.antialias

    @property
    def reach(self) -> int:
        """The distance in a clip all of whose teacher frames exist."""
        return min(self.distance, self.frames - 1)

    @property
    def neighbour_mode(self) -> int:
        if self.reach == 0:
            return OWN
        return COMBINED if self.cumulative and self.reach > 1 else PAIR

    @property
    def frames_fit(self) -> bool:
        """Whether neighbours are to be combined, and all frames of a token fit one tile."""
        return self.frames <= 32 and self.neighbour_mode == COMBINED

    @cached_property
    def mask(self) -> Tensor | None:
        return None if self.frame_mask is None else mask_bytes(self.frame_mask)

    @property
    def _exact(self) -> bool:
        """Whether products are in the type asked for; otherwise in fp32.

        fp16 cannot hold the gradient of a row below the norm's floor: where one is kept, tokens are normalised into
        fp32, and multiplied in TF32, which has fp16's digits.
        """
        asked = TYPES[self.compute]
        return asked == torch.bfloat16 or (asked == torch.float16 and not self.keep)

    @cached_property
    def compute_dtype(self) -> torch.dtype:
        return TYPES[self.compute] if self._exact else torch.float32

    @cached_property
    def raw(self) -> bool:
        """Whether LayerNorm folds into the product of raw tokens: of 16 bits, whose products are exact in fp32."""
        return not self.given and self.change == KEEP and self._exact and self.tokens.dtype == TYPES[self.compute]

    @property
    def tf32(self) -> bool:
        """Whether fp32 products may round their operands to 10 bits, as fp16 has."""
        if self.compute_dtype != torch.float32:
            return False
        return TYPES[self.compute] == torch.float16 or torch.backends.cuda.matmul.fp32_precision == "tf32"

    @cached_property
    def choice(self) -> Choice:
        from .tiles import choose

        return choose(self.tokens.device, self.hidden_size, self.feature_size, self.compute_dtype)

    @property
    def stored(self) -> bool:
        """Whether the forward pass keeps r dp for the backward pass.

        Not of p that is given: the backward pass reads as much to make its gradient as to scale one.
        """
        return self.keep and not self.recompute and not self.given and self.choice.training == "split"

    @property
    def statistics_count(self) -> int:
        """Numbers of each token that are kept: mean, 1/std and, where it is needed and at hand, LayerNorm's slope."""
        if self.given:
            return 0
        return 3 if self.raw and self.stored else 2

    @property
    def keeps_aligned(self) -> bool:
        """Whether the backward pass finds the student's rows on the common grid as the forward pass made them."""
        few = self.change != KEEP and should_save_aligned(self.per_frame, self.student_per_frame)
        return few and self.stored and self.keep_aligned


def mask_bytes(mask: Tensor) -> Tensor:
    """A bool mask as the kernels read it, contiguous uint8."""
    return mask.contiguous().view(torch.uint8)
