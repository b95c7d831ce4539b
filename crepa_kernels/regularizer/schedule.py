"""The weight of the loss over training, and its cutoff by similarity."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..transfer import several_ranks
from .step_sum import StepSum

if TYPE_CHECKING:
    from ..config.schema import CrepaConfig
    from ..config.shared import ScheduleSettings

logger = logging.getLogger(__name__)

# Steps between the step that measures and the first one that its measurement may change.
LAG = 2

_CPU = torch.device("cpu")
_STATE_KEYS_IN_ORDER = ("ema", "similarity_cutoff", "step", "last_run_step", "under_way")
_STATE_KEYS = set(_STATE_KEYS_IN_ORDER)
_ENTRY_KEYS = {"step", "updates", "sum", "count"}
_LAST_STEP = 2**63 - 1


def scheduled_weight(settings: ScheduleSettings, step: int, max_train_steps: int) -> float:
    """Scheduled weight at an optimiser step (from 0), before any similarity cutoff.

    Warm-up, for every scheduler: `λ step / warmup`. Then, with `x = (step - warmup) / decay` clamped to [0, 1]
    and `decay` the rest of the run where `decay_steps` is 0:

    - constant: `λ`
    - linear: `λ_end + (λ - λ_end)(1 - x)`
    - cosine: `λ_end + (λ - λ_end)(1 + cos(πx))/2`
    - polynomial: `λ_end + (λ - λ_end)(1 - x)^power`

    0 from `cutoff_step` on, where that is not 0.
    """
    start, end, warmup = settings.weight, settings.lambda_end, settings.warmup_steps
    if step_cutoff(settings, step):
        return 0.0
    if step < warmup:
        return start * (step / warmup)
    if settings.scheduler == "constant":
        return start
    past, decay = step - warmup, settings.decay_steps or max_train_steps - warmup
    progress = past / decay if past < decay else float(past > 0)
    left = 1.0 - progress
    if settings.scheduler == "cosine":
        left = (1.0 + math.cos(math.pi * progress)) / 2.0
    elif settings.scheduler == "polynomial":
        left = left**settings.power
    # Exactly λ at the start and exactly λ_end at the end.
    return start * left + end * (1.0 - left)


def step_cutoff(settings: ScheduleSettings, step: int) -> bool:
    """Whether `cutoff_step` has come."""
    return 0 < settings.cutoff_step <= step


def run_length(settings: ScheduleSettings, max_train_steps: int | None) -> int:
    """`max_train_steps`, which may be None where nothing depends on it; else a ValueError asks for it."""
    if max_train_steps is not None:
        return max_train_steps
    if settings.scheduler != "constant" and settings.decay_steps == 0:
        prefix = settings.prefix
        raise ValueError(
            f"{prefix}scheduler = {settings.scheduler} with {prefix}decay_steps = 0 decays over the rest of the run: "
            f"pass max_train_steps= to the regularizer, or set {prefix}decay_steps"
        )
    return 1


@dataclass(frozen=True)
class Decision:
    """What one optimiser step does.

    `weight` multiplies the loss. `run` False: nothing of CREPA runs. `cutoff`: the weight is 0 because of
    `cutoff_step` or the similarity, not because of warm-up or decay. `probe`: CREPA runs with weight 0,
    only to measure.
    """

    weight: float
    run: bool
    cutoff: bool
    probe: bool


class CrepaSchedule:
    """Decides, for each optimiser step, the weight and whether CREPA runs.

    A step is one call of `decide` or several with the same number (micro-batches); `observe` follows each of
    them when a threshold is set. The metric of step s decides from step s + 2 on, on every device: on CUDA its
    copy to pinned memory has arrived by then, so the host does not wait for the device, and a resumed run takes
    the same decisions. Steps may start anywhere, and may not go back.

    The similarity's moving average starts at its first value and is updated once a step from the sums over
    micro-batches and ranks. A step without an unmasked frame does not count. Nor does one whose metric is NaN or
    infinite, which is logged once: in the average it would stay for good.

    With a threshold and a process group, the first `decide` after a step in which CREPA ran adds up over the ranks
    (torch.distributed's default group, without waiting): every rank decides the same steps, whether or not it
    observed something, and so takes the same decisions.

    While the average is at or above the threshold the weight is 0: for good in the mode `permanent`; in
    `recoverable` until it drops, with a probe each time `probe_interval` steps have passed since CREPA
    last ran. A probe counts as that many updates. Where the scheduled weight itself is 0, nothing is probed.

    Args:
        config: the settings.
        max_train_steps: optimiser steps of the whole run.

    Raises:
        ValueError: `max_train_steps` is not an integer >= 1.
    """

    def __init__(self, config: CrepaConfig, max_train_steps: int) -> None:
        if isinstance(max_train_steps, bool) or not isinstance(max_train_steps, int) or max_train_steps < 1:
            raise ValueError(f"max_train_steps must be an integer >= 1, got {max_train_steps!r}")
        self.config = config
        self._settings = config.schedule
        self.max_train_steps = max_train_steps
        self._ema: float | None = None
        self._similar = False
        self._step: int | None = None
        self._last_run: int | None = None
        self._under_way: list[StepSum] = []
        self._decision: Decision | None = None
        self._warned = False
        self._tell_threshold()

    def _tell_threshold(self) -> None:
        settings = self._settings
        # One of several processes says it.
        if settings.elsewhere is not None and not (several_ranks() and dist.get_rank()):
            shown = settings.similarity_threshold, settings.similarity_metric
            # A warning, so that it is seen where logging was not configured; not of the values that are shipped.
            level = logging.INFO if shown in settings.shipped else logging.WARNING
            metric, threshold = settings.elsewhere
            words = "%ssimilarity_threshold: %g on %s is %.3g on %s"
            logger.log(level, words, settings.prefix, *shown, threshold, metric)

    def weight(self, step: int) -> float:
        """The scheduled weight at `step`, whatever the similarity: a pure function, see `scheduled_weight`."""
        return scheduled_weight(self._settings, _checked(step), self.max_train_steps)

    @property
    def ema(self) -> float | None:
        """The metric's moving average as of the last decided step; None before its first value."""
        return self._ema

    @property
    def ended(self) -> bool:
        """Whether nothing of CREPA runs in any step from the last decided one on, whatever that was measured."""
        settings, step = self._settings, self._step
        if step is None:
            return False
        if step_cutoff(settings, step) or (self._similar and settings.threshold_mode == "permanent"):
            return True
        # The schedule after warm-up is monotone, so a weight that is 0 now and in the end is 0 between.
        # A cutoff step that is to come says nothing of the steps before it.
        last = settings.cutoff_step - 1 if settings.cutoff_step else 2**53
        return step >= settings.warmup_steps and self.weight(step) == 0 and self.weight(last) == 0

    def decide(self, step: int, device: torch.device = _CPU) -> Decision:
        """What the optimiser step `step` (from 0) does; the same answer for each of its micro-batches.

        `device`: where a rank that observes nothing takes part in adding up over the ranks.
        ValueError: `step` is not an integer >= 0, or is before the last one (here or in the loaded state).
        """
        _checked(step)
        if self._step is not None and step < self._step:
            raise ValueError(f"step {step} comes after step {self._step}: steps must not go back")
        if step == self._step and self._decision is not None:
            return self._decision
        if step != self._step:
            for step_sum in self._under_way:
                step_sum.send()
            self._take_until(step - LAG)
        self._step = step
        self._decision = self._decide(step)
        if self._decision.run:
            self._last_run = step
            if self._settings.similarity_threshold is not None:
                self._open(step, self._settings.probe_interval if self._decision.probe else 1, device)
        return self._decision

    def _open(self, step: int, updates: int, device: torch.device) -> None:
        if self._under_way and self._under_way[-1].step == step:
            self._under_way[-1].reopen(device)
        else:
            self._under_way.append(StepSum(step, updates, device))

    def _decide(self, step: int) -> Decision:
        scheduled = self.weight(step)
        if not self._similar:
            return Decision(scheduled, scheduled > 0.0, step_cutoff(self._settings, step), probe=False)
        # A step that is decided again after load_state_dict is its own last run.
        due = self._last_run in (None, step) or step - self._last_run >= self._settings.probe_interval
        probe = due and scheduled > 0.0 and self._settings.threshold_mode == "recoverable"
        return Decision(0.0, run=probe, cutoff=True, probe=probe)

    def observe(self, step: int, metric_sum: Tensor, count: Tensor) -> None:
        """Adds one micro-batch of the decided step: the metric's sum over unmasked frames, and their number.

        Both are tensors of one element on one device; nothing waits for it. Without a threshold nothing is done.
        ValueError: not the step of the last `decide`, a step in which nothing runs, other shapes or devices.
        """
        if self._settings.similarity_threshold is None:
            return
        if self._decision is None or step != self._step:
            raise ValueError(f"observe(step={step!r}) must follow decide() of that step, the last is {self._step}")
        if not self._decision.run:
            raise ValueError(f"nothing of {self._settings.title} runs in step {step}, so there is nothing to observe")
        if metric_sum.numel() != 1 or count.numel() != 1 or metric_sum.device != count.device:
            raise ValueError(
                "metric_sum and count must have one element each on one device, got shapes "
                f"{tuple(metric_sum.shape)} on {metric_sum.device} and {tuple(count.shape)} on {count.device}"
            )
        self._under_way[-1].add(metric_sum, count)

    def _take_until(self, step: int) -> None:
        while self._under_way and self._under_way[0].step <= step:
            step_sum = self._under_way.pop(0)
            self._update(*step_sum.read(), step_sum.updates)

    def _update(self, metric_sum: float, count: float, updates: int) -> None:
        if count == 0.0:
            return
        value = metric_sum / count
        if not math.isfinite(value):
            if not self._warned:
                logger.warning("%s is %s and is left out of its average", self._settings.similarity_metric, value)
                self._warned = True
            return
        kept = self._settings.similarity_ema_decay**updates
        self._ema = value if self._ema is None else value + kept * (self._ema - value)
        threshold = self._settings.similarity_threshold
        reached = threshold is not None and self._ema >= threshold
        self._similar = reached or (self._similar and self._settings.threshold_mode == "permanent")

    def state_dict(self) -> dict[str, Any]:
        """Average, flag, steps and measurements still under way as plain numbers, fit for JSON; the same on every rank.

        Waits for the device, where something is under way. With a threshold and several ranks it adds up over them
        what the last step measured, so every rank must call it.
        """
        under_way = []
        for step_sum in self._under_way:
            metric_sum, count = step_sum.read()
            numbers = {"step": step_sum.step, "updates": step_sum.updates}
            under_way.append({**numbers, "sum": metric_sum, "count": count})
        return {
            "ema": self._ema,
            "similarity_cutoff": self._similar,
            "step": self._step,
            "last_run_step": self._last_run,
            "under_way": under_way,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict()`: at its step (another micro-batch of it) or any later one.

        ValueError: keys are missing or unknown, or a value cannot be one of them; the message names the key. The
        schedule is as it was then.
        """
        _check_state(state)
        self._ema = state["ema"]
        self._similar = state["similarity_cutoff"] and self._settings.similarity_threshold is not None
        self._step, self._last_run = state["step"], state["last_run_step"]
        self._under_way = [
            StepSum(entry["step"], entry["updates"], _CPU, numbers=(entry["sum"], entry["count"]))
            for entry in state["under_way"]
        ]
        self._decision = None
        self._warned = False


def _check_keys(name: str, state: object, keys: set[str]) -> None:
    if not isinstance(state, Mapping):
        raise ValueError(f"{name} must be a mapping with the keys {sorted(keys)}, got {type(state).__name__}")
    if set(state) != keys:
        raise ValueError(f"{name} must have the keys {sorted(keys)}, got {sorted(map(str, state))}")


def _check_value(key: str, value: object, valid: bool, rule: str) -> None:
    if not valid:
        raise ValueError(f"the schedule's state is wrong: {key} must be {rule}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_step(value: object, last: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= last


def _check_state(state: Mapping[str, Any]) -> None:
    _check_keys("the schedule's state", state, _STATE_KEYS)
    ema, similar, step, last_run, under_way = (state[key] for key in _STATE_KEYS_IN_ORDER)
    _check_value("ema", ema, ema is None or (_is_number(ema) and math.isfinite(ema)), "a finite number or None")
    _check_value("similarity_cutoff", similar, isinstance(similar, bool), "true or false")
    _check_value("step", step, step is None or _is_step(step, _LAST_STEP), "an integer >= 0 or None")
    last = -1 if step is None else step
    rule = "None before the first step" if step is None else f"an integer from 0 to step = {step}, or None"
    _check_value("last_run_step", last_run, last_run is None or _is_step(last_run, last), rule)
    _check_value("under_way", under_way, isinstance(under_way, (list, tuple)), "a list")
    before = -1
    for place, entry in enumerate(under_way):
        name = f"under_way[{place}]"
        _check_keys(f"the schedule's state is wrong: {name}", entry, _ENTRY_KEYS)
        later = _is_step(entry["step"], last) and entry["step"] > before
        _check_value(f"{name}.step", entry["step"], later, f"an integer after {before} and up to step = {step}")
        before = entry["step"]
        updates, count = entry["updates"], entry["count"]
        _check_value(f"{name}.updates", updates, _is_step(updates, _LAST_STEP) and updates > 0, "an integer >= 1")
        # The sum may be NaN: such a step is left out of the average.
        _check_value(f"{name}.sum", entry["sum"], _is_number(entry["sum"]), "a number")
        counted = _is_number(count) and 0 <= count < math.inf
        _check_value(f"{name}.count", count, counted, "a finite number >= 0")


def _checked(step: int) -> int:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step must be an integer >= 0, got {step!r}")
    return step
