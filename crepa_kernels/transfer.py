"""Between host and devices without waiting: tensors to a device, and a few numbers of all ranks to the host."""

from __future__ import annotations

from functools import cache
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``. The host does not wait, but for what comes to a CPU, which could be read too early."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def several_ranks() -> bool:
    """Whether this run has a process group of more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class HostCopy:
    """Starts copying ``numbers`` to the host; ``read`` waits for them, nothing before it does.

    From a CUDA device they go to pinned memory without blocking. On a CPU they are at hand.

    Args:
        numbers: (n,), detached; not to be written to any more.
        over_ranks: add them up over the ranks first, in place. Every rank of the process group must call this, in the
            same order as its other collectives.
    """

    def __init__(self, numbers: Tensor, *, over_ranks: bool = False) -> None:
        self._numbers = numbers
        self._reduction = dist.all_reduce(numbers, async_op=True) if over_ranks else None
        self._copied: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._copy()

    def _copy(self) -> None:
        device = self._numbers.device
        # Training does not wait for the slowest rank: only this stream does.
        stream = torch.cuda.current_stream(device) if self._reduction is None else _side_stream(device)
        # Kept until the copy is over: the side stream still reads it.
        self._source = self._numbers
        with torch.cuda.stream(stream):
            if self._reduction is not None:
                self._reduction.wait()
                self._reduction = None
            host = torch.empty(self._source.shape, dtype=self._source.dtype, device="cpu", pin_memory=True)
            self._numbers = host.copy_(self._source, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(stream)

    @property
    def arrived(self) -> bool:
        """Whether ``read`` returns at once."""
        if self._copied is not None:
            return self._copied.query()
        return self._reduction is None or self._reduction.is_completed()

    def read(self) -> list[float]:
        """The numbers. Waits until they have arrived: without cost a step after they were sent."""
        if self._reduction is not None:
            self._reduction.wait()
            self._reduction = None
        if self._copied is not None:
            self._copied.synchronize()
        return cast(list[float], self._numbers.tolist())
