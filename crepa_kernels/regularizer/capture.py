"""Hidden states out of a stock transformer, by forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..models.families import Family
from ..models.layouts import Arguments, TokenLayout
from ..projector import CrepaProjector
from .attach import CREPA, Owner, check_runs


class CapturedStates(NamedTuple):
    """One block's output of the last forward: hidden_states (B, T, P, D), attached to the graph, and its layout."""

    hidden_states: torch.Tensor
    layout: TokenLayout


class _Slot:
    """Holds the video tokens of one block's output between the model's forward and the loss.

    Plain attributes and nothing that counts: a compiled frame that runs the hook recompiles on no other change.
    """

    def __init__(self, video_tokens: Callable[[Any], torch.Tensor]) -> None:
        self.armed = False
        self.output: torch.Tensor | None = None
        self._video_tokens = video_tokens

    def __call__(self, block: nn.Module, args: Any, output: Any) -> None:
        if self.armed:
            self.output = self._video_tokens(output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Slot:
        # A copied model (an EMA's) starts empty: a graph cannot be copied.
        return _Slot(self._video_tokens)

    def __getstate__(self) -> dict[str, Any]:
        return {"armed": False, "output": None, "_video_tokens": self._video_tokens}


class Capture:
    """Captures the outputs of chosen blocks during training forwards.

    The hooks are armed before the model's forward and disarmed after it, so what gradient checkpointing recomputes
    in the backward is not captured again. They are armed only while gradients are on, the model is in train mode and
    ``enabled`` is true. The states stay until the next forward or ``release()``.

    With reentrant checkpointing a block runs without gradients, but the tensor that its hook sees is the very one
    that the checkpoint's autograd function attaches to the graph when it returns.

    While gradients are on, the model's forward hook adds a 0 to the output that gives each of the projector's
    parameters a gradient of 0: they are part of every forward's graph, as DistributedDataParallel wants it, also in
    steps without CREPA.

    Nothing is on the model before ``attach()``.

    Args:
        transformer: the stock model.
        family: its row of the table.
        indices: block index by the name of the setting that chose it.
        projector: whose parameters enter the graph of each forward.
        owner: whose projector it is.

    Attributes:
        enabled: False once CREPA has ended.
        projector_sum: of all its weights in the last forward with gradients, not finite when one of them is not.

    Raises:
        ValueError: for a block index out of range, with the valid one.
    """

    def __init__(
        self,
        transformer: nn.Module,
        family: Family,
        indices: Mapping[str, int],
        projector: CrepaProjector,
        owner: Owner = CREPA,
    ) -> None:
        self._blocks = {index: family.block(transformer, index, key) for key, index in indices.items()}
        self.enabled = True
        self.projector_sum: torch.Tensor | None = None
        self._transformer = transformer
        self._family = family
        self._owner = owner
        self._projector = projector
        self._slots = {index: _Slot(family.video_tokens) for index in self._blocks}
        self._parameters = family.forward_parameters(transformer)
        self._arguments: Arguments | None = None
        self._released = False
        self._training = False
        self._gradients = False
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Puts the hooks on the model and on the chosen blocks."""
        self._handles += [
            self._transformer.register_forward_pre_hook(self._before_model, with_kwargs=True),
            self._transformer.register_forward_hook(self._after_model),
            *(block.register_forward_hook(self._slots[index]) for index, block in self._blocks.items()),
        ]

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._training = module.training
        self._gradients = torch.is_grad_enabled()
        if not torch.compiler.is_compiling():
            self._check_runs()
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        self._arguments = {name: _described(given.get(name)) for name in self._family.arguments}
        for slot in self._slots.values():
            slot.armed = self.enabled and self._training and self._gradients
            slot.output = None

    def _check_runs(self) -> None:
        # Asked where it is called, a compiled model would be compiled in five frames once CREPA ends, not in three.
        if self.enabled and self._training and self._gradients:
            check_runs(self._transformer, self._projector, self._owner)

    def _after_model(self, module: nn.Module, args: Any, output: Any) -> Any:
        for slot in self._slots.values():
            slot.armed = False
        if not torch.is_grad_enabled():
            return None
        # Inside the projector's forward, where a sharding wrapper has its weights in place.
        zero = self._projector(None, self._look_at_the_projector)
        return _add_to_sample(output, zero)

    def _look_at_the_projector(self) -> torch.Tensor:
        parameters = list(self._projector.parameters())
        if self.enabled and self._training:
            self.projector_sum = torch.stack([parameter.detach().sum() for parameter in parameters]).sum()
        zero: torch.Tensor = _ZeroOf.apply(*parameters)
        return zero

    @property
    def is_empty(self) -> bool:
        """Whether no states are held."""
        return all(slot.output is None for slot in self._slots.values())

    def states(self, index: int) -> CapturedStates:
        """The output of block ``index`` in the last forward.

        Raises:
            ValueError: for a block that is not captured, when the model has not run since attaching or ``release()``,
                ran in a way that captures nothing, or without the arguments that say how its tokens lie; the message
                says which and what to do.
        """
        if index not in self._slots:
            raise ValueError(f"block {index!r} is not captured, only {', '.join(map(str, self._slots))}")
        model = self._owner.model
        if self._arguments is None and self._released:
            raise ValueError(
                f"the {model}'s forward was not called before loss() since release(), or a loss() with weight 0, "
                "let go of the captured hidden states: call loss() and similarity_matrix() first, release() after them"
            )
        if self._arguments is None:
            raise ValueError(
                f"the {model}'s forward was not called before loss(): call {model}(...) first, and train the "
                f"very object that {self._owner.regularizer} was given (or its DDP/FSDP wrapper), not a copy of it"
            )
        output = self._slots[index].output
        if output is None:
            raise ValueError(self._why_nothing())
        layout = self._family.token_layout(self._transformer.config, self._arguments)
        if output.dim() != 3 or output.shape[1] != layout.tokens:
            raise ValueError(
                f"block {index} returned {tuple(output.shape)}, expected (B, {layout.tokens}, D): "
                f"{layout.frames} frames of {layout.grid[0]} x {layout.grid[1]} tokens"
            )
        return CapturedStates(layout.by_frame(output), layout)

    def _why_nothing(self) -> str:
        model, title = self._owner.model, self._owner.title
        if not self._gradients:
            return f"the {model} ran without gradients (no_grad or inference mode): nothing was captured for {title}"
        if not self._training:
            return f"the {model} ran in eval mode: call {model}.train() before a training forward"
        if not self.enabled:
            return f"the {model} ran after {title}'s weight became 0 for good: nothing was captured"
        return (
            f"the {model} ran but its blocks' hooks did not: compile the blocks "
            f"(block.compile() or {model}.compile_repeated_blocks()) and not the model"
        )

    def release(self) -> None:
        """Lets go of the captured states; ``states`` raises until the next forward."""
        self._arguments = None
        self._released = True
        for slot in self._slots.values():
            slot.output = None

    def remove(self) -> None:
        """Takes every hook off the model."""
        self.release()
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _described(value: Any) -> Any:
    """What is kept of an argument until the loss: of a tensor its shape, of a mapping what is no tensor."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {key: one for key, one in value.items() if not isinstance(one, torch.Tensor)}
    return value


class _ZeroOf(torch.autograd.Function):
    """0, and gradients of 0 for the parameters that it is called with, whatever their values are."""

    @staticmethod
    def forward(ctx: Any, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.layouts = [(p.shape, p.dtype, p.device) for p in parameters]
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.layouts)


def _add_to_sample(output: Any, scalar: torch.Tensor) -> Any:
    """A diffusers transformer's output (a tensor, a tuple or an output class) with a scalar added to its sample."""
    if isinstance(output, torch.Tensor):
        return _sum(output, scalar)
    if isinstance(output, tuple):
        return (_sum(output[0], scalar), *output[1:])
    return replace(output, sample=_sum(output.sample, scalar))


def _sum(sample: torch.Tensor, scalar: torch.Tensor) -> torch.Tensor:
    # The last block of a model may lie on another device than the captured one; a scalar of none is told of later.
    device = scalar.device if scalar.is_meta else sample.device
    return sample + scalar.to(device, sample.dtype, non_blocking=device.type != "cpu")
