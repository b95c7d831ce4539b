"""One training step: flow matching on latents with CREPA and LayerSync beside it, through accelerate.

Copy `training_step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor

from crepa_kernels.regularizer.monitor import TEACHER
from crepa_kernels.transfer import HostCopy, several_ranks

from .alignment import AlignedClip
from .optimizers import learning_rate
from .sharding import whole

if TYPE_CHECKING:
    from crepa_kernels import CrepaRegularizer

    from .data.sampler import MicroBatch, Position
    from .families import TrainingFamily
    from .families.noise import NoisyLatents
    from .state import TrainState


# What is added to the loss, by its logs.
_ADDED = ("crepa_loss", "crepa_relational_loss", "layersync_loss")


def flow_matching_loss(prediction: Tensor, noisy: NoisyLatents) -> Tensor:
    """Mean squared error in fp32 over the frames that are predicted."""
    error = (prediction.float() - noisy.target.float()).square()
    if noisy.frame_mask is None:
        return error.mean()
    per_frame = error.mean((1, 3, 4))  # (B, T)
    return (per_frame * noisy.frame_mask).sum() / noisy.frame_mask.sum()


def training_step(
    state: TrainState, family: TrainingFamily, batch: MicroBatch, position: Position, *, look: bool = False
) -> dict[str, Any]:
    """One micro-batch from its noise to the optimizer, which steps when the last one of its optimizer step is done.

    batch: on any device; its teacher's side may be empty once CREPA needs none. look: adds `look`, an `AlignedClip`
    of the first clip, in steps in which CREPA runs.

    Returns the values to log: detached tensors, floats and bools, nothing read from the device yet.
    """
    accelerator, crepa, layersync = state.accelerator, state.crepa, state.layersync
    # From pinned memory the host does not wait for it.
    batch = send_to_device(batch, accelerator.device, non_blocking=accelerator.device.type != "cpu")
    noisy = family.noisy(batch.clips, batch.noise, batch.time)
    with accelerator.accumulate(state.transformer):
        prediction = family.predict(state.transformer, noisy, batch.clips)
        flow_loss = loss = flow_matching_loss(prediction, noisy)
        logs: dict[str, Any] = {}
        seen: dict[str, AlignedClip] = {}
        if crepa is not None:
            aux, logs = crepa.loss(step=position.step, frame_mask=noisy.frame_mask, **batch.teacher)
            loss = flow_loss + aux
            if look and "crepa_loss" in logs:
                sides, masks = crepa.sides(frame_mask=noisy.frame_mask, **batch.teacher)
                seen = {"look": AlignedClip.of(crepa.config, sides, masks)}
        if layersync is not None:
            aux, of_blocks = layersync.loss()
            loss, logs = loss + aux, logs | of_blocks
        for each in (crepa, layersync):
            if each is not None:
                each.release()  # the captured hidden states
        # The mean over all processes is to be one over clips, of which several have parts.
        accelerator.backward(loss * state.context_parallel if state.context_parallel > 1 else loss)
        if accelerator.sync_gradients:
            norm = whole(accelerator.clip_grad_norm_(state.transformer.parameters(), state.max_grad_norm))
            logs["grad_norm"] = norm
            # What clipping divided by, so that these are as large as they were before it, as the norm is.
            scale = (norm / state.max_grad_norm).clamp(min=1)
            logs |= {name: value * scale for name, value in gradient_norms(state).items()}
            logs["learning_rate"] = learning_rate(state.optimizer)
        state.optimizer.step()
        if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
            state.scheduler.step()
        state.optimizer.zero_grad()
    if state.context_parallel > 1:
        # The logs are the clips', the losses beside the first a part of theirs.
        loss = sum((logs[name] for name in _ADDED if name in logs), start=flow_loss)
    return {"loss": loss.detach(), "flow_loss": flow_loss.detach(), **logs, **seen}


def gradient_norms(state: TrainState) -> dict[str, Tensor]:
    """Norms of the gradients of CREPA's projector and of all else that is trained, in fp32 on their device."""
    projector = None if state.crepa is None else state.crepa.projector
    own = set() if projector is None else {id(p) for p in projector.parameters()}
    grads: dict[str, list[Tensor]] = {"grad_norm_model": [], "grad_norm_projector": []}
    for p in state.transformer.parameters():
        if p.grad is not None:
            grads["grad_norm_projector" if id(p) in own else "grad_norm_model"].append(p.grad)
    return {name: whole(torch.nn.utils.get_total_norm(found)) for name, found in grads.items() if found}


