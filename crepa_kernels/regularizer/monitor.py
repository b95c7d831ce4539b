"""Says once which side a NaN came from, without waiting for the device."""

from __future__ import annotations

import logging
import math

import torch

from ..transfer import HostCopy

logger = logging.getLogger(__name__)

_NAMES = ("the teacher's features", "the projector's weights")
_REST = "the transformer's hidden states: teacher and projector are finite"


class NonFiniteMonitor:
    """Watches the loss; when it is not finite, one warning names the side that is not finite either.

    A sum is not finite when one of its terms is not, so the teacher's features and the projector's weights are summed.
    The hidden states are what is left: reading them once more in every step would cost as much as their statistics.
    The numbers are read at the first call after they have arrived on the host; on a CPU at once.
    """

    def __init__(self) -> None:
        self._told = False
        self._under_way: list[tuple[int, HostCopy]] = []

    @torch.no_grad()
    def watch(self, step: int, loss: torch.Tensor, features: torch.Tensor, projector: torch.Tensor) -> None:
        """Queues this step's check and reports those that have arrived; ``projector`` is the sum of its weights."""
        if self._told:
            return
        numbers = torch.stack([loss.float(), features.sum(dtype=torch.float32), projector.float()])
        self._under_way.append((step, HostCopy(numbers)))
        while self._under_way and self._under_way[0][1].arrived:
            self._report(*self._under_way.pop(0))

    def flush(self) -> None:
        """Waits for the checks that are under way and reports them."""
        while self._under_way:
            self._report(*self._under_way.pop(0))

    def _report(self, step: int, numbers: HostCopy) -> None:
        loss, *sides = numbers.read()
        if math.isfinite(loss) or self._told:
            return
        self._told = True
        found = [name for name, value in zip(_NAMES, sides, strict=True) if not math.isfinite(value)]
        source = " and ".join(found) or _REST
        logger.warning("the CREPA loss at step %d is %s; it came from %s (said once)", step, loss, source)
