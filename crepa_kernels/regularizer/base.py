"""`Regularizer`: what every loss on a model's hidden states does around its loss in a training step."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import reduce
from operator import add
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..config.base import Settings
from ..config.shared import TaughtSettings
from ..models.families import Family
from ..projector import Projector
from ..teachers.encoding import EncoderSource
from ..teachers.latents import VaeSource
from ..transfer import ContextShard
from .aligning import make_projector, projector_class
from .attach import (
    CREPA,
    UREPA,
    Owner,
    TrainingWatch,
    attach_projector,
    check_attachable,
    check_attached,
    check_device,
    check_in_optimizers,
    check_reach,
)
from .capture import Capture, CapturedStates
from .monitor import NonFiniteMonitor
from .offloading import execution_device
from .saving import load_regularizer, load_weights, save_regularizer, whole_weights
from .schedule import CrepaSchedule, Decision, run_length
from .teacher import TeacherSource

logger = logging.getLogger(__name__)

Logs = dict[str, torch.Tensor | float | bool]
Self = TypeVar("Self", bound="Regularizer")


class Measured(NamedTuple):
    """What a step's loss is made of.

    Attributes:
        losses: terms of the loss by the names of their logs, with their gradients and without the schedule's weight.
        logs: what else is logged, scalars.
        features: the teacher's.
        shard: of whose tokens alone losses, logs and metric are, where other ranks have the rest of the clips.
        metric: gives the sum of what the threshold is compared with, and of how many; called where there is one.
    """

    losses: dict[str, torch.Tensor]
    logs: dict[str, torch.Tensor]
    features: torch.Tensor
    metric: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    shard: ContextShard | None = None


class Regularizer:
    """Attaches a projector and a capture to a model, decides its weight by the schedule, saves and resumes.

    A subclass says ``OWNER`` and ``CONFIG``, attaches in its constructor and has a ``loss``.

    Attributes:
        config: the settings.
        projector: the ``Projector``; None when disabled.
    """

    OWNER: ClassVar[Owner]
    CONFIG: ClassVar[type[TaughtSettings]]

    config: Any
    projector: Projector | None

    def _configure(self, config: Settings | Mapping[str, Any], model: nn.Module) -> bool:
        """Takes the settings; whether they are switched on, and there is something to attach to.

        Raises:
            ValueError: for wrong settings, or a model that is wrapped.
        """
        if isinstance(config, Settings) and not isinstance(config, self.CONFIG):
            raise ValueError(f"{self.OWNER.regularizer} takes a {self.CONFIG.__name__}, got {type(config).__name__}")
        self.config = config if isinstance(config, Settings) else self.CONFIG.from_dict(config)
        if not isinstance(config, Settings):
            self._check_switches(config)
        self.projector = None
        self._model = model
        self._removed = False
        if not self.config.enabled:
            if self.config.idle is not None:
                logger.warning("%s is %s", self.OWNER.title, self.config.idle)
            return False
        check_attachable(model, self.OWNER)
        for title, idle in self.config.idle_parts.items():
            logger.warning("%s is %s", title, idle)
        return True

    def _check_switches(self, given: Mapping[str, Any]) -> None:
        """ValueError for a mapping that switches another regularizer on and says nothing of this one.

        A warning for one that switches this one on, with keys of another whose switch it does not have.
        """
        for other in (CREPA, UREPA):
            switch = f"{other.prefix}enabled"
            strays = [key for key in given if key.startswith(other.prefix)]
            if other is not self.OWNER and strays and switch not in given and self.config.enabled:
                said = f"{', '.join(strays)} {'does' if len(strays) == 1 else 'do'} nothing for {self.OWNER.title}"
                logger.warning("%s, whose keys begin with %s", said, self.OWNER.prefix)
            if other is not self.OWNER and given.get(switch) is True and f"{self.OWNER.prefix}enabled" not in given:
                raise ValueError(
                    f"{switch} = true is of {other.title}, for a {other.model}: {other.regularizer}; "
                    f"{self.OWNER.regularizer} is for a {self.OWNER.model}, by {self.OWNER.prefix}enabled = true"
                )

    def _attach(
        self,
        family: Family,
        blocks: Mapping[str, int],
        source: TeacherSource,
        *,
        max_train_steps: int | None,
        feature_size: int | None,
        context_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Puts hooks and projector on the model.

        Args:
            family: the model's.
            blocks: index by the setting that chose it, the student's first.
            source: of the teacher's features.
            max_train_steps, feature_size, context_group: as the constructors take them.
        """
        model, settings = self._model, self.config.schedule
        self._family, self._source = family, source
        key, self._block_index = next(iter(blocks.items()))
        student = family.block(model, self._block_index, key)
        self._threshold = settings.similarity_threshold
        self._schedule = CrepaSchedule(self.config, run_length(settings, max_train_steps))
        hidden_size = family.hidden_size(getattr(model, "config", None))
        size = source.feature_size(hidden_size, feature_size, execution_device(student, model))
        self.projector = make_projector(self.config, hidden_size, size)
        self._capture = Capture(model, family, blocks, self.projector, self.OWNER, context_group)
        self._monitor = NonFiniteMonitor(self.OWNER)
        self._watch = TrainingWatch(self.projector, self.OWNER)
        self._looked_at_adapters = False
        self._capture.attach()
        self._detach = attach_projector(model, self.projector, student, self.OWNER)

    @classmethod
    def from_pretrained(
        cls: type[Self],
        folder: str | os.PathLike[str],
        model: nn.Module,
        vae: VaeSource | None = None,
        encoder: EncoderSource | None = None,
        max_train_steps: int | None = None,
        **options: Any,
    ) -> Self:
        """Attaches what ``save_pretrained`` wrote into ``folder``: the settings and the trained projector.

        Args:
            model, vae, encoder, max_train_steps, options: as the constructor takes them.

        Raises:
            ValueError: as the constructor, or when a file is missing, damaged or of another model.
        """
        config, weights = load_regularizer(folder, cls.CONFIG, cls.OWNER)
        _, size, *_ = projector_class(config).sizes_in(weights) or (None, None)  # it has none where it is off
        found = cls(config, model, vae, encoder, max_train_steps, feature_size=size, **options)  # type: ignore[call-arg]
        if found.projector is not None:
            try:
                load_weights(found.projector, weights, str(folder))
            except ValueError:
                found.remove()
                raise
        return found

    @property
    def ended(self) -> bool:
        """Whether it is off, or over for good: ``loss`` then needs nothing of the teacher's side."""
        return self.projector is None or self._schedule.ended

    def captured(self, block: int | None = None) -> CapturedStates:
        """What the last forward of training left of a block: hidden states (B, T, P, D), attached, and their layout.

        Args:
            block: its index, ``crepa_block_index`` or in backbone mode ``crepa_teacher_block_index``; the first if not
                given.

        Raises:
            ValueError: where nothing is held, as before a forward, after ``release`` or once CREPA has ended; for
                another block; or CREPA is off or was removed.
        """
        self._check_not_removed()
        if self.projector is None:
            raise ValueError(f"{self.OWNER.title} is off: nothing is captured")
        return self._capture.states(self._block_index if block is None else block)

    @property
    def frames_encoded(self) -> int:
        """Frames that the teacher has encoded so far."""
        return 0 if self.projector is None else self._source.teacher.frames_encoded

    @property
    def frames_decoded(self) -> int:
        """Pixel frames that the VAE has decoded so far."""
        return 0 if self.projector is None else self._source.decoder.frames_decoded

    def _check_not_removed(self) -> None:
        if self._removed:
            raise ValueError(f"this {self.OWNER.regularizer} was removed from its {self.OWNER.model}")

    def _step(self, step: int, measure: Callable[[CapturedStates], Measured]) -> tuple[torch.Tensor, Logs]:
        """The weighted loss of the model's last forward and its logs, by the schedule's decision for ``step``.

        measure: of the captured states; called unless the weight is 0, and without gradients to probe.

        Raises:
            ValueError: as the ``loss`` of a subclass.
        """
        self._check_not_removed()
        if self.projector is None:
            return torch.zeros(()), {}
        prefix, threshold = self.OWNER.prefix, self._threshold
        aux = torch.zeros((), device=next(self.projector.parameters()).device)
        decision = self._schedule.decide(step, aux.device)
        # The next forward comes before anybody can know its step.
        self._capture.enabled = not self._schedule.ended
        logs: Logs = {f"{prefix}weight": decision.weight, f"{prefix}cutoff": decision.cutoff}
        if threshold is not None:
            ema = self._schedule.ema
            logs[f"{prefix}similarity_ema"] = torch.full_like(aux, float("nan") if ema is None else ema)
        if not decision.run:
            self._capture.release()
            if self._schedule.ended:
                self._source.unload()
            return aux, logs
        measured = self._measured(step, decision, self.projector, measure)
        if threshold is not None:
            self._schedule.observe(step, *measured.metric())
        if decision.probe:
            return aux, logs
        weighted = {name: decision.weight * term for name, term in measured.losses.items()}
        found = {name: term.detach() for name, term in weighted.items()} | measured.logs
        if measured.shard is not None:
            found = measured.shard.summed(found)
        return reduce(add, weighted.values()), logs | found

    def _measured(
        self,
        step: int,
        decision: Decision,
        projector: Projector,
        measure: Callable[[CapturedStates], Measured],
    ) -> Measured:
        student = self._capture.states(self._block_index)
        if torch.is_grad_enabled():
            check_attached(self._model, projector, self.OWNER)
            check_device(projector, student.hidden_states, self.OWNER)
            if not self._looked_at_adapters:
                check_reach(self._model, self._family, self._block_index, student.hidden_states, self.OWNER)
                self._looked_at_adapters = True
            if not decision.probe:
                self._watch.look(step)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not decision.probe):
            measured = measure(student)
        weights = self._capture.projector_sum
        assert weights is not None  # for the type checker: summed in the forward that captured
        self._monitor.watch(step, reduce(add, measured.losses.values()), measured.features, weights)
        return measured

    def check_optimizer(self, *optimizers: Any) -> None:
        """Asks at once what ``loss`` finds out in some steps: that the projector is in one of the optimizers.

        Call it in the order of attaching, after prepare or ``fully_shard`` where these are used.

        Raises:
            ValueError: naming the weights that are in none of them, and the order.
        """
        if self.projector is not None:
            check_in_optimizers(self.projector, optimizers, self.OWNER)

    def release(self) -> None:
        """Lets go of the captured hidden states, which otherwise stay until the next forward."""
        if self.projector is not None:
            self._capture.release()

    def flush(self) -> str | None:
        """Waits for the device and logs what it has to say of a NaN; call it before giving up on a run.

        Returns the side that a loss that was not finite came from, None where all were finite.
        """
        if self.projector is None:
            return None
        self._monitor.flush()
        return self._monitor.source

    def remove(self) -> None:
        """Takes hooks and projector off the model, which is then as it was found; ``loss`` raises after this."""
        if self.projector is not None and not self._removed:
            self._capture.remove()
            self._detach()
            self._source.unload()
        self._removed = True

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the settings and the projector into ``folder``, ``crepa_config.json`` and
        ``crepa_projector.safetensors`` for CREPA.

        Call it in one process, but where the projector is sharded (fully_shard) in all of them: rank 0 writes then.
        """
        save_regularizer(folder, self.config, self.projector, self.OWNER)

    def state_dict(self) -> dict[str, Any]:
        """Projector and schedule, for a checkpoint of training (``accelerator.register_for_checkpointing(...)``).

        The same on every rank. With a threshold or a sharded projector it is put together from all ranks, so every
        rank must call it, as ``accelerator.save_state`` does, and any of them may write it.
        """
        if self.projector is None:
            return {}
        return {"projector": whole_weights(self.projector), "schedule": self._schedule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what ``state_dict`` gave, so that the run goes on as if it had not stopped.

        Raises:
            ValueError: for the state of another projector, or none where it is enabled.
        """
        if self.projector is None:
            if state:
                title, prefix = self.OWNER.title, self.OWNER.prefix
                logger.warning("the checkpoint's %s state is not used: %senabled is false", title, prefix)
            return
        if not isinstance(state, Mapping) or not {"projector", "schedule"} <= state.keys():
            owner, found = self.OWNER, sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"not a {owner.regularizer}'s state: {found}; was {owner.title} off in that run?")
        load_weights(self.projector, state["projector"], "the checkpoint")
        self._schedule.load_state_dict(state["schedule"])
        self._capture.enabled = not self._schedule.ended
        self._monitor = NonFiniteMonitor(self.OWNER)