class StepValues:
    """The logged values of one optimiser step, each the mean over its micro-batches and ranks.

    Tensors stay on the device until `send`, the step's one all-reduce, which has them copied to the host; `read` waits
    for that, at no cost once the next step is under way. Plain numbers are the same on every rank and micro-batch; the
    last is kept.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._numbers: dict[str, float] = {}
        self._sent: HostCopy | None = None

    def add(self, logs: Mapping[str, Tensor | float | bool]) -> None:
        """Adds one micro-batch's values."""
        for name, value in logs.items():
            if not isinstance(value, Tensor):
                self._numbers[name] = float(value)
            elif name in self._sums:
                self._sums[name] = self._sums[name] + value.float()
                self._counts[name] += 1
            else:
                self._sums[name], self._counts[name] = value.detach().float().reshape(()), 1

    def send(self) -> None:
        """Nothing is added after this. Call it in every process, after the same micro-batches."""
        means = torch.stack([total / self._counts[name] for name, total in self._sums.items()])
        self._sent = HostCopy(means, over_ranks=several_ranks())

    def read(self) -> dict[str, float]:
        """The means, in the order in which they were added."""
        if self._sent is None:
            raise ValueError("send() comes before read()")
        means = self._sent.read()
        if several_ranks():
            # In fp32, as they are.
            means = (torch.tensor(means, dtype=torch.float32) / dist.get_world_size()).tolist()
        values = dict(zip(self._sums, means, strict=True)) | self._numbers
        if math.isnan(values.get("crepa_similarity_ema", 0.0)):
            del values["crepa_similarity_ema"]  # before its first value
        return values


class StepReports:
    """Checks and reports each optimiser step's values a step late, so that the host never waits for the device.

    At the end of the `with` block the last ones too. Call `flush` before anything that must not come of numbers that
    are not finite, such as a checkpoint: nothing is under way after it. The same calls in every process.

    report: called with each step and its values, in their order. FloatingPointError from `send` and `flush` instead,
    naming the step, as `check_finite`; nothing is reported after that.
    """

    def __init__(self, state: TrainState, report: Callable[[int, dict[str, float]], None]) -> None:
        self._state, self._report = state, report
        self._under_way: tuple[int, StepValues, bool] | None = None

    def send(self, step: int, values: StepValues) -> None:
        """Sends off what the step that was just started gives, and reports the one before it."""
        values.send()
        sent = step, values, self._state.accelerator.optimizer_step_was_skipped
        self.flush()
        self._under_way = sent

    def flush(self) -> None:
        """Waits for the values that are under way and reports them."""
        sent, self._under_way = self._under_way, None
        if sent is not None:
            step, values, skipped = sent
            read = values.read()
            check_finite(self._state.crepa, step, read, skipped=skipped)
            self._report(step, read)

    def __enter__(self) -> StepReports:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error the other ranks may have ended, and never add theirs.
        if kind is None or self._state.accelerator.num_processes == 1:
            self.flush()


def check_finite(
    crepa: CrepaRegularizer | None, step: int, values: Mapping[str, float], *, skipped: bool = False
) -> None:
    """FloatingPointError where the loss or the gradients' norm is not finite; the same on every rank.

    skipped: whether a gradient scaler left the step out, as it does with the gradients of fp16 that overflow.
    """
    wrong = [name for name in ("loss",) if not math.isfinite(values[name])]
    if not skipped and not math.isfinite(values.get("grad_norm", 0.0)):
        wrong.append("grad_norm")
    if not wrong:
        return
    source = crepa.flush() if crepa is not None else None  # says which side it came from, too
    cure = "lower the learning rate"
    if source is not None and source.startswith(TEACHER):
        cure = f"it came from {source}, which no learning rate changes: the teacher's weights or its frames are damaged"
    found = " and ".join(f"{name} is {values[name]}" for name in wrong)
    raise FloatingPointError(f"step {step}: the {found}; {cure}")
