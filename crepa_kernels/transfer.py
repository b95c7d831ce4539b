"""Between host, devices and ranks: tensors to a device and numbers to the host without waiting, and tokens on ranks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
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


def check_group(group: object, name: str) -> None:
    """ValueError for what is no process group that this rank is in."""
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        # What `new_group` gives to ranks outside of it is a number.
        what = "one that it is not in" if isinstance(group, int) else type(group).__name__
        raise ValueError(f"{name} must be a torch.distributed process group of this rank, got {what}")


class ContextShard(NamedTuple):
    """The tokens [start, stop) of the clip's flattened T x P, which this rank has of each clip, and who has the rest.

    Attributes:
        group: all ranks that have tokens of the same clips.
        start, stop: of this rank.
    """

    group: dist.ProcessGroup
    start: int
    stop: int

    @classmethod
    def of(cls, group: dist.ProcessGroup, tokens: int) -> ContextShard:
        """This rank's of ``tokens``, cut into runs in the order of ranks; the first ones have one more where they must.

        As ``torch.tensor_split`` cuts, and diffusers' context parallelism.
        """
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        least, more = divmod(tokens, ranks)
        start = rank * least + min(rank, more)
        return cls(group, start, start + least + (rank < more))

    @property
    def token_range(self) -> tuple[int, int]:
        return self.start, self.stop

    @property
    def ranks(self) -> int:
        """Of the group."""
        return dist.get_world_size(self.group)

    @property
    def is_first(self) -> bool:
        """Whether this is the group's first rank: what all of them count alike is counted there."""
        return dist.get_rank(self.group) == 0

    def gathered(self, tokens: Tensor, frames: int, per_frame: int) -> Tensor:
        """(B, stop - start, D) of each rank -> (B, T, P, D) on each: one collective, differentiable."""
        rest = frames * per_frame - self.stop
        # No two ranks have the same token: their sum is every token.
        return sum_over(self.group, F.pad(tokens, (0, 0, self.start, rest))).unflatten(1, (frames, per_frame))

    def summed(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scalars of one device, each added up over the group: one collective, which the host does not wait for."""
        if not values:
            return {}
        total = torch.stack([value.detach() for value in values.values()])
        dist.all_reduce(total, group=self.group)
        return dict(zip(values, total.unbind(), strict=True))


def touched_frames(token_range: tuple[int, int], per_frame: int) -> range:
    """The frames of ``per_frame`` tokens that have one in ``token_range``."""
    start, stop = token_range
    return range(start // per_frame, -(-stop // per_frame))


def in_touched_frames(tokens: Tensor, token_range: tuple[int, int], per_frame: int) -> Tensor:
    """(B, stop - start, D) -> (B, touched frames, P, D), zeros where others have the token."""
    touched = touched_frames(token_range, per_frame)
    before, after = token_range[0] - touched.start * per_frame, touched.stop * per_frame - token_range[1]
    return F.pad(tokens, (0, 0, before, after)).unflatten(1, (len(touched), per_frame))


def index_into(frames: range, total: int) -> list[int]:
    """Of each of ``total`` frames its place among ``frames``; of those that are not there, the place of the nearest."""
    return [min(max(frame, frames.start), frames.stop - 1) - frames.start for frame in range(total)]


def sum_over(group: dist.ProcessGroup, tensor: Tensor) -> Tensor:
    """``tensor`` of all ranks added up, on each of them; differentiable any number of times.

    Its gradient is that of the sum of what the ranks make of it: every rank takes part in the backward pass.
    """
    total: Tensor = _Sum.apply(tensor, group)
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_over(ctx.group, grad), None
