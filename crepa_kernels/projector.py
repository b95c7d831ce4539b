"""The trained half of CREPA: LayerNorm and Linear from the transformer's width to the teacher's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from .ops.resample import LARGEST

Result = TypeVar("Result")


class CrepaProjector(nn.Sequential):
    """``LayerNorm(hidden_size)`` then ``Linear(hidden_size, feature_size)``: h (..., D) -> p (..., E).

    Its state-dict keys are ``0.*`` and ``1.*``, those of the plain ``nn.Sequential`` of the two. Its slices are plain.

    Args:
        hidden_size: D, the width of the transformer's blocks.
        feature_size: E, the width of the teacher's patch features.

    Raises:
        ValueError: if a size is not a positive integer, or they are too large for 64 bits.
    """

    def __init__(self, hidden_size: int, feature_size: int) -> None:
        sizes = (hidden_size, feature_size)
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
            raise ValueError(
                f"hidden_size and feature_size must be positive integers, got {hidden_size!r} and {feature_size!r}"
            )
        if hidden_size * feature_size > LARGEST:
            raise ValueError(
                f"hidden_size and feature_size are too large for 64 bits, got {hidden_size} and {feature_size}"
            )
        super().__init__(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, feature_size))
        self.hidden_size = hidden_size
        self.feature_size = feature_size

    def __getitem__(self, index: int | slice) -> nn.Module:
        # A part is no projector, and nn.Sequential would make it by this class's own constructor.
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    def forward(self, hidden_states: torch.Tensor, within: Callable[[], Result] | None = None) -> torch.Tensor | Result:
        """Projects ``hidden_states``, or calls ``within()`` while this module's weights are in place.

        Sharding wrappers (FSDP2, ZeRO-3) gather a module's weights around its ``forward``. ``crepa_loss`` reads the
        weights itself, so it runs inside this call.
        """
        if within is not None:
            return within()
        return super().forward(hidden_states)
