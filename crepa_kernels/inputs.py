"""One call of the loss, checked: what every backend receives."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from .grid import SpatialPlan, num_tokens
from .neighbours import Neighbours
from .ops.compiling import constant_when_compiled
from .ops.resample import check_flag, check_type
from .transfer import moved, touched_frames

logger = logging.getLogger(__name__)


class ProjectorWeights(NamedTuple):
    """LayerNorm (gamma, beta, eps) and Linear (weight (E, D), bias) of a projector; absent ones are None.

    Without a weight there is no projector: the hidden states are p.
    """

    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float


NO_PROJECTOR = ProjectorWeights(None, None, None, None, 0.0)


@dataclass(frozen=True)
class LossInputs:
    """The inputs and options of one call, validated.

    Shapes: hidden_states (B, T, P, D), or (B, stop - start, D) with ``token_range``, teacher_features (B, S, N, E),
    frame_index (B, T) int64 or None (S = T then), teacher_mask (B, T) bool, teacher frames that exist, frame_mask
    (B, T) bool, student frames in the loss, which are among those whose teacher frame exists; None: all.
    compute_dtype is the type of the products' operands. context_group has the ranks with the rest of the same clips'
    tokens, where a loss needs them.
    """

    hidden_states: torch.Tensor
    teacher_features: torch.Tensor
    projector: ProjectorWeights
    plan: SpatialPlan
    neighbours: Neighbours
    normalize_by_frames: bool
    frame_index: torch.Tensor | None
    frame_mask: torch.Tensor | None
    teacher_mask: torch.Tensor | None
    frames: int
    compute_dtype: torch.dtype
    token_range: tuple[int, int] | None = None
    context_group: dist.ProcessGroup | None = None
    recompute: bool = False

    @property
    def batch(self) -> int:
        return self.hidden_states.shape[0]

    @property
    def feature_size(self) -> int:
        """E."""
        return self.teacher_features.shape[3]

    @property
    def touched_frames(self) -> range:
        """Student frames of which the hidden states have a token: all, but with ``token_range``."""
        if self.token_range is None:
            return range(self.frames)
        return touched_frames(self.token_range, self.plan.tokens)

    @property
    def taught_frames(self) -> range:
        """Student frames whose teacher's frames are read: the touched ones, and as far as neighbours reach."""
        return self.neighbours.around(self.touched_frames, self.frames)

    @property
    def statistics_type(self) -> torch.dtype:
        """Type of norms, sums, loss and metrics: fp32, or fp64 for fp64 hidden states."""
        return torch.promote_types(self.hidden_states.dtype, torch.float32)


def product_type(hidden_states: torch.Tensor) -> torch.dtype:
    """The type of the products' operands: the hidden states', and autocast's where they are fp32 and it is on."""
    kind = hidden_states.device.type
    if hidden_states.dtype != torch.float32 or not torch.amp.is_autocast_available(kind):
        return hidden_states.dtype
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    if kind == "cuda":
        _look_at_fp32_products()
    return hidden_states.dtype


@constant_when_compiled
def _look_at_fp32_products() -> None:
    if torch.backends.cuda.matmul.fp32_precision != "tf32":
        warn_of_slow_products()


@cache
def warn_of_slow_products() -> None:
    """Says once that fp32 products on a GPU are slow, and what to do."""
    logger.warning(
        "the hidden states are fp32 and autocast is off: CREPA's products miss the tensor cores and take 10 to 20 "
        "times as long. Train under torch.autocast in bf16, or call torch.set_float32_matmul_precision('high')"
    )


def projector_weights(projector: nn.Module | None) -> ProjectorWeights:
    """Reads LayerNorm and Linear out of a ``CrepaProjector`` or a plain ``nn.Sequential`` of the two; of None, nothing.

    Raises:
        ValueError: if the projector is anything else, or its weights are sharded and not gathered.
    """
    if projector is None:
        return NO_PROJECTOR
    # Not children(), nor an attribute twice: each takes as long as an operator's checks.
    layers = list(projector._modules.values()) if isinstance(projector, nn.Module) else []
    plain = isinstance(projector, nn.Sequential) and [type(layer) for layer in layers] == [
        nn.LayerNorm,
        nn.Linear,
    ]
    if not plain:
        found = ", ".join(type(layer).__name__ for layer in layers)
        raise ValueError(
            f"projector must be a CrepaProjector, an nn.Sequential of LayerNorm and Linear, or None for hidden states "
            f"that are projected already, got {type(projector).__name__}({found}). An adapter added later wraps it: "
            "add adapters first"
        )
    norm, linear = layers
    assert isinstance(norm, nn.LayerNorm)  # for the type checker: compared just above
    assert isinstance(linear, nn.Linear)
    weights = ProjectorWeights(norm.weight, norm.bias, linear.weight, linear.bias, norm.eps)
    for parameter in weights[:4]:
        if type(parameter).__name__ == "DTensor":
            raise ValueError(
                "the projector's weights are DTensors: make it a CrepaProjector and its own fully_shard unit, so that "
                "they are gathered around its forward, in which the loss runs"
            )
    if tuple(norm.normalized_shape) != (linear.in_features,):
        raise ValueError(
            f"the projector's LayerNorm is over {tuple(norm.normalized_shape)}, its Linear takes {linear.in_features}"
        )
    return weights


