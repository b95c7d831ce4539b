"""Attaching the projector to a model, and the checks that it stays as it was attached."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..models.families import Family
from ..projector import Projector
from ..transfer import HostCopy
from .offloading import execution_device, stays

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """Who attaches to a model: names for messages, for what is registered on it and for what is saved.

    Attributes:
        title: of the loss.
        regularizer: the class's name.
        model: what it attaches to.
        prefix: of its keys, of the projector's name and of the files.
    """

    title: str
    regularizer: str
    model: str
    prefix: str

    @property
    def projector(self) -> str:
        """The projector's name in the model."""
        return f"{self.prefix}projector"

    @property
    def order(self) -> str:
        """In which it attaches."""
        return f"adapters, {self.regularizer}, optimizer, LR scheduler, prepare/DDP/fully_shard"


CREPA = Owner("CREPA", "CrepaRegularizer", "transformer", "crepa_")
LAYERSYNC = Owner("LayerSync", "LayerSync", "transformer", "layersync_")  # which has no projector and no files
UREPA = Owner("U-REPA", "UrepaRegularizer", "unet", "urepa_")

_PLAIN = ("Parameter", "Tensor", "DTensor")  # by name: importing DTensor takes longer than importing this package

_WRAPPERS = {
    "DataParallel": "data-parallel",
    "DistributedDataParallel": "wrapped in DDP",
    "FullyShardedDataParallel": "wrapped in FSDP",
    "FSDPModule": "sharded by fully_shard",
    "DeepSpeedEngine": "wrapped by DeepSpeed",
    "OptimizedModule": "wrapped by torch.compile (compile after attaching, or compile the blocks)",
    "PeftModel": "wrapped in a PeftModel (give its get_base_model())",
}


