"""What a run's processes say to each other beside training, however long one of them takes."""

from __future__ import annotations

from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist

from crepa_kernels.transfer import several_ranks

# One process encodes, samples, writes and exports while the others wait.
PATIENCE = timedelta(days=1)


def patient_group() -> dist.ProcessGroup | None:
    """All processes of this run, on the CPU; None where it has one. The first call is made by all of them together."""
    return _patient_group(dist.group.WORLD) if several_ranks() else None


@cache
def _patient_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    # Of the process group that there is now: another run in this process may have another.
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=PATIENCE)
    return group


def limit_waits(limit: timedelta) -> None:
    """From now on the collectives of training wait that long for a process; those of this module do not change."""
    if several_ranks():
        wait_for_all()
        # torch has no public name for it, and begins with the limit under which processes meet at the start.
        dist.distributed_c10d._set_pg_timeout(limit, dist.group.WORLD)


def wait_for_all() -> None:
    """Returns once every process is here; RuntimeError where one of them has died."""
    if (group := patient_group()) is not None:
        dist.barrier(group=group)


def anywhere(here: bool) -> bool:
    """Whether it is so in any process, for all of them; RuntimeError where one of them has died."""
    if (group := patient_group()) is None:
        return here
    found = torch.tensor(int(here))
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return bool(found)
