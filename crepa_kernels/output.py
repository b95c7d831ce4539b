"""What the loss gives back."""

from __future__ import annotations

from typing import NamedTuple

import torch


class CrepaOutput(NamedTuple):
    """What ``crepa_loss`` returns; everything but ``loss`` is detached, and nothing was read back to the host.

    Attributes:
        loss: scalar, ``-mean_b(sum_f total[b, f] / T)``; the weight lambda is applied by the caller.
        similarity: scalar in [-1, 1], the mean over frames of the weighted mean cosine: ``crepa_similarity``.
        self_similarity: scalar, mean cosine with the frame's own teacher frame.
        alignment_score: scalar, mean of ``total`` as the loss uses it; it can exceed 1.
        frame_similarity: (B, T), cosine with the own teacher frame; 0 where a frame is not in the loss.
    """

    loss: torch.Tensor
    similarity: torch.Tensor
    self_similarity: torch.Tensor
    alignment_score: torch.Tensor
    frame_similarity: torch.Tensor
