"""Clips whose tokens several processes share out among them, by diffusers' context parallelism."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from .data.dataset import Bucket
    from .families import TrainingFamily
    from .settings import RunSettings


def check_context(settings: RunSettings, family: TrainingFamily, buckets: Iterable[Bucket], processes: int) -> None:
    """ValueError where `context_parallel` does not divide what is shared out: processes, heads, tokens of a clip."""
    degree = settings.context_parallel
    if degree == 1:
        return
    if not family.shares_tokens:
        able = ", ".join(name for name, each in family.known.items() if each.shares_tokens)
        raise ValueError(
            f"context_parallel = {degree}: diffusers does not train {family.name} with its tokens shared out, only "
            f"{able}"
        )
    shared = {"processes": processes, "attention heads": family.configs["transformer"]["num_attention_heads"]}
    shared |= {f"tokens of {each.height}x{each.width}x{each.frames}": family.layout(each).tokens for each in buckets}
    for what, count in shared.items():
        if count % degree:
            raise ValueError(f"context_parallel = {degree} must divide the {count} {what}")


def share_tokens(transformer: Any, degree: int, device_type: str) -> None:
    """Has each `degree` processes, one after the other, share out the tokens of the same clips."""
    if degree == 1:
        return
    from diffusers import ContextParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    shape = dist.get_world_size() // degree, 1, degree
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=("data", "ring", "ulysses"))
    transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=degree, mesh=mesh))