def check_tensors(
    h: torch.Tensor, y: torch.Tensor, weights: ProjectorWeights, plan: SpatialPlan, sliced: bool = False
) -> None:
    """Shapes, types and devices of the student's and the teacher's side; ValueError with the numbers in it."""
    last = "E" if weights.weight is None else "D"
    given = f"(B, stop - start, {last}) with token_range" if sliced else f"(B, T, P, {last}) or (B, T x P, {last})"
    for name, tensor, symbols in (
        ("hidden_states", h, given),
        ("teacher_features", y, "(B, S, N, E)"),
    ):
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} must be a tensor {symbols}, got {type(tensor).__name__}")
        axes = {shape.count(",") + 1 for shape in symbols.split(" or ")}
        if tensor.dim() not in axes or 0 in tensor.shape:
            raise ValueError(f"{name} must be {symbols} with no empty axis, got shape {tuple(tensor.shape)}")
        check_type(tensor, name)
    if h.shape[0] != y.shape[0]:
        raise ValueError(f"hidden_states have {h.shape[0]} clips, teacher_features {y.shape[0]}")
    tokens = num_tokens(plan.student_grid)
    if h.dim() == 3 and not sliced and h.shape[1] % tokens:
        raise ValueError(
            f"student_grid {plan.student_grid} has {plan.student_grid[0]} x {plan.student_grid[1]} = {tokens} tokens a "
            f"frame, of which the {h.shape[1]} of hidden_states {tuple(h.shape)} are no whole number of frames"
        )
    for side, tensor, grid in (("student", h, plan.student_grid), ("teacher", y, plan.teacher_grid)):
        if tensor.dim() == 4 and tensor.shape[2] != num_tokens(grid):
            raise ValueError(
                f"{side}_grid {grid} has {grid[0]} x {grid[1]} = {num_tokens(grid)} tokens a frame, "
                f"the {side}'s tensor of shape {tuple(tensor.shape)} has {tensor.shape[2]}"
            )
    for part in weights:
        if isinstance(part, torch.Tensor):
            check_type(part, "the projector's weights")
    if weights.weight is None and h.shape[-1] != y.shape[3]:
        raise ValueError(
            f"hidden_states have width {h.shape[-1]} and teacher_features {y.shape[3]}: without a projector the hidden "
            "states are projected already, to the teacher's width"
        )
    feature_size, hidden_size = (y.shape[3], h.shape[-1]) if weights.weight is None else weights.weight.shape
    if h.shape[-1] != hidden_size:
        raise ValueError(f"hidden_states have width {h.shape[-1]}, the projector takes {hidden_size}")
    if y.shape[3] != feature_size:
        raise ValueError(f"teacher_features have width {y.shape[3]}, the projector makes {feature_size}")
    projector = {tensor.device for tensor in weights if isinstance(tensor, torch.Tensor)}
    if len({h.device, y.device, *projector}) > 1:
        others = f", the projector on {' and '.join(sorted(map(str, projector)))}" if projector else ""
        raise ValueError(f"hidden_states are on {h.device}, teacher_features on {y.device}{others}")


def _on_device(tensor: torch.Tensor, name: str, device: torch.device) -> torch.Tensor:
    """``tensor`` moved to the hidden states' ``device``; ValueError for one that has no memory to move."""
    if tensor.device != device and tensor.is_meta:
        raise ValueError(f"{name} is on {tensor.device}, the hidden states on {device}")
    return moved(tensor, device)


def check_frame_index(
    frame_index: torch.Tensor | Sequence[int] | None,
    batch: int,
    student_frames: int,
    teacher_frames: int,
    device: torch.device,
) -> torch.Tensor | None:
    """``frame_index`` as (B, T) int64 on ``device``; without one S must equal T.

    The values are checked where that costs no synchronisation: on a CPU. Elsewhere, and in a compiled loss, a frame
    out of range is NaN (``frames_at``).
    """
    if frame_index is None:
        if teacher_frames != student_frames:
            raise ValueError(
                f"hidden_states have {student_frames} frames and teacher_features {teacher_frames}: "
                "select one teacher frame per student frame (select_frames) or pass frame_index"
            )
        return None
    index = _as_integers(frame_index)
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise ValueError(f"frame_index must hold integers, got {index.dtype}")
    if tuple(index.shape) not in {(student_frames,), (batch, student_frames)}:
        raise ValueError(
            f"frame_index must be (T,) = ({student_frames},) or (B, T) = ({batch}, {student_frames}), "
            f"got {tuple(index.shape)}"
        )
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        values = index.flatten().tolist()
        if min(values) < 0 or max(values) >= teacher_frames:
            raise ValueError(
                f"frame_index must lie in [0, {teacher_frames}), the teacher's frames; "
                f"it reaches from {min(values)} to {max(values)}"
            )
    return _on_device(index.to(torch.int64), "frame_index", device).expand(batch, student_frames)


