"""From numbers of frames or clips to the loss and its metrics, the same for every backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .inputs import LossInputs
from .output import CrepaOutput


@dataclass(frozen=True)
class Reduction:
    """How each frame counts.

    Attributes:
        mask: (B, T) bool, frames in the loss; None: all.
        divisor: (B or 1, T), 1 + the sum of the frame's neighbour weights.
        loss_divisor: the same if ``normalize_neighbour_sum``, else ones.
        frame_weight: (B, T), d(-loss)/d(total of the frame as the loss uses it).
        frame_share: (B, T), 1 / the number of frames in the loss, 0 outside it.
    """

    mask: torch.Tensor | None
    divisor: torch.Tensor
    loss_divisor: torch.Tensor
    frame_weight: torch.Tensor
    frame_share: torch.Tensor


def plan_reduction(inputs: LossInputs, weights: torch.Tensor) -> Reduction:
    """Weights of the frames, from the masks and the neighbour weights (B or 1, T, T); nothing is read to the host.

    A clip without a frame in the loss is left out of the batch mean, and with no clip left every weight is 0.
    """
    batch, frames = inputs.batch, inputs.frames
    divisor = 1 + weights.sum(dim=-1)
    loss_divisor = divisor if inputs.neighbours.normalize_sum else torch.ones_like(divisor)
    mask = inputs.frame_mask
    if mask is None:
        share = weights.new_full((batch, frames), 1 / (batch * frames))
        return Reduction(None, divisor, loss_divisor, share if inputs.normalize_by_frames else share * frames, share)
    counted = mask.to(weights.dtype)
    per_clip = counted.sum(dim=1, keepdim=True)  # (B, 1)
    clips = (per_clip > 0).sum().clamp(min=1)
    frame_weight = counted / clips
    if inputs.normalize_by_frames:
        frame_weight = frame_weight / per_clip.clamp(min=1)
    return Reduction(mask, divisor, loss_divisor, frame_weight, counted / per_clip.sum().clamp(min=1))


def reduce_frames(own: torch.Tensor, total: torch.Tensor, reduction: Reduction) -> CrepaOutput:
    """Equation: ``loss = -mean_b(sum_f total[b, f] / T)``.

    Args:
        own: (B, T), s[b, f, f].
        total: (B, T), s[b, f, f] + the weighted sum over the neighbours, not divided.
        reduction: how each frame counts.
    """
    if reduction.mask is not None:
        # A frame outside the loss may hold anything, NaN included.
        own, total = own.where(reduction.mask, 0), total.where(reduction.mask, 0)
    score = total / reduction.loss_divisor
    loss = -(score * reduction.frame_weight).sum()
    own, total, score = own.detach(), total.detach(), score.detach()
    return CrepaOutput(
        loss=loss,
        similarity=(total / reduction.divisor * reduction.frame_share).sum(),
        self_similarity=(own * reduction.frame_share).sum(),
        alignment_score=(score * reduction.frame_share).sum(),
        frame_similarity=own,
    )


def reduce_pairs(sums: torch.Tensor, mask: torch.Tensor | None, weights: torch.Tensor) -> torch.Tensor:
    """Equation: ``mean over clips of sums[b] / (the sum of w[f, k] over the clip's frames f and k)``, a scalar.

    A clip without a pair of frames is left out of the mean, and with no clip left the loss is 0.

    Args:
        sums: (B,), the sum over pairs of frames of w[f, k] times the mean cost of their tokens' pairs.
        mask: (B, T) bool, frames in the loss; None: all.
        weights: (T, T), w[f, k].
    """
    if mask is None:
        total = weights.sum().expand(sums.shape)
    else:
        total = (weights * (mask[:, :, None] & mask[:, None, :])).sum(dim=(1, 2))
    known = total > 0
    # What a clip without pairs holds may be NaN.
    mean = sums.where(known, 0) / total.where(known, 1)
    return mean.sum() / known.sum().clamp(min=1)


def counted_frames(frames: torch.Tensor, *masks: torch.Tensor | None) -> torch.Tensor:
    """How many of ``frames`` (B, T) all ``masks`` (B, T) have, a scalar on their device; None has all."""
    given = [mask for mask in masks if mask is not None]
    return torch.stack(given).all(dim=0).sum() if given else torch.full((), frames.numel(), device=frames.device)
