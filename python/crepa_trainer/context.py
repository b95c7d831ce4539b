"""Clips whose tokens several processes share out among them, by diffusers' context parallelism."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from crepa_kernels.models.families import family_of

if TYPE_CHECKING:
    from .data.dataset import Bucket
    from .families import TrainingFamily
    from .settings import RunSettings

_TEXT = {"encoder_hidden_states", "encoder_attention_mask"}


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
    plan = transformer._cp_plan
    if (given := plan[""]).keys() & _TEXT:
        # Text stays whole, of any length, and so does attention to it: diffusers' backward takes a text that is shared
        # out for as long as the video.
        whole = {name: cut for name, cut in given.items() if name not in _TEXT}
        plan = {**plan, "": {**whole, "timestep": replace(whole["hidden_states"], expected_dims=2)}}
    transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=degree, mesh=mesh), cp_plan=plan)
    blocks: Iterable[Any] = family_of(transformer).blocks(transformer)
    for block in blocks:
        block.attn2.processor._parallel_config = None