def _as_integers(frame_index: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """``frame_index`` as a tensor; ValueError where it is none: ragged lists, text, huge numbers."""
    if isinstance(frame_index, torch.Tensor):
        return frame_index
    try:
        # On a CPU, whatever the default device is.
        return torch.as_tensor(frame_index, device="cpu")
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"frame_index must hold integers of at most 64 bits, (T,) or (B, T): {error}") from error


def frames_at(features: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The frames ``index`` (B, T) of ``features`` (B, S, N, E): (B, T, N, E), NaN where there is no such frame."""
    last = features.shape[1] - 1
    clip = torch.arange(len(index), device=index.device)[:, None]
    known = (index >= 0) & (index <= last)
    return features[clip, index.clamp(0, last)].where(known[..., None, None], math.nan)


def check_mask(
    mask: torch.Tensor | None, name: str, shape: tuple[int, int], device: torch.device
) -> torch.Tensor | None:
    """A (B, T) bool mask on ``device``, or None."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"{name} must be a bool tensor of shape (B, T) = {shape}, got {type(mask).__name__}")
    if mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise ValueError(f"{name} must be bool of shape (B, T) = {shape}, got {mask.dtype} of {tuple(mask.shape)}")
    return _on_device(mask, name, device)


def check_token_range(token_range: Sequence[int], h: torch.Tensor, plan: SpatialPlan, frames: int) -> tuple[int, int]:
    """``token_range`` as (start, stop) of the clip's flattened T x P tokens, which ``h`` (B, stop - start, D) holds."""
    values = tuple(token_range) if isinstance(token_range, Sequence) else (token_range,)
    total = frames * num_tokens(plan.student_grid)
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    if len(values) != 2 or not whole or not 0 <= values[0] < values[1] <= total:
        raise ValueError(
            f"token_range must be (start, stop) with 0 <= start < stop <= T x P = {frames} x "
            f"{num_tokens(plan.student_grid)} = {total}, got {values}"
        )
    if h.shape[1] != values[1] - values[0]:
        raise ValueError(f"token_range {values} has {values[1] - values[0]} tokens, hidden_states have {h.shape[1]}")
    if plan.student != "keep":
        raise ValueError(
            f"token_range needs the teacher on the student's grid {plan.student_grid}: spatial_align would take the "
            f"student from there to {plan.grid}"
        )
    return values[0], values[1]


def check_inputs(
    hidden_states: torch.Tensor,
    teacher_features: torch.Tensor,
    projector: nn.Module | None,
    plan: SpatialPlan,
    neighbours: Neighbours,
    *,
    normalize_by_frames: bool = True,
    frame_index: torch.Tensor | Sequence[int] | None = None,
    frame_mask: torch.Tensor | None = None,
    teacher_mask: torch.Tensor | None = None,
    token_range: Sequence[int] | None = None,
    context_group: dist.ProcessGroup | None = None,
    recompute: bool = False,
) -> LossInputs:
    """Checks the arguments of ``crepa_loss`` against each other; ValueError with the numbers in it."""
    check_flag(normalize_by_frames, "normalize_by_frames")
    check_flag(recompute, "recompute")
    weights = projector_weights(projector)
    check_tensors(hidden_states, teacher_features, weights, plan, token_range is not None)
    if hidden_states.dim() == 3 and token_range is None:
        hidden_states = hidden_states.unflatten(1, (-1, num_tokens(plan.student_grid)))
    batch, frames = hidden_states.shape[:2]
    device = hidden_states.device
    if token_range is not None:
        # A slice of the tokens does not tell the clip's frames; the index or the teacher does.
        frames = teacher_features.shape[1] if frame_index is None else _as_integers(frame_index).shape[-1:].numel()
        token_range = check_token_range(token_range, hidden_states, plan, frames)
    frame_mask = check_mask(frame_mask, "frame_mask", (batch, frames), device)
    teacher_mask = check_mask(teacher_mask, "teacher_mask", (batch, frames), device)
    if teacher_mask is not None:
        frame_mask = teacher_mask if frame_mask is None else frame_mask & teacher_mask
    return LossInputs(
        hidden_states=hidden_states,
        teacher_features=teacher_features.detach(),
        projector=weights,
        plan=plan,
        neighbours=neighbours,
        normalize_by_frames=normalize_by_frames,
        frame_index=check_frame_index(frame_index, batch, frames, teacher_features.shape[1], device),
        frame_mask=frame_mask,
        teacher_mask=teacher_mask,
        frames=frames,
        # Without a projector nothing is projected in a narrower type.
        compute_dtype=hidden_states.dtype if weights.weight is None else product_type(hidden_states),
        token_range=token_range,
        context_group=context_group,
        recompute=recompute,
    )
