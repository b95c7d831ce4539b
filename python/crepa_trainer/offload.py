"""Frozen weights that wait in host memory for their block's turn: diffusers' group offloading, fit for training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from crepa_kernels.regularizer.offloading import offloading_groups

Offload = Literal["none", "block", "leaf"]
_LEVELS = {"block": "block_level", "leaf": "leaf_level"}
_HOST = torch.device("cpu")


def offload_blocks(
    transformer: Any, blocks: Sequence[nn.Module], offload: Offload, device: torch.device, *, streams: bool
) -> None:
    """Keeps the frozen weights of `blocks` in host memory while they do not compute; all else comes to `device`.

    diffusers' offloading is made for sampling. In training with gradient checkpointing

    - a weight that is trained stays under its optimizer, and what is outside of the blocks stays for its backward pass;
    - of single layers only linear ones come and go: a backward pass reads a convolution's or a norm's weight itself,
      of a product a view that keeps what it was computed with;
    - a block that is computed again never comes to the end of its forward, where it would be sent off: checkpointing
      stops it at the last tensor that it needs. So a block that begins sends off whatever else is there.

    streams: weights wait in pinned memory and come while the block before theirs computes; on a GPU.
    """
    how = {"use_stream": True, "record_stream": True} if streams else {}
    transformer.enable_group_offload(device, _HOST, offload_type=_LEVELS[offload], num_blocks_per_group=1, **how)
    coming = {id(tensor) for block in blocks for tensor in _coming(block, offload)}
    every = offloading_groups(transformer)
    for group in every:
        _keep(group, coming)
    for block in blocks:
        own = {id(group) for group in offloading_groups(block)}
        block.register_forward_pre_hook(partial(_send_off, [group for group in every if id(group) not in own]))
    _bring(transformer, blocks, coming, device)


def _coming(block: nn.Module, offload: Offload) -> Iterator[torch.Tensor]:
    for module in block.modules():
        if offload == "block" or isinstance(module, nn.Linear):
            yield from (each for each in module.parameters(recurse=False) if not each.requires_grad)
            yield from module.buffers(recurse=False)


def _keep(group: Any, coming: set[int]) -> None:
    """Leaves those tensors in a group of diffusers that are among `coming`."""
    modules: list[nn.Module] = group.modules
    parameters = [each for module in modules for each in module.parameters()] + group.parameters
    buffers = [each for module in modules for each in module.buffers()] + group.buffers
    group.modules = []
    group.parameters = [each for each in parameters if id(each) in coming]
    group.buffers = [each for each in buffers if id(each) in coming]
    group.cpu_param_dict = {each: kept for each, kept in group.cpu_param_dict.items() if id(each) in coming}


def _send_off(groups: Sequence[Any], block: nn.Module, args: Any) -> None:
    for group in groups:
        tensors = group.parameters or group.buffers
        if tensors and tensors[0].device.type == group.onload_device.type:
            group.offload_()


def _bring(transformer: nn.Module, blocks: Sequence[nn.Module], coming: set[int], device: torch.device) -> None:
    inside = {id(module) for block in blocks for module in block.modules()}
    for child in transformer.children():
        if not any(id(module) in inside for module in child.modules()):
            child.to(device)
    for tensor in (*transformer.parameters(), *transformer.buffers()):
        if id(tensor) not in coming and tensor.device.type != device.type:
            tensor.data = tensor.data.to(device)
