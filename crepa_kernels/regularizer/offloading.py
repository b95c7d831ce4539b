"""What diffusers' group offloading has put on a module, without importing diffusers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_GROUP_OFFLOADING = "group_offloading"
# With streams a hook of this name notes in which order layers run.
_HOOKS = (_GROUP_OFFLOADING, "layer_execution_tracker")


def offloading_groups(module: nn.Module) -> list[Any]:
    """The groups (diffusers' ``ModuleGroup``) whose weights come and go with layers of ``module``."""
    hooks = [registry.get_hook(_GROUP_OFFLOADING) for registry in _registries(module)]
    return list({id(hook.group): hook.group for hook in hooks if hook is not None}.values())


def execution_device(module: nn.Module, otherwise: nn.Module) -> torch.device:
    """Where ``module`` computes, which its weights may only come to for their turn.

    ``otherwise`` is asked for a module without weights, or whose weights are nowhere yet.
    """
    for group in offloading_groups(module):
        return torch.device(group.onload_device)
    # accelerate's, of a model that was dispatched.
    hook = getattr(module, "_hf_hook", None)
    if getattr(hook, "execution_device", None) is not None:
        return torch.device(hook.execution_device)  # type: ignore[union-attr]
    devices = [parameter.device for parameter in (*module.parameters(), *otherwise.parameters())]
    return next((each for each in devices if each.type != "meta"), devices[0])


def stays(module: nn.Module) -> None:
    """Takes the hooks off a module whose weights are read elsewhere than in its layers' own calls, and brings it back.

    They would be gone by the time that a loss reads them and an optimizer changes them.
    """
    groups = offloading_groups(module)
    if not groups:
        return
    for registry in _registries(module):
        for name in _HOOKS:
            registry.remove_hook(name, recurse=False)
    module.to(groups[0].onload_device)


def _registries(module: nn.Module) -> list[Any]:
    return [each._diffusers_hook for each in module.modules() if hasattr(each, "_diffusers_hook")]
