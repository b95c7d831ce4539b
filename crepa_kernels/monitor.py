"""Says once which side a NaN came from, without waiting for the device."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import torch

logger = logging.getLogger(__name__)

_NAMES = ("the teacher's features", "the projector's weights")
_REST = "the transformer's hidden states: teacher and projector are finite"


class NonFiniteMonitor:
    """Watches the loss; when it is not finite, one warning names the side that is not finite either.

    A sum is not finite when one of its terms is not, so the teacher's features and the projector's weights are summed.
    The hidden states are what is left: reading them once more in every step would cost as much as their statistics.
    The numbers are copied to pinned memory without blocking and read at the first call after they have arrived; on a
    CPU at once.
    """

    def __init__(self) -> None:
        self._told = False
        self._under_way: list[tuple[int, torch.Tensor, torch.cuda.Event | None]] = []

    @torch.no_grad()
    def watch(self, step: int, loss: torch.Tensor, features: torch.Tensor, weights: Iterable[torch.Tensor]) -> None:
        """Queues this step's check and reports those that have arrived."""
        if self._told:
            return
        projector = torch.stack([weight.sum(dtype=torch.float32) for weight in weights]).sum()
        numbers = torch.stack([loss.float(), features.sum(dtype=torch.float32), projector])
        arrived = None
        if numbers.is_cuda:
            host = torch.empty(3, dtype=torch.float32, pin_memory=True)
            arrived = torch.cuda.Event()
            numbers = host.copy_(numbers, non_blocking=True)
            arrived.record(torch.cuda.current_stream(loss.device))
        self._under_way.append((step, numbers, arrived))
        while self._under_way and (self._under_way[0][2] is None or self._under_way[0][2].query()):
            self._report(*self._under_way.pop(0)[:2])

    def flush(self) -> None:
        """Waits for the checks that are under way and reports them."""
        while self._under_way:
            step, numbers, arrived = self._under_way.pop(0)
            if arrived is not None:
                arrived.synchronize()
            self._report(step, numbers)

    def _report(self, step: int, numbers: torch.Tensor) -> None:
        loss, *sides = numbers.tolist()
        if math.isfinite(loss) or self._told:
            return
        self._told = True
        found = [name for name, value in zip(_NAMES, sides, strict=True) if not math.isfinite(value)]
        source = " and ".join(found) or _REST
        logger.warning("the CREPA loss at step %d is %s; it came from %s (said once)", step, loss, source)
