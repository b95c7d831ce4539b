"""`CrepaRegularizer`: CREPA on a stock diffusers transformer, in one object for a training step."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from ..config.schema import CrepaConfig
from ..inputs import check_mask
from ..loss import CrepaOutput, crepa_loss, similarity_matrix
from ..models.families import family_of
from ..projector import Projector
from ..reduction import counted_frames
from ..teachers import TeacherFeatures
from ..teachers.clips import as_counts
from ..teachers.dinov2 import EncoderSource
from ..teachers.latents import VaeSource
from .aligning import aligned, as_aligned, make_projector, projected, projector_class
from .attach import (
    TrainingWatch,
    attach_projector,
    check_attachable,
    check_attached,
    check_in_optimizers,
    check_reach,
)
from .capture import Capture, CapturedStates
from .monitor import NonFiniteMonitor
from .saving import load_crepa, load_weights, save_crepa, whole_weights
from .schedule import CrepaSchedule, run_length
from .teacher import ClipInputs, TeacherSource

logger = logging.getLogger(__name__)

Logs = dict[str, torch.Tensor | float | bool]


class CrepaRegularizer:
    """Aligns one block's hidden states with a frozen teacher's features of the clip (arXiv 2506.09229).

    Attaches to the transformer: forward hooks that capture the block's output, and the projector, registered as
    ``crepa_projector`` in fp32, so that ``transformer.parameters()`` has its weights for the optimizer. The order is
    adapters, CrepaRegularizer, optimizer, LR scheduler, prepare/DDP/fully_shard. A disabled configuration attaches
    nothing. ``save_pretrained`` of the transformer leaves the projector out.

    VAE and encoder are loaded when the first batch needs them: never in backbone mode, with features given, or while
    the weight is 0.

    Args:
        config: ``CrepaConfig`` or a mapping of its keys.
        transformer: a supported diffusers transformer (``supported_families()``), not wrapped.
        vae: decodes latents: the family's VAE, a folder or hub id (loaded in bf16 on a GPU, fp32 on a CPU), or a
            callable without arguments that loads it. Frozen here.
        encoder: the teacher instead of ``crepa_encoder``: a transformers DINOv2, its folder or hub id, or a callable.
        max_train_steps: optimizer steps of the run; needed where the weight decays over the rest of the run.
        feature_size: E, where only the caller's features know it; else it is read from the encoder's config.json.
        vae_encodes: whether the training loop encodes with the same VAE; refuses ``crepa_drop_vae_encoder``.

    Attributes:
        config, transformer: as given.
        projector: the ``CrepaProjector``, with iREPA the ``ConvolutionProjector``; None when disabled.

    Raises:
        ValueError: for a wrong configuration, an unsupported or wrapped transformer, a block index out of range, an
            encoder that cannot be read, or sources of the wrong type.
    """

    def __init__(
        self,
        config: CrepaConfig | Mapping[str, Any],
        transformer: nn.Module,
        vae: VaeSource | None = None,
        encoder: EncoderSource | None = None,
        max_train_steps: int | None = None,
        *,
        feature_size: int | None = None,
        vae_encodes: bool = False,
    ) -> None:
        self.config = config if isinstance(config, CrepaConfig) else CrepaConfig.from_dict(config)
        self.transformer = transformer
        self.projector: Projector | None = None
        self._removed = False
        if not self.config.crepa_enabled:
            if self.config.idle is not None:
                logger.warning("CREPA is %s", self.config.idle)
            return
        check_attachable(transformer)
        if self.config.crepa_drop_vae_encoder and vae_encodes:
            raise ValueError(
                "crepa_drop_vae_encoder = true, but the training loop still encodes clips with the VAE: "
                "encode them before training, or set it to false"
            )
        self._family = family_of(transformer)
        if self.config.block_is_of not in (None, self._family.name):
            raise ValueError(
                f"crepa_block_index = {self.config.crepa_block_index} is the recommended block for "
                f"{self.config.block_is_of}, and the transformer is of {self._family.name}: "
                f'give family="{self._family.name}" with the preset, or the block'
            )
        keys = ["crepa_block_index"] + ["crepa_teacher_block_index"] * (self.config.crepa_feature_source == "backbone")
        blocks: dict[str, int] = {key: getattr(self.config, key) for key in keys}
        student, *_ = (self._family.block(transformer, index, key) for key, index in blocks.items())
        self._block_index, self._teacher_block_index = blocks[keys[0]], blocks[keys[-1]]
        self._schedule = CrepaSchedule(self.config, run_length(self.config.schedule, max_train_steps))
        self._source = TeacherSource(self.config, self._family, vae, encoder)
        hidden_size = self._family.hidden_size(transformer.config)
        self.projector = make_projector(self.config, hidden_size, self._source.feature_size(hidden_size, feature_size))
        self._capture = Capture(transformer, self._family, blocks, self.projector)
        self._monitor = NonFiniteMonitor()
        self._watch = TrainingWatch(self.projector)
        self._looked_at_adapters = False
        self._capture.attach()
        self._detach = attach_projector(transformer, self.projector, student)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        transformer: nn.Module,
        vae: VaeSource | None = None,
        encoder: EncoderSource | None = None,
        max_train_steps: int | None = None,
        *,
        vae_encodes: bool = False,
    ) -> CrepaRegularizer:
        """Attaches what ``save_pretrained`` wrote into ``folder``: the settings and the trained projector.

        Raises:
            ValueError: as the constructor, or when a file is missing, damaged or of another model.
        """
        config, weights = load_crepa(folder)
        _, size, *_ = projector_class(config).sizes_in(weights) or (None, None)  # it has none where CREPA is off
        crepa = cls(config, transformer, vae, encoder, max_train_steps, feature_size=size, vae_encodes=vae_encodes)
        if crepa.projector is not None:
            try:
                load_weights(crepa.projector, weights, str(folder))
            except ValueError:
                crepa.remove()
                raise
        return crepa

    @property
    def ended(self) -> bool:
        """Whether CREPA is off, or over for good: ``loss`` then needs nothing of the teacher's side."""
        return self.projector is None or self._schedule.ended

    def captured(self, block: int | None = None) -> CapturedStates:
        """What the last forward of training left of a block: hidden states (B, T, P, D), attached, and their layout.

        Args:
            block: its index, ``crepa_block_index`` or in backbone mode ``crepa_teacher_block_index``; the first if not
                given.

        Raises:
            ValueError: where nothing is held, as before a forward, after ``release`` or once CREPA has ended; for
                another block; or CREPA is off.
        """
        if self.projector is None:
            raise ValueError("CREPA is off: nothing is captured")
        return self._capture.states(self._block_index if block is None else block)

    @property
    def frames_encoded(self) -> int:
        """Frames that the teacher has encoded so far."""
        return 0 if self.projector is None else self._source.teacher.frames_encoded

    @property
    def frames_decoded(self) -> int:
        """Pixel frames that the VAE has decoded so far."""
        return 0 if self.projector is None else self._source.decoder.frames_decoded

    def loss(
        self,
        *,
        step: int,
        latents: torch.Tensor | None = None,
        pixels: torch.Tensor | None = None,
        features: torch.Tensor | TeacherFeatures | None = None,
        frame_mask: torch.Tensor | None = None,
        teacher_mask: torch.Tensor | None = None,
        num_frames: int | Sequence[int] | None = None,
        feature_grid: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, Logs]:
        """The weighted CREPA loss of the transformer's last forward, to be added to the main loss, and its logs.

        The teacher's side is the first given of ``features``, ``pixels`` and ``latents``; backbone mode needs none.

        Args:
            step: optimizer step from 0, the same for its micro-batches and on every rank. With a threshold ranks wait
                for each other: all of them call this in the same steps.
            latents: (B, C, T, H, W), never packed, clean, normalised as the transformer sees them; decoded by the VAE.
            pixels: (B, P, 3, H, W), uint8 or floating point in [0, 1]: the P frames that the latents were made of, or
                one for each token frame.
            features: (B, S, N, E) on ``feature_grid`` (default: the student's grid), or (B, S, height, width, E).
                One frame for each latent frame, or with ``num_frames`` one for each pixel frame.
            frame_mask: (B, T) bool, latent frames that are in the loss (conditioning frames and padding are not).
            teacher_mask: (B, T) bool, latent frames whose teacher frame exists (padding does not).
            num_frames: pixel frames that the latents stand for, Python's integers (the host would wait for a GPU's);
                one for each clip where clips are padded at the end: their padding is then masked on both sides.
            feature_grid: (height, width) of ``features`` of shape (B, S, N, E).

        Returns:
            A scalar with gradient to the transformer and the projector (0 while the weight is 0), and the logs:
            ``crepa_weight`` (float), ``crepa_cutoff`` (bool), with a threshold ``crepa_similarity_ema`` (NaN before its
            first value), and unless the weight is 0, as detached scalars on the device, ``crepa_loss`` (the weighted
            value), ``crepa_similarity``, ``crepa_similarity_self``, ``crepa_alignment_score``.

        Raises:
            ValueError: when forward was not called before, something in the order of attaching is wrong, no optimizer
                has changed the projector over 50 steps (after 5 a warning), nothing is given to teach from, or shapes,
                types and ranges do not fit.
        """
        if self._removed:
            raise ValueError("this CrepaRegularizer was removed from its transformer")
        if self.projector is None:
            return torch.zeros(()), {}
        aux = torch.zeros((), device=next(self.projector.parameters()).device)
        decision = self._schedule.decide(step, aux.device)
        # The next forward comes before anybody can know its step.
        self._capture.enabled = not self._schedule.ended
        logs: Logs = {"crepa_weight": decision.weight, "crepa_cutoff": decision.cutoff}
        if self.config.crepa_similarity_threshold is not None:
            ema = self._schedule.ema
            logs["crepa_similarity_ema"] = torch.full_like(aux, float("nan") if ema is None else ema)
        if not decision.run:
            self._capture.release()
            if self._schedule.ended:
                self._source.unload()
            return aux, logs
        student = self._student()
        if torch.is_grad_enabled() and not decision.probe:
            self._watch.look(step)
        inputs = ClipInputs(latents, pixels, features, feature_grid, as_counts(num_frames))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not decision.probe):
            output = self._output(step, student, inputs, frame_mask, teacher_mask)
        if decision.probe:
            return aux, logs
        aux = decision.weight * output.loss
        logs |= {
            "crepa_loss": aux.detach(),
            "crepa_similarity": output.similarity,
            "crepa_similarity_self": output.self_similarity,
            "crepa_alignment_score": output.alignment_score,
        }
        return aux, logs

    def _output(
        self,
        step: int,
        student: CapturedStates,
        inputs: ClipInputs,
        frame_mask: torch.Tensor | None,
        teacher_mask: torch.Tensor | None,
    ) -> CrepaOutput:
        taught = self._teacher(student, inputs, frame_mask, teacher_mask)
        states, projector = projected(cast(Projector, self.projector), student)
        output = aligned(crepa_loss, self.config, projector, states, *taught)
        teacher, *masks = taught
        self._monitor.watch(step, output.loss, teacher.features, cast(torch.Tensor, self._capture.projector_sum))
        if self.config.crepa_similarity_threshold is not None:
            count = counted_frames(output.frame_similarity, *masks)
            self._schedule.observe(step, getattr(output, self.config.crepa_similarity_metric) * count, count)
        return output

    def _teacher(
        self,
        student: CapturedStates,
        inputs: ClipInputs,
        frame_mask: torch.Tensor | None,
        teacher_mask: torch.Tensor | None,
    ) -> tuple[TeacherFeatures, torch.Tensor | None, torch.Tensor | None]:
        """The teacher's features, and both masks on the device without the frames that are not in their clip."""
        device, shape = student.hidden_states.device, (len(student.hidden_states), student.layout.frames)
        frame_mask = check_mask(frame_mask, "frame_mask", shape, device)
        teacher_mask = check_mask(teacher_mask, "teacher_mask", shape, device)
        teacher, lengths = self._source.teach(inputs, student, lambda: self._capture.states(self._teacher_block_index))
        if lengths is not None:
            frame_mask, teacher_mask = (lengths.within(mask, device) for mask in (frame_mask, teacher_mask))
        return as_aligned(self.config, teacher), frame_mask, teacher_mask

    @torch.no_grad()
    def similarity_matrix(
        self, *, frame_mask: torch.Tensor | None = None, teacher_mask: torch.Tensor | None = None, **given: Any
    ) -> torch.Tensor:
        """``similarity_matrix`` (B, T, T) of the last forward, from what ``loss`` takes but ``step``.

        Call it before ``release``. ValueError where nothing was captured, as in a step whose weight is 0.
        """
        given["num_frames"] = as_counts(given.get("num_frames"))
        student = self._capture.states(self._block_index)
        taught = self._teacher(student, ClipInputs(**given), frame_mask, teacher_mask)
        states, projector = projected(cast(Projector, self.projector), student)
        return aligned(similarity_matrix, self.config, projector, states, *taught)

    def check_optimizer(self, *optimizers: Any) -> None:
        """Asks at once what ``loss`` finds out in some steps: that the projector is in one of the optimizers.

        Call it in the order of attaching, after prepare or ``fully_shard`` where these are used.

        Raises:
            ValueError: naming the weights that are in none of them, and the order.
        """
        if self.projector is not None:
            check_in_optimizers(self.projector, optimizers)

    def _student(self) -> CapturedStates:
        student = self._capture.states(self._block_index)
        if torch.is_grad_enabled():
            check_attached(self.transformer, cast(Projector, self.projector))
            if not self._looked_at_adapters:
                check_reach(self.transformer, self._family, self._block_index, student.hidden_states)
                self._looked_at_adapters = True
        return student

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
        """Takes hooks and projector off the transformer, which is then as it was found; ``loss`` raises after this."""
        if self.projector is not None and not self._removed:
            self._capture.remove()
            self._detach()
            self._source.unload()
        self._removed = True

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``crepa_config.json`` and ``crepa_projector.safetensors`` into ``folder``.

        Call it in one process, but where the projector is sharded (fully_shard) in all of them: rank 0 writes then.
        """
        save_crepa(folder, self.config, self.projector)

    def state_dict(self) -> dict[str, Any]:
        """Projector and schedule, for a checkpoint of training (``accelerator.register_for_checkpointing(crepa)``).

        The same on every rank. With a threshold or a sharded projector it is put together from all ranks, so every
        rank must call it, as ``accelerator.save_state`` does, and any of them may write it.
        """
        if self.projector is None:
            return {}
        return {"projector": whole_weights(self.projector), "schedule": self._schedule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what ``state_dict`` gave, so that the run goes on as if it had not stopped.

        Raises:
            ValueError: for the state of another projector, or none where CREPA is enabled.
        """
        if self.projector is None:
            if state:
                logger.warning("the checkpoint's CREPA state is not used: crepa_enabled is false")
            return
        if not {"projector", "schedule"} <= state.keys():
            raise ValueError(f"not a CrepaRegularizer's state: {sorted(state)}; was CREPA off in that run?")
        load_weights(self.projector, state["projector"], "the checkpoint")
        self._schedule.load_state_dict(state["schedule"])
        self._capture.enabled = not self._schedule.ended
        self._monitor = NonFiniteMonitor()
