"""Which frames a frame is compared with, and how strongly."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from .ops.resample import LARGEST, check_flag

Pairs = Literal["frame", "all", "cross", "neighbours"]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_decay(distance: int, tau: float) -> None:
    if isinstance(distance, bool) or not isinstance(distance, int) or not 0 <= distance <= LARGEST:
        raise ValueError(f"distance must be an integer of at least 0, of 64 bits, got {distance!r}")
    if not (_is_number(tau) and 0 < tau <= sys.float_info.max):
        raise ValueError(f"tau must be a finite number above 0, got {tau!r}")


@dataclass(frozen=True)
class Neighbours:
    """The neighbour options of the loss: w(o) = exp(-o / tau) at the offsets that the mode selects.

    Attributes:
        distance: d, frames; 0 aligns each frame with its own teacher frame only.
        tau: decay of the weight, frames.
        cumulative: every offset 1..d in both directions; False: the offset d alone.
        normalize_sum: divide each frame's total by 1 + the sum of its weights.
    """

    distance: int = 1
    tau: float = 1.0
    cumulative: bool = False
    normalize_sum: bool = False

    def __post_init__(self) -> None:
        _check_decay(self.distance, self.tau)
        check_flag(self.cumulative, "cumulative")
        check_flag(self.normalize_sum, "normalize_neighbour_sum")

    def offsets(self, frames: int) -> dict[int, float]:
        """Positive offset -> weight in a clip of ``frames`` frames, all of which exist (d is clamped to frames - 1)."""
        distance = min(self.distance, frames - 1)
        chosen = range(1, distance + 1) if self.cumulative else range(distance, distance + 1)
        return {offset: math.exp(-offset / self.tau) for offset in chosen if offset > 0}

    def around(self, own: range, frames: int) -> range:
        """Of a clip's ``frames`` those that the frames ``own`` are compared with, whichever of them exist."""
        reach = min(self.distance, frames - 1)
        return range(max(0, own.start - reach), min(frames, own.stop + reach))

    @property
    def most(self) -> float:
        """The largest ``alignment_score``: 1 + Σw, or 1 where the sum is normalised."""
        return 1.0 if self.normalize_sum else 1.0 + self.weight_sum

    @property
    def weight_sum(self) -> float:
        """Σw over both directions and every offset that a frame amid a long clip uses, in closed form."""
        offsets = float(min(self.distance, 2**53))
        if self.distance == 0:
            return 0.0
        if not self.cumulative:
            return 2.0 * math.exp(-offsets / self.tau)
        ratio = math.exp(-1.0 / self.tau)
        if ratio == 0.0:
            return 0.0
        if ratio == 1.0:
            return 2.0 * offsets
        return 2.0 * ratio * math.expm1(-offsets / self.tau) / math.expm1(-1.0 / self.tau)

    def weights(self, frames: int, teacher_mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """w(|k - f|) for every pair of frames; 0 at k = f and where k is no neighbour of f or does not exist.

        Args:
            frames: T.
            teacher_mask: (B, T) bool, teacher frames that exist; None: all.
            like: gives the result's device and floating type.

        Returns:
            (B, T, T) over (clip, student frame f, teacher frame k), with B = 1 without a mask. Nothing is read back
            to the host.
        """
        frame = torch.arange(frames, device=like.device)
        offset = (frame[None, :] - frame[:, None]).abs()
        if teacher_mask is None:
            distance = torch.full((1, 1, 1), min(self.distance, frames - 1), device=like.device)
        else:
            distance = (teacher_mask.sum(dim=1) - 1).clamp(min=0, max=self.distance)[:, None, None]
        chosen = (offset <= distance) if self.cumulative else (offset == distance)
        # Not a product: at offset 0 the exponent is NaN where tau is 0 in the type.
        weights = torch.exp(-offset.to(like.dtype) / self.tau).where(chosen & (offset > 0), 0)
        return weights if teacher_mask is None else weights * teacher_mask[:, None, :]


@dataclass(frozen=True)
class Relation:
    """The pairs of frames whose tokens the relational loss compares, and what a difference of cosines costs.

    Attributes:
        pairs: ``"frame"`` is each frame with itself, ``"all"`` every two, ``"cross"`` every two different ones,
            ``"neighbours"`` each with itself and, by exp(-offset / tau), with those at most ``distance`` away.
        distance: frames, of ``"neighbours"``.
        tau: decay of the neighbours' weight, frames.
        margin: a difference a costs max(|a| - margin, 0); None: a squared.
    """

    pairs: Pairs = "all"
    distance: int = 1
    tau: float = 1.0
    margin: float | None = None

    def __post_init__(self) -> None:
        if self.pairs not in get_args(Pairs):
            raise ValueError(f"pairs must be one of {', '.join(get_args(Pairs))}, got {self.pairs!r}")
        _check_decay(self.distance, self.tau)
        if self.margin is not None and not (_is_number(self.margin) and 0 <= self.margin <= sys.float_info.max):
            raise ValueError(f"margin must be None or a finite number of at least 0, got {self.margin!r}")

    def offsets(self, frames: int) -> dict[int, float]:
        """Offset |k - f| -> w[f, k] in a clip of ``frames`` frames; offsets of weight 0 are left out."""
        if self.pairs == "neighbours":
            weights = {o: math.exp(-o / self.tau) for o in range(min(self.distance, frames - 1) + 1)}
            return {offset: weight for offset, weight in weights.items() if weight > 0}
        first, last = int(self.pairs == "cross"), 1 if self.pairs == "frame" else frames
        return dict.fromkeys(range(first, last), 1.0)

    def weights(self, frames: int, like: torch.Tensor) -> torch.Tensor:
        """w[f, k], (T, T), on the device and in the floating type of ``like``."""
        weights = like.new_zeros(frames, frames)
        for offset, weight in self.offsets(frames).items():
            weights.diagonal(offset).fill_(weight)
            weights.diagonal(-offset).fill_(weight)
        return weights
