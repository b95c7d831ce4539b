"""Sum and count of the similarity over one optimiser step's micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..transfer import HostCopy, moved, several_ranks

Numbers = tuple[float, float]


def _sum_type(device: torch.device) -> torch.dtype:
    # MPS has no float64.
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass
class StepSum:
    """Sum and count of the metric over the unmasked frames of one optimiser step.

    While the step lasts, each rank adds up its own micro-batches in ``total``. ``send`` adds up over the ranks, once a
    step; a rank that has nothing to add takes part with zeros.

    Attributes:
        step: the optimiser step.
        updates: of the average that it counts as.
        device: where this rank adds up.
        total: (2,) of this rank while the step lasts.
        numbers: of all ranks, from a checkpoint.
        sent: of all ranks, on the way to the host.
    """

    step: int
    updates: int
    device: torch.device
    total: Tensor | None = None
    numbers: Numbers | None = None
    sent: HostCopy | None = None

    def reopen(self, device: torch.device) -> None:
        """More micro-batches of a step that a checkpoint was written in: rank 0 goes on from what all had."""
        self.device = device
        if self.numbers is not None and several_ranks() and dist.get_rank() != 0:
            self.numbers = (0.0, 0.0)
        self.total = self._start()
        self.numbers = None

    def _start(self) -> Tensor:
        numbers = torch.tensor(self.numbers or (0.0, 0.0), dtype=_sum_type(self.device))
        return moved(numbers, self.device)

    def add(self, metric_sum: Tensor, count: Tensor) -> None:
        """Adds one micro-batch: tensors of one element on one device."""
        self.device = metric_sum.device
        kind = _sum_type(self.device)
        pair = torch.stack([metric_sum.detach().reshape(()).to(kind), count.detach().reshape(()).to(kind)])
        self.total = pair if self.total is None else moved(self.total, self.device) + pair

    def send(self) -> None:
        """Starts adding up over the ranks and the copy to the host. No more is added after this."""
        if self.numbers is None and self.sent is None:
            self.sent, self.total = self._on_its_way(), None

    def _on_its_way(self) -> HostCopy:
        # A copy, as adding up over the ranks is in place and this rank may go on adding.
        total = self._start() if self.total is None else self.total.clone()
        return HostCopy(total, over_ranks=several_ranks())

    def read(self) -> Numbers:
        """Sum and count of all ranks; between ``add`` and ``send`` a collective that leaves the measurement as it is.

        Waits for the device: without cost when it was sent a step ago.
        """
        if self.numbers is not None:
            return self.numbers
        metric_sum, count = (self._on_its_way() if self.sent is None else self.sent).read()
        return metric_sum, count