def check_attachable(model: nn.Module, owner: Owner) -> None:
    """ValueError, naming the order, for a model that is wrapped, sharded, without weights or has a projector.

    Also one for what is no model, such as a class or a pipeline.
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        inner = isinstance(getattr(model, owner.model, None), nn.Module)
        hint = f", which has one: give its .{owner.model}" if inner else ""
        raise ValueError(f"{owner.regularizer} must be given the {owner.model} itself, got {what}{hint}")
    names = {base.__name__ for base in type(model).__mro__}
    found = [text for name, text in _WRAPPERS.items() if name in names]
    parameters = list(model.parameters())
    if any(type(parameter).__name__ == "DTensor" for parameter in parameters):
        found = found or ["sharded: its weights are DTensors"]
    if found:
        raise ValueError(
            f"{owner.regularizer} must be given the {owner.model} itself, but it is {found[0]}. "
            f"The order is: {owner.order}"
        )
    if hasattr(model, owner.projector):
        raise ValueError(
            f"the {owner.model} already has a {owner.projector}: remove() the {owner.regularizer} that added it first"
        )
    if parameters and all(parameter.is_meta for parameter in parameters):
        raise ValueError(
            f"the {owner.model} has no weights yet (meta device): load them first. The order is: {owner.order}"
        )


def attach_projector(model: nn.Module, projector: Projector, block: nn.Module, owner: Owner) -> Callable[[], None]:
    """Registers ``projector`` (fp32, trainable, where ``block`` computes) and keeps it out of what is exported.

    ``state_dict()`` has the projector, so that checkpoints of training (accelerate, DDP, FSDP) are complete.
    ``save_pretrained``, which exports the model for others, leaves it out.

    Returns:
        What undoes it all.
    """
    # A model may lie on several devices, or in part on none. The projector reads what the captured block writes.
    projector.to(device=execution_device(block, model), dtype=torch.float32).requires_grad_(True)
    model.add_module(owner.projector, projector)
    if hasattr(type(model), "save_pretrained"):
        model.save_pretrained = partial(_save_without, model, owner.projector)  # type: ignore[assignment]

    # No closure: a copied regularizer detaches from its own copy of the model.
    return partial(_detach, model, owner.projector)


def _detach(model: nn.Module, projector: str) -> None:
    model._modules.pop(projector, None)
    model.__dict__.pop("save_pretrained", None)


def _save_without(model: Any, projector: str, *args: Any, **kwargs: Any) -> Any:
    handle = model.register_state_dict_post_hook(partial(_drop, projector))
    try:
        return type(model).save_pretrained(model, *args, **kwargs)
    finally:
        handle.remove()


def _drop(projector: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for key in [key for key in state_dict if key.startswith(f"{prefix}{projector}.")]:
        del state_dict[key]


def check_attached(model: nn.Module, projector: Projector, owner: Owner) -> None:
    """ValueError, naming the order, when the projector is not in the model, or is wrapped, frozen, cast or empty."""
    held = model._modules.get(owner.projector)
    if held is not projector:
        what = "is gone from" if held is None else f"was replaced by a {type(held).__name__} in"
        raise _out_of_order(owner, f"{what} the {owner.model}")
    parameters = list(projector.named_parameters())
    for name, parameter in parameters:
        # Before layers are looked at: a quantizing library may replace those, too.
        if type(parameter).__name__ not in _PLAIN:
            raise _out_of_order(owner, f"must stay fp32, but {name} was quantized to {type(parameter).__name__}")
    # By identity: an adapter's layer may well be called Linear, too.
    if tuple(type(layer) for layer in projector) != projector.LAYERS:
        layers = ", ".join(f"{type(layer).__module__}.{type(layer).__name__}" for layer in projector)
        raise _out_of_order(owner, f"was wrapped by an adapter that was added after it: it is now {layers}")
    for name, parameter in parameters:
        if parameter.is_meta:
            raise _out_of_order(owner, f"has no weights: {name} is on the meta device")
        if parameter.dtype != torch.float32:
            raise _out_of_order(owner, f"must stay fp32, but {name} was cast to {parameter.dtype}")
        if not parameter.requires_grad:
            raise _out_of_order(
                owner,
                f"must be trainable, but {name} is frozen (an adapter added afterwards, or requires_grad_(False))",
            )


def check_runs(model: nn.Module, projector: Projector, owner: Owner) -> None:
    """``check_attached`` before a forward that could not run: the model or its hooks would fail without the reason.

    Most kernels know neither 8-bit types nor quantized weights. Where the model was offloaded after attaching, the
    projector stays all the same: the loss reads its weights after the model's forward, and the optimizer changes them.
    """
    stays(projector)
    for parameter in projector.parameters():
        if type(parameter).__name__ not in _PLAIN or parameter.dtype.itemsize == 1:
            check_attached(model, projector, owner)


def check_device(projector: Projector, states: torch.Tensor, owner: Owner) -> None:
    """ValueError, naming the order, for a projector on another device than the hidden ``states`` that it projects."""
    for parameter in projector.parameters():
        # Shards may wait on another device than they are gathered on.
        if parameter.device != states.device and type(parameter).__name__ != "DTensor":
            raise _out_of_order(owner, f"is on {parameter.device}, but the captured block computes on {states.device}")


def _out_of_order(owner: Owner, what: str) -> ValueError:
    return ValueError(f"{owner.projector} {what}. The order is: {owner.order}")


def check_in_optimizers(projector: Projector, optimizers: Sequence[Any], owner: Owner) -> None:
    """ValueError, naming the order, for weights of the projector that are in none of the ``optimizers``."""
    for optimizer in optimizers:
        if not hasattr(optimizer, "param_groups"):
            raise ValueError(f"check_optimizer() takes optimizers with param_groups, got {type(optimizer).__name__}")
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, parameter in projector.named_parameters() if id(parameter) not in held]
    if missing:
        raise _out_of_order(
            owner, f"cannot learn: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not in the optimizer"
        )


class TrainingWatch:
    """Sees a projector that no optimizer changes: a warning after ``WARNED`` steps, a ValueError after ``FAILED``.

    Most optimizers raise the version counters of what they change, also at learning rate 0. Fused ones, and those that
    write through ``p.data``, do not, nor is what they change at hand where ``fully_shard`` keeps whole weights until
    the backward. So before anything is said the values of norm and biases are compared: a bias begins at 0 and shows
    the smallest step. The comparison is read a step after it was queued: the host does not wait.

    Attributes:
        unchanged: optimizer steps since the last change that was seen.
    """

    WARNED, FAILED = 5, 50

    def __init__(self, projector: Projector, owner: Owner) -> None:
        self.unchanged = 0
        self._owner = owner
        self._projector = projector
        self._step: int | None = None
        self._versions: list[tuple[int, int]] = []
        self._kept: torch.Tensor | None = None
        self._compared: HostCopy | None = None
        self._warned = False

    def look(self, step: int) -> None:
        """In the loss of an optimizer step with a weight above 0; its further micro-batches change nothing."""
        if step == self._step:
            return
        self._step = step
        first, before = not self._versions, self._versions
        self._versions = [(id(parameter), parameter._version) for parameter in self._projector.parameters()]
        if self._versions != before:
            self._begin(self._values() if first else None)
            return
        self.unchanged += 1
        if self._kept is None:
            self._kept = self._values()
        elif self.unchanged + 1 in (self.WARNED, self.FAILED):
            self._compared = HostCopy((self._values() != self._kept).any().float().reshape(1))
        elif self._compared is not None:
            [changed], self._compared = self._compared.read(), None
            if changed:
                self._begin(self._values())
            elif self.unchanged >= self.FAILED:
                raise ValueError(self._message())
            elif not self._warned:
                self._warned = True
                logger.warning("%s", self._message())

    def _begin(self, values: torch.Tensor | None) -> None:
        self.unchanged, self._kept, self._compared = 0, values, None

    @torch.no_grad()
    def _values(self) -> torch.Tensor:
        parts: list[Any] = [parameter for parameter in self._projector.parameters() if parameter.dim() == 1]
        return torch.cat([part.to_local() if type(part).__name__ == "DTensor" else part for part in parts])

    def _message(self) -> str:
        return (
            f"{self._owner.projector} has not changed over {self.unchanged} optimizer steps with a weight above 0: it "
            f"is not in the optimizer ({self._owner.regularizer}.check_optimizer(optimizer) says so at once), or a "
            "gradient scaler left out every step, or step= counts micro-batches. "
            f"The order is: {self._owner.order}"
        )


def check_reach(model: nn.Module, family: Family, index: int, states: torch.Tensor, owner: Owner) -> None:
    """Warns when no trainable weight acts on ``states``, the output of block ``index``: the loss reaches no model.

    Raises:
        ValueError: when there are such weights, but the states are not attached to their graph.
    """
    later = {id(parameter) for block in family.blocks(model)[index + 1 :] for parameter in block.parameters()}
    projectors = {name for name, module in model.named_children() if isinstance(module, Projector)}
    skipped = {*family.after_blocks, *projectors}
    # Where nobody knows what runs when, the states alone tell.
    reached = family.knows_order and any(
        parameter.requires_grad and id(parameter) not in later and name.split(".", 1)[0] not in skipped
        for name, parameter in model.named_parameters()
    )
    # An adapter outside of the model, in forwards that it replaced, shows in the states alone.
    if not reached and not states.requires_grad:
        logger.warning(
            "no trainable weight acts on %s or before it (no adapter reaches a block up to it): %s learns from %s",
            family.called(index),
            f"only {owner.title}'s projector" if owner.projector in projectors else "nothing",
            owner.title,
        )
    elif reached and not states.requires_grad:
        raise ValueError(
            f"the output of {family.called(index)} is not attached to the graph, though weights up to it are "
            "trainable: with reentrant checkpointing the blocks' inputs must require gradients; use "
            f"{owner.model}.enable_gradient_checkpointing(), which is not reentrant"
        )
