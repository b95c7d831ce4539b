"""A clip's tokens over the ranks of a context-parallel group, each of which has a run of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F


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

    def gathered(self, tokens: torch.Tensor, frames: int, per_frame: int) -> torch.Tensor:
        """(B, stop - start, D) of each rank -> (B, T, P, D) on each: one collective, differentiable."""
        rest = frames * per_frame - self.stop
        # No two ranks have the same token: their sum is every token.
        return sum_over(self.group, F.pad(tokens, (0, 0, self.start, rest))).unflatten(1, (frames, per_frame))

    def summed(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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


def in_touched_frames(tokens: torch.Tensor, token_range: tuple[int, int], per_frame: int) -> torch.Tensor:
    """(B, stop - start, D) -> (B, touched frames, P, D), zeros where others have the token."""
    touched = touched_frames(token_range, per_frame)
    before, after = token_range[0] - touched.start * per_frame, touched.stop * per_frame - token_range[1]
    return F.pad(tokens, (0, 0, before, after)).unflatten(1, (len(touched), per_frame))


def index_into(frames: range, total: int) -> list[int]:
    """Of each of ``total`` frames its place among ``frames``; of those that are not there, the place of the nearest."""
    return [min(max(frame, frames.start), frames.stop - 1) - frames.start for frame in range(total)]


def sum_over(group: dist.ProcessGroup, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` of all ranks added up, on each of them; differentiable any number of times.

    Its gradient is that of the sum of what the ranks make of it: every rank takes part in the backward pass.
    """
    total: torch.Tensor = _Sum.apply(tensor, group)
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return sum_over(ctx.group, grad), None
