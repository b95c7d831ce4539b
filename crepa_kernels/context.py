"""A clip's tokens over the ranks of a context-parallel group, each of which has a run of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


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
    def is_first(self) -> bool:
        """Whether this is the group's first rank: what all of them count alike is counted there."""
        return dist.get_rank(self.group) == 0

    def summed(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Scalars of one device, each added up over the group: one collective, which the host does not wait for."""
        if not values:
            return {}
        total = torch.stack([value.detach() for value in values.values()])
        dist.all_reduce(total, group=self.group)
        return dict(zip(values, total.unbind(), strict=True))


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
