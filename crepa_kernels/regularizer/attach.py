"""Attaching the projector to a transformer, and the checks that it stays as it was attached."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..models.families import Family
from ..projector import CrepaProjector

logger = logging.getLogger(__name__)

PROJECTOR_NAME = "crepa_projector"
ORDER = "adapters, CrepaRegularizer, optimizer, LR scheduler, prepare/DDP/fully_shard"

_WRAPPERS = {
    "DataParallel": "data-parallel",
    "DistributedDataParallel": "wrapped in DDP",
    "FullyShardedDataParallel": "wrapped in FSDP",
    "FSDPModule": "sharded by fully_shard",
    "DeepSpeedEngine": "wrapped by DeepSpeed",
    "OptimizedModule": "wrapped by torch.compile (compile after attaching, or compile the blocks)",
    "PeftModel": "wrapped in a PeftModel (give its get_base_model())",
}


def check_attachable(transformer: nn.Module) -> None:
    """ValueError, naming the order, for a transformer that is wrapped, sharded, without weights or has a projector."""
    names = {base.__name__ for base in type(transformer).__mro__}
    found = [text for name, text in _WRAPPERS.items() if name in names]
    parameters = list(transformer.parameters())
    if any(type(parameter).__name__ == "DTensor" for parameter in parameters):
        found = found or ["sharded: its weights are DTensors"]
    if found:
        raise ValueError(
            f"CrepaRegularizer must be given the transformer itself, but it is {found[0]}. The order is: {ORDER}"
        )
    if hasattr(transformer, PROJECTOR_NAME):
        raise ValueError(
            f"the transformer already has a {PROJECTOR_NAME}: remove() the CrepaRegularizer that added it first"
        )
    if parameters and all(parameter.is_meta for parameter in parameters):
        raise ValueError(f"the transformer has no weights yet (meta device): load them first. The order is: {ORDER}")


def attach_projector(transformer: nn.Module, projector: CrepaProjector) -> Callable[[], None]:
    """Registers ``projector`` (fp32, trainable, on the transformer's device) and keeps it out of what is exported.

    ``state_dict()`` has the projector, so that checkpoints of training (accelerate, DDP, FSDP) are complete.
    ``save_pretrained``, which exports the model for others, leaves it out.

    Returns:
        What undoes it all.
    """
    projector.to(device=next(transformer.parameters()).device, dtype=torch.float32).requires_grad_(True)
    transformer.add_module(PROJECTOR_NAME, projector)
    transformer.save_pretrained = partial(_save_without_projector, transformer)  # type: ignore[assignment]

    def detach() -> None:
        transformer._modules.pop(PROJECTOR_NAME, None)
        transformer.__dict__.pop("save_pretrained", None)

    return detach


def _save_without_projector(transformer: Any, *args: Any, **kwargs: Any) -> Any:
    handle = transformer.register_state_dict_post_hook(_drop_projector)
    try:
        return type(transformer).save_pretrained(transformer, *args, **kwargs)
    finally:
        handle.remove()


def _drop_projector(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for key in [key for key in state_dict if key.startswith(f"{prefix}{PROJECTOR_NAME}.")]:
        del state_dict[key]


def check_attached(transformer: nn.Module, projector: CrepaProjector) -> None:
    """ValueError, naming the order, when the projector is not in the model, or is wrapped, frozen, cast or empty."""
    held = transformer._modules.get(PROJECTOR_NAME)
    if held is not projector:
        what = "is gone from" if held is None else f"was replaced by a {type(held).__name__} in"
        raise _out_of_order(f"{what} the transformer")
    # By identity: an adapter's layer may well be called Linear, too.
    if [type(layer) for layer in projector] != [nn.LayerNorm, nn.Linear]:
        layers = ", ".join(f"{type(layer).__module__}.{type(layer).__name__}" for layer in projector)
        raise _out_of_order(f"was wrapped by an adapter that was added after it: it is now {layers}")
    for name, parameter in projector.named_parameters():
        if parameter.is_meta:
            raise _out_of_order(f"has no weights: {name} is on the meta device")
        if parameter.dtype != torch.float32:
            raise _out_of_order(f"must stay fp32, but {name} was cast to {parameter.dtype}")
        if not parameter.requires_grad:
            raise _out_of_order(
                f"must be trainable, but {name} is frozen (an adapter added afterwards, or requires_grad_(False))"
            )


def _out_of_order(what: str) -> ValueError:
    return ValueError(f"{PROJECTOR_NAME} {what}. The order is: {ORDER}")


def check_reach(transformer: nn.Module, family: Family, index: int, states: torch.Tensor) -> None:
    """Warns when no trainable weight acts on ``states``, the output of block ``index``: CREPA cannot reach the model.

    Raises:
        ValueError: when there are such weights, but the states are not attached to their graph.
    """
    later = {id(parameter) for block in family.blocks(transformer)[index + 1 :] for parameter in block.parameters()}
    skipped = {*family.after_blocks, PROJECTOR_NAME}
    reached = any(
        parameter.requires_grad and id(parameter) not in later and name.split(".", 1)[0] not in skipped
        for name, parameter in transformer.named_parameters()
    )
    if not reached:
        logger.warning(
            "no trainable weight acts on block %d or before it (no adapter reaches a block up to it): "
            "only CREPA's projector learns from CREPA",
            index,
        )
    elif not states.requires_grad:
        raise ValueError(
            f"the output of block {index} is not attached to the graph, though weights up to it are trainable: with "
            "reentrant checkpointing the blocks' inputs must require gradients; use "
            "transformer.enable_gradient_checkpointing(), which is not reentrant"
        )
