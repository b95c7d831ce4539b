"""Hidden states out of a stock transformer, by forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..grid import num_tokens
from ..models.families import Family
from ..models.image_ids import IMAGE_IDS, ImageIds
from ..models.layouts import OUTPUT, Arguments, TokenLayout
from ..projector import Projector
from ..transfer import check_group
from .attach import CREPA, Owner, check_runs


class CapturedStates(NamedTuple):
    """One block's output of the last forward: hidden_states (B, T, P, D), attached to the graph, and its layout.

    Of a context-parallel forward they are this rank's (B, stop - start, D), of which ``layout.shard`` says the range.
    """

    hidden_states: torch.Tensor
    layout: TokenLayout

    def gathered(self) -> CapturedStates:
        """Those of the whole clips on each rank of a context-parallel group, all of which call this; differentiable."""
        states, layout = self
        if layout.shard is None:
            return self
        whole = layout.shard.gathered(states, layout.frames, num_tokens(layout.grid))
        return CapturedStates(whole, replace(layout, shard=None))


def context_group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks over which diffusers' ``enable_parallelism`` cuts the model's sequence; None where it does not."""
    config = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    group: dist.ProcessGroup | None = None if config is None else config._flattened_mesh.get_group()
    return group


class _Slot:
    """Holds the video tokens of one block's output between the model's forward and the loss.

    Plain attributes and nothing that counts: a compiled frame that runs the hook recompiles on no other change.
    """

    def __init__(self, video_tokens: Callable[[Any], torch.Tensor], wanted: bool = False) -> None:
        self.wanted = wanted
        self.armed = False
        self.output: torch.Tensor | None = None
        self._video_tokens = video_tokens

    def __call__(self, block: nn.Module, args: Any, output: Any) -> None:
        if self.armed:
            self.output = self._video_tokens(output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Slot:
        # A copied model (an EMA's) starts empty: a graph cannot be copied.
        return _Slot(self._video_tokens, self.wanted)

    def __getstate__(self) -> dict[str, Any]:
        return {"wanted": self.wanted, "armed": False, "output": None, "_video_tokens": self._video_tokens}


class _Hooks:
    """The hooks on one model, for all of its captures: two on the model and one on each block that any of them reads.

    Attributes:
        arguments: of the last forward, what says how its tokens lie; a new mapping for each forward.
        training, gradients: whether that forward was in train mode, and with gradients.
        finished: whether it came to its end.
    """

    def __init__(self, transformer: nn.Module, family: Family) -> None:
        self.slots: dict[int, _Slot] = {}
        self.arguments: dict[str, Any] | None = None
        self.training = False
        self.gradients = False
        self.finished = False
        self._captures: list[Capture] = []
        self._family = family
        self._parameters = family.forward_parameters(transformer)
        self._image_ids = ImageIds()
        self._handles: dict[int | None, list[RemovableHandle]] = {}

    @classmethod
    def on(cls, transformer: nn.Module, family: Family) -> _Hooks:
        """Those that are on the model already, or new ones."""
        owners = (getattr(hook, "__self__", None) for hook in transformer._forward_pre_hooks.values())
        return next((owner for owner in owners if isinstance(owner, cls)), None) or cls(transformer, family)

    def join(self, capture: Capture, transformer: nn.Module, blocks: Mapping[int, nn.Module]) -> None:
        """Puts on the model and its ``blocks`` what is not there yet."""
        self._captures.append(capture)
        if None not in self._handles:
            before = transformer.register_forward_pre_hook(self._before_model, with_kwargs=True)
            self._handles[None] = [before, transformer.register_forward_hook(self._after_model)]
        for index, block in blocks.items():
            if index not in self.slots:
                self.slots[index] = _Slot(self._family.video_tokens)
                self._handles[index] = [block.register_forward_hook(self.slots[index])]
        self.look()

    def leave(self, capture: Capture) -> None:
        """Takes off what no other capture needs."""
        self._captures.remove(capture)
        needed = {index for each in self._captures for index in each.indices}
        for place in list(self._handles):
            if place not in needed and (place is not None or not self._captures):
                for handle in self._handles.pop(place):
                    handle.remove()
                self.slots.pop(place, None)  # type: ignore[arg-type]
        self.look()

    def look(self) -> None:
        """Asks the captures again which blocks they want from the next forward, and lets go of what nobody reads."""
        for index, slot in self.slots.items():
            readers = [capture for capture in self._captures if index in capture.indices]
            slot.wanted = any(capture.enabled for capture in readers)
            if not any(capture.reads for capture in readers):
                slot.output = None
        if self.arguments and not any(capture.reads for capture in self._captures):
            self.arguments.pop(IMAGE_IDS, None)  # the only one that is a tensor

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.training = module.training
        self.gradients = torch.is_grad_enabled()
        self.finished = False
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        names = given if self._family.arguments is None else self._family.arguments
        self.arguments = {
            name: given.get(name) if name == IMAGE_IDS and self._family.arguments else _described(given.get(name))
            for name in names
        }
        if not torch.compiler.is_compiling():
            self._look_before()
        for slot in self.slots.values():
            slot.armed = slot.wanted and self.training and self.gradients
            slot.output = None

    def _look_before(self) -> None:
        for capture in self._captures:
            capture.check_runs()
        ids = None if self.arguments is None else self.arguments.get(IMAGE_IDS)
        if isinstance(ids, torch.Tensor) and any(capture.captures_now for capture in self._captures):
            self._image_ids.look(ids)

    def layout(self, config: Any, output: torch.Tensor) -> TokenLayout:
        """Of the last forward's tokens, of which a block returned ``output``."""
        arguments = {**(self.arguments or {}), OUTPUT: tuple(output.shape)}
        if isinstance(ids := arguments.get(IMAGE_IDS), torch.Tensor):
            arguments[IMAGE_IDS] = self._image_ids.read(ids)
        return self._family.token_layout(config, arguments)

    def _after_model(self, module: nn.Module, args: Any, output: Any) -> Any:
        self.finished = True
        for slot in self.slots.values():
            slot.armed = False
        if torch.is_grad_enabled():
            for capture in self._captures:
                output = capture.entered(output)
        return output


class Capture:
    """Captures the outputs of chosen blocks during training forwards.

    The hooks are armed before the model's forward and disarmed after it, so what gradient checkpointing recomputes
    in the backward is not captured again. They are armed only while gradients are on, the model is in train mode and
    ``enabled`` is true. The states stay until the next forward or ``release()``.

    All captures of a model share its hooks, one on each block, and a block's output stays until those that read it
    have released it.

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
        projector: whose parameters enter the graph of each forward; None where nothing is trained beside the model.
        owner: who reads it.
        context_group: over whose ranks the model's sequence is cut, where diffusers does not cut it.

    Attributes:
        projector_sum: of all its weights in the last forward with gradients, not finite when one of them is not.

    Raises:
        ValueError: for a block index out of range, with the valid one.
    """

    def __init__(
        self,
        transformer: nn.Module,
        family: Family,
        indices: Mapping[str, int],
        projector: Projector | None = None,
        owner: Owner = CREPA,
        context_group: dist.ProcessGroup | None = None,
    ) -> None:
        if context_group is not None:
            check_group(context_group, "context_group")
        self._context_group = context_group
        self._blocks = {index: family.block(transformer, index, key) for key, index in indices.items()}
        self.projector_sum: torch.Tensor | None = None
        self._transformer = transformer
        self._family = family
        self._owner = owner
        self._projector = projector
        self._enabled = True
        self._hooks = _Hooks(transformer, family)
        # The arguments of the forward whose states are not to be read, or no longer.
        self._done: Arguments | None = None
        self._released = False
        self._attached = False

    @property
    def indices(self) -> Collection[int]:
        """The blocks that are captured."""
        return self._blocks

    @property
    def enabled(self) -> bool:
        """Whether forwards are captured; False once CREPA has ended."""
        return self._enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        if enabled != self._enabled:
            self._enabled = enabled
            self._hooks.look()

    @property
    def reads(self) -> bool:
        """Whether the states of the last forward may still be asked for."""
        return self._enabled and self._hooks.arguments is not self._done

    def attach(self) -> None:
        """Puts the hooks on the model and on the chosen blocks, where no other capture has put them there."""
        self._hooks = _Hooks.on(self._transformer, self._family)
        self._done = self._hooks.arguments
        self._hooks.join(self, self._transformer, self._blocks)
        self._attached = True

    def check_runs(self) -> None:
        """``check_runs`` of the projector, before a forward that trains it."""
        # Asked where it is called, a compiled model would be compiled in five frames once CREPA ends, not in three.
        if self._projector is not None and self.captures_now:
            check_runs(self._transformer, self._projector, self._owner)

    @property
    def captures_now(self) -> bool:
        """Whether the forward that has begun is captured."""
        return self._enabled and self._hooks.training and self._hooks.gradients

    def entered(self, output: Any) -> Any:
        """The model's output, with the projector's parameters in its graph."""
        if self._projector is None:
            return output
        # Inside the projector's forward, where a sharding wrapper has its weights in place.
        return _add_to_sample(output, self._projector(None, self._look_at_the_projector))

    def _look_at_the_projector(self) -> torch.Tensor:
        parameters = list(cast(Projector, self._projector).parameters())
        if self._enabled and self._hooks.training:
            self.projector_sum = torch.stack([parameter.detach().sum() for parameter in parameters]).sum()
        zero: torch.Tensor = _ZeroOf.apply(*parameters)
        return zero

    @property
    def is_empty(self) -> bool:
        """Whether no states are held for this capture."""
        return not self.reads or all(self._output(index) is None for index in self._blocks)

    def _output(self, index: int) -> torch.Tensor | None:
        slot = self._hooks.slots.get(index)
        return None if slot is None or not self._enabled else slot.output

    def states(self, index: int) -> CapturedStates:
        """The output of block ``index`` in the last forward.

        Raises:
            ValueError: for a block that is not captured, when the model has not run since attaching or ``release()``,
                raised, ran in a way that captures nothing, or without the arguments that say how its tokens lie; the
                message says which and what to do.
        """
        if index not in self._blocks:
            raise ValueError(f"block {index!r} is not captured, only {', '.join(map(str, self._blocks))}")
        model, arguments = self._owner.model, self._hooks.arguments
        if (arguments is None or arguments is self._done) and self._released:
            raise ValueError(
                f"the {model}'s forward was not called before loss() since release(), or a loss() with weight 0, "
                "let go of the captured hidden states: call loss() and similarity_matrix() first, release() after them"
            )
        if arguments is None or arguments is self._done:
            raise ValueError(
                f"the {model}'s forward was not called before loss(): call {model}(...) first, and train the "
                f"very object that {self._owner.regularizer} was given (or its DDP/FSDP wrapper), not a copy of it"
            )
        if not self._hooks.finished:
            raise ValueError(
                f"the {model}'s forward did not come to its end, so its hidden states are of no use: call it again "
                "before loss()"
            )
        output = self._output(index)
        if output is None:
            raise ValueError(self._why_nothing(index))
        layout = self._hooks.layout(getattr(self._transformer, "config", None), output)
        group = self._context_group or context_group_of(self._transformer)
        layout = layout if group is None else layout.over(group)
        tokens = layout.own(output)
        if tokens.dim() != 3 or tokens.shape[1] != layout.held:
            of_rank = "" if layout.shard is None else f", of which this rank has {layout.shard.token_range}"
            raise ValueError(
                f"{self._family.called(index)} returned {tuple(output.shape)}, expected (B, {layout.held}, D): "
                f"{layout.frames} frames of {layout.grid[0]} x {layout.grid[1]} tokens{of_rank}"
            )
        return CapturedStates(layout.by_frame(tokens), layout)

    def _why_nothing(self, index: int) -> str:
        model, title = self._owner.model, self._owner.title
        if not self._hooks.gradients:
            return f"the {model} ran without gradients (no_grad or inference mode): nothing was captured for {title}"
        if not self._hooks.training:
            return f"the {model} ran in eval mode: call {model}.train() before a training forward"
        if not self._enabled:
            return f"the {model} ran after {title}'s weight became 0 for good: nothing was captured"
        if self._family.blocks(self._transformer)[index] is not self._blocks[index]:
            block, owner = self._family.called(index), self._owner.regularizer
            return f"{block} was replaced after {owner} was attached: attach after it"
        return (
            f"the {model} ran but its blocks' hooks did not: compile the blocks "
            f"(block.compile() or {model}.compile_repeated_blocks()) and not the model"
        )

    def release(self) -> None:
        """Lets go of the captured states; ``states`` raises until the next forward."""
        self._done = self._hooks.arguments
        self._released = True
        self._hooks.look()

    def remove(self) -> None:
        """Takes every hook off the model that no other capture needs."""
        self.release()
        if self._attached:
            self._hooks.leave(self)
        self._attached = False


def _described(value: Any) -> Any:
    """What is kept of an argument until the loss: of tensors their shapes, of a mapping what is no tensor."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {key: one for key, one in value.items() if not isinstance(one, torch.Tensor)}
    if isinstance(value, list | tuple) and any(isinstance(one, torch.Tensor) for one in value):
        return [_described(one) for one in value]
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
    """A model's output with a scalar added to its sample: itself, the first of several, or what is called so.

    Raises:
        ValueError: for an output in which no tensor is found.
    """
    if isinstance(output, torch.Tensor):
        return _sum(output, scalar)
    if isinstance(output, tuple | list) and output:
        several = [_add_to_sample(output[0], scalar), *output[1:]]
        return several if isinstance(output, list) else tuple(several)
    if is_dataclass(output) and not isinstance(output, type):
        name = "sample" if hasattr(output, "sample") else fields(output)[0].name
        return replace(output, **{name: _add_to_sample(getattr(output, name), scalar)})
    if isinstance(output, dict) and output:
        key = "sample" if "sample" in output else next(iter(output))
        return {**output, key: _add_to_sample(output[key], scalar)}
    raise ValueError(
        "the model must return a tensor, or a tuple, list, mapping or dataclass with one in its first place or as "
        f"sample, got {type(output).__name__}: its graph would not reach the projector"
    )


def _sum(sample: torch.Tensor, scalar: torch.Tensor) -> torch.Tensor:
    # The last block of a model may lie on another device than the captured one; a scalar of none is told of later.
    device = scalar.device if scalar.is_meta else sample.device
    return sample + scalar.to(device, sample.dtype, non_blocking=device.type != "cpu")
