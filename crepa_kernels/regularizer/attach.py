"""Attaching the projector to a transformer, and the checks that it stays as it was attached."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..models.families import Family
from ..projector import Projector
from ..transfer import HostCopy

logger = logging.getLogger(__name__)

PROJECTOR_NAME = "crepa_projector"
ORDER = "adapters, CrepaRegularizer, optimizer, LR scheduler, prepare/DDP/fully_shard"

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


def check_unwrapped(transformer: nn.Module, owner: str) -> None:
    """ValueError for ``owner``, naming the order, for a transformer that is wrapped, sharded or without weights.

    Also one for what is no model, such as a class or a pipeline.
    """
    if not isinstance(transformer, nn.Module):
        what = f"the class {transformer.__name__}" if isinstance(transformer, type) else type(transformer).__name__
        inner = isinstance(getattr(transformer, "transformer", None), nn.Module)
        hint = ", which has one: give its .transformer" if inner else ""
        raise ValueError(f"{owner} must be given the transformer itself, got {what}{hint}")
    names = {base.__name__ for base in type(transformer).__mro__}
    found = [text for name, text in _WRAPPERS.items() if name in names]
    parameters = list(transformer.parameters())
    if any(type(parameter).__name__ == "DTensor" for parameter in parameters):
        found = found or ["sharded: its weights are DTensors"]
    if found:
        raise ValueError(f"{owner} must be given the transformer itself, but it is {found[0]}. The order is: {ORDER}")
    if parameters and all(parameter.is_meta for parameter in parameters):
        raise ValueError(f"the transformer has no weights yet (meta device): load them first. The order is: {ORDER}")


def check_attachable(transformer: nn.Module) -> None:
    """``check_unwrapped``, and a ValueError for a transformer that has a projector."""
    check_unwrapped(transformer, "CrepaRegularizer")
    if hasattr(transformer, PROJECTOR_NAME):
        raise ValueError(
            f"the transformer already has a {PROJECTOR_NAME}: remove() the CrepaRegularizer that added it first"
        )


def attach_projector(transformer: nn.Module, projector: Projector, block: nn.Module) -> Callable[[], None]:
    """Registers ``projector`` (fp32, trainable, on the device of ``block``) and keeps it out of what is exported.

    ``state_dict()`` has the projector, so that checkpoints of training (accelerate, DDP, FSDP) are complete.
    ``save_pretrained``, which exports the model for others, leaves it out.

    Returns:
        What undoes it all.
    """
    # A model may lie on several devices, or in part on none. The projector reads what the captured block writes.
    devices = [parameter.device for parameter in (*block.parameters(), *transformer.parameters())]
    device = next((each for each in devices if each.type != "meta"), devices[0])
    projector.to(device=device, dtype=torch.float32).requires_grad_(True)
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


def check_attached(transformer: nn.Module, projector: Projector) -> None:
    """ValueError, naming the order, when the projector is not in the model, or is wrapped, frozen, cast or empty."""
    held = transformer._modules.get(PROJECTOR_NAME)
    if held is not projector:
        what = "is gone from" if held is None else f"was replaced by a {type(held).__name__} in"
        raise _out_of_order(f"{what} the transformer")
    # By identity: an adapter's layer may well be called Linear, too.
    if tuple(type(layer) for layer in projector) != projector.LAYERS:
        layers = ", ".join(f"{type(layer).__module__}.{type(layer).__name__}" for layer in projector)
        raise _out_of_order(f"was wrapped by an adapter that was added after it: it is now {layers}")
    for name, parameter in projector.named_parameters():
        if parameter.is_meta:
            raise _out_of_order(f"has no weights: {name} is on the meta device")
        if type(parameter).__name__ not in _PLAIN:
            raise _out_of_order(f"must stay fp32, but {name} was quantized to {type(parameter).__name__}")
        if parameter.dtype != torch.float32:
            raise _out_of_order(f"must stay fp32, but {name} was cast to {parameter.dtype}")
        if not parameter.requires_grad:
            raise _out_of_order(
                f"must be trainable, but {name} is frozen (an adapter added afterwards, or requires_grad_(False))"
            )


def check_runs(transformer: nn.Module, projector: Projector) -> None:
    """``check_attached`` before a forward that could not run: the model or its hooks would fail without the reason.

    Most kernels know neither 8-bit types nor quantized weights.
    """
    for parameter in projector.parameters():
        if type(parameter).__name__ not in _PLAIN or parameter.dtype.itemsize == 1:
            check_attached(transformer, projector)


def _out_of_order(what: str) -> ValueError:
    return ValueError(f"{PROJECTOR_NAME} {what}. The order is: {ORDER}")


def check_in_optimizers(projector: Projector, optimizers: Sequence[Any]) -> None:
    """ValueError, naming the order, for weights of the projector that are in none of the ``optimizers``."""
    for optimizer in optimizers:
        if not hasattr(optimizer, "param_groups"):
            raise ValueError(f"check_optimizer() takes optimizers with param_groups, got {type(optimizer).__name__}")
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, parameter in projector.named_parameters() if id(parameter) not in held]
    if missing:
        raise _out_of_order(
            f"cannot learn: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not in the optimizer"
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

    def __init__(self, projector: Projector) -> None:
        self.unchanged = 0
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
            f"{PROJECTOR_NAME} has not changed over {self.unchanged} optimizer steps with a weight above 0: it is not "
            "in the optimizer (CrepaRegularizer.check_optimizer(optimizer) says so at once), or a gradient scaler left "
            f"out every step, or step= counts micro-batches. The order is: {ORDER}"
        )


def check_reach(transformer: nn.Module, family: Family, index: int, states: torch.Tensor, owner: str = "CREPA") -> None:
    """Warns when no trainable weight acts on ``states``, the output of block ``index``: ``owner`` reaches no weight.

    Raises:
        ValueError: when there are such weights, but the states are not attached to their graph.
    """
    later = {id(parameter) for block in family.blocks(transformer)[index + 1 :] for parameter in block.parameters()}
    skipped = {*family.after_blocks, PROJECTOR_NAME}
    reached = any(
        parameter.requires_grad and id(parameter) not in later and name.split(".", 1)[0] not in skipped
        for name, parameter in transformer.named_parameters()
    )
    # An adapter outside of the model, in forwards that it replaced, shows in the states alone.
    if not reached and not states.requires_grad:
        logger.warning(
            "no trainable weight acts on block %d or before it (no adapter reaches a block up to it): "
            "%s learns from %s",
            index,
            "only CREPA's projector" if owner == "CREPA" else "nothing",
            owner,
        )
    elif reached and not states.requires_grad:
        raise ValueError(
            f"the output of block {index} is not attached to the graph, though weights up to it are trainable: with "
            "reentrant checkpointing the blocks' inputs must require gradients; use "
            "transformer.enable_gradient_checkpointing(), which is not reentrant"
        )
