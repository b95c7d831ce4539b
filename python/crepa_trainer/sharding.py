"""FSDP2: each process keeps its share of weights, gradients and the optimizer's state, and gathers a block to use it.

torch's `fully_shard` itself, so that a run on CPUs takes the same path as one on GPUs: accelerate shards on no CPU.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, zeros

from crepa_kernels.models.families import family_of
from crepa_kernels.projector import Projector

from .ranks import patient_group, wait_for_all

# In a state, where a tensor of which each process has a share was: its name, its shape and its type.
_SHARE = "share"


def shard(transformer: nn.Module, device: torch.device) -> None:
    """Shards a transformer and what is attached to it over all processes, in place, and moves each share to `device`.

    A block is a unit, so is CREPA's projector, whose loss runs in its forward, and so is the rest. Types stay as they
    are, frozen bf16 beside trained fp32 in one block; gradients are added up in theirs.
    """
    if not dist.is_initialized():
        # A run of one process: what several wrote goes on there too.
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    projectors = [each for each in transformer.children() if isinstance(each, Projector)]
    # Also the rest again after its use: otherwise it is whole, and no share, until a backward that sampling lacks.
    for unit in (*family_of(transformer).blocks(transformer), *projectors, transformer):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def is_sharded(transformer: nn.Module) -> bool:
    """Whether `shard` had it: then every process takes part in whatever reads its weights or calls it."""
    return isinstance(transformer, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process may have a share, put together; then all of them call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(transformer: nn.Module, *, trained: bool) -> dict[str, Tensor]:
    """Of a sharded transformer all weights, or the trained ones, without CREPA's projector, on the CPU.

    Every process calls it; all but the first get nothing.
    """
    wait_for_all()  # the first may still be writing what it got the last time
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained)
    weights = cast(dict[str, Tensor], get_model_state_dict(transformer, options=options))
    return {name: tensor for name, tensor in weights.items() if not name.startswith("crepa_projector.")}


def whole_copy(transformer: Any) -> Any:
    """A sharded transformer as diffusers' own class, whole, on the CPU; None in all processes but the first."""
    weights = whole_weights(transformer, trained=False)
    if dist.get_rank() != 0:
        return None
    plain: Any = next(kind for kind in type(transformer).__mro__ if not issubclass(kind, FSDPModule))
    with torch.device("meta"):
        copy: Any = plain.from_config(transformer.config)
    copy.load_state_dict(weights, assign=True)
    return copy


def take_shares(value: Any, name: str, shares: dict[str, Tensor]) -> Any:
    """A state of nested mappings and lists without its shares, which are put into `shares` by their names."""
    if isinstance(value, DTensor):
        shares[name] = value.detach()
        return {_SHARE: name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {key: take_shares(each, f"{name}.{key}", shares) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [take_shares(each, f"{name}.{number}", shares) for number, each in enumerate(value)]
    return value


def place_shares(value: Any, mesh: DeviceMesh, shares: dict[str, Tensor]) -> Any:
    """A state that `take_shares` left, with new shares of zeros over `mesh`, which are put into `shares` too.

    KeyError, TypeError, AttributeError or RuntimeError for something else.
    """
    if isinstance(value, dict):
        if _SHARE in value:
            dtype = getattr(torch, value["dtype"])
            made = zeros(*value["shape"], dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
            return shares.setdefault(value[_SHARE], made)
        return {key: place_shares(each, mesh, shares) for key, each in value.items()}
    if isinstance(value, list):
        return [place_shares(each, mesh, shares) for each in value]
    return value


def write_shares(folder: Path, shares: Mapping[str, Tensor]) -> None:
    """Each process's shares as a safetensors file of its own; all of them call this, and fail together.

    OSError where one could not write.
    """
    writer = HuggingFaceStorageWriter(os.fspath(folder), save_distributed=True)
    try:
        dcp.save(dict(shares), storage_writer=writer, process_group=patient_group())
    except CheckpointException as error:
        raise OSError(_reasons(error)) from error


def read_shares(folder: Path, shares: Mapping[str, Tensor]) -> None:
    """Fills shares, or whole tensors, by their names, whatever the number of processes that wrote them was.

    All processes call this, and fail together; ValueError where the files are of other tensors or damaged.
    """
    try:
        dcp.load(
            dict(shares), storage_reader=HuggingFaceStorageReader(os.fspath(folder)), process_group=patient_group()
        )
    except (CheckpointException, SafetensorError, RuntimeError) as error:
        reason = _reasons(error) if isinstance(error, CheckpointException) else str(error)
        raise ValueError(f"{folder} is of another run: {reason}") from error


def read_whole(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Whole tensors on the CPU by what follows `prefix` in their names, in a process that has no others."""
    reader = HuggingFaceStorageReader(os.fspath(folder))
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is to be
        dcp.load(found, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def _reasons(error: CheckpointException) -> str:
    return "; ".join(f"process {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))
