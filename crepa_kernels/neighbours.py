"""Which teacher frames a student frame is pulled toward, and how strongly."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch

from .ops.resample import LARGEST


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
        if isinstance(self.distance, bool) or not isinstance(self.distance, int) or not 0 <= self.distance <= LARGEST:
            raise ValueError(f"distance must be an integer of at least 0, of 64 bits, got {self.distance!r}")
        number = isinstance(self.tau, (int, float)) and not isinstance(self.tau, bool)
        if not (number and 0 < self.tau <= sys.float_info.max):
            raise ValueError(f"tau must be a finite number above 0, got {self.tau!r}")

    def offsets(self, frames: int) -> dict[int, float]:
        """Positive offset -> weight in a clip of ``frames`` frames, all of which exist (d is clamped to frames - 1)."""
        distance = min(self.distance, frames - 1)
        chosen = range(1, distance + 1) if self.cumulative else range(distance, distance + 1)
        return {offset: math.exp(-offset / self.tau) for offset in chosen if offset > 0}

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
