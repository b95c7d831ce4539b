"""`join_loss`: a loss for a loop that has no place to add one."""

from __future__ import annotations

from typing import Any

import torch


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.of_loss = torch.ones_like(loss)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradients[0], ctx.of_loss


def join_loss(output: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """``output`` unchanged, whose backward also runs that of ``loss``, once and with weight 1.

    For a loop that makes its loss of a model's output in a place that cannot be changed: it trains on the sum of both
    losses and logs its own. What it divides or scales its loss by, such as the number of micro-batches or a gradient
    scaler's factor, ``loss`` must be multiplied by beforehand.

    Args:
        output: of any shape, of which the loop makes its loss.
        loss: a scalar.

    Raises:
        ValueError: for a loss that is no scalar.
    """
    if loss.dim() != 0:
        raise ValueError(f"join_loss takes a scalar loss, got one of shape {tuple(loss.shape)}")
    return _Joined.apply(output, loss) if torch.is_grad_enabled() else output
