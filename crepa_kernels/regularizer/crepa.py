"""`CrepaRegularizer`: CREPA on a stock diffusers transformer, in one object for a training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from ..config.schema import CrepaConfig
from ..grid import num_tokens
from ..inputs import check_mask
from ..loss import crepa_loss, relational_loss, similarity_matrix
from ..models.families import Family, family_for, family_of
from ..models.layouts import Arguments, TokenLayout
from ..projector import Projector
from ..reduction import counted_frames
from ..teachers import TeacherFeatures
from ..teachers.clips import as_counts
from ..teachers.encoding import EncoderSource
from ..teachers.latents import VaeSource
from ..transfer import index_into, touched_frames
from .aligning import Sides, compares_own_tokens
from .attach import CREPA
from .base import Logs, Measured, Regularizer
from .capture import CapturedStates
from .teacher import ClipInputs, TeacherSource


def _at_block(config: CrepaConfig | Mapping[str, Any], family: Family) -> CrepaConfig | Mapping[str, Any]:
    """Settings whose block is the one that was given, where that is a block and no list of them."""
    if family.knows_order:
        return config
    if isinstance(config, CrepaConfig):
        return config.replace(crepa_block_index=0)
    return {**config, "crepa_block_index": 0} if isinstance(config, Mapping) else config


class CrepaRegularizer(Regularizer):
    """Aligns one block's hidden states with a frozen teacher's features of the clip (arXiv 2506.09229).

    Attaches to the transformer: forward hooks that capture the block's output, and the projector, registered as
    ``crepa_projector`` in fp32, so that ``transformer.parameters()`` has its weights for the optimizer. The order is
    adapters, CrepaRegularizer, optimizer, LR scheduler, prepare/DDP/fully_shard. A disabled configuration attaches
    nothing. ``save_pretrained`` of the transformer leaves the projector out.

    VAE and encoder are loaded when the first batch needs them: never in backbone mode, with features given, or while
    the weight is 0.

    On a transformer of images this is REPA: a clip of one frame, without neighbours. ``loss`` then takes pixels
    (B, 3, H, W), latents (B, C, H, W) and features (B, N, E) or (B, height, width, E), and needs no masks.

    Args:
        config: ``CrepaConfig`` or a mapping of its keys.
        transformer: a supported diffusers transformer (``supported_families()``), not wrapped.
        vae: decodes latents: the family's VAE, a folder or hub id (loaded in bf16 on a GPU, fp32 on a CPU), or a
            callable without arguments that loads it. Frozen here.
        encoder: the teacher instead of ``crepa_encoder``: a ``FrozenEncoder``, or the module or callable that it takes
            (frames (n, 3, H, W) in [0, 1] to features (n, h, w, E)), frozen here; a transformers DINOv2; a name, folder
            or hub id; or a callable without arguments that loads one. ``crepa_encoder`` then is its name alone.
        max_train_steps: optimizer steps of the run; needed where the weight decays over the rest of the run.
        feature_size: E, where only the caller's features know it; else the encoder says it, or is asked once.
        vae_encodes: whether the training loop encodes with the same VAE; refuses ``crepa_drop_vae_encoder``.
        teacher_device: where the encoder runs, such as another GPU or the CPU; None: with the transformer, and a module
            that was given where it is.
        teacher_offload: the encoder's weights are on the CPU between its uses.
        block, hidden_size, layout: of a transformer of no supported family, any ``nn.Module``: the block to align, or
            its name in the module, or that of an ``nn.ModuleList`` in which ``crepa_block_index`` counts; the width D
            of its tokens; and a callable from the arguments of the module's forward, by name and tensors as their
            shapes, to (frames, height, width) in tokens, in raster order, or to a ``TokenLayout``. ``vae`` then is
            any callable from latents (B, C, T, H, W) to pixels (B, P, 3, H, W) in [0, 1], or a VAE that a family has,
            or a folder or hub id of one.
        context_group: the process group over whose ranks the transformer's sequence is cut, in runs in their order as
            ``torch.tensor_split`` cuts, where others than diffusers' ``enable_parallelism`` cut it, which is found.

    Attributes:
        config: as given, but on a transformer of images without neighbours, and of a preset that names no family at
            the block that is recommended for the transformer's.
        transformer: as given.
        projector: the ``CrepaProjector``, with iREPA the ``ConvolutionProjector``; None when disabled.

    Raises:
        ValueError: for a wrong configuration, an unsupported or wrapped transformer, a block index out of range, an
            encoder that cannot be read, or sources of the wrong type.
    """

    OWNER = CREPA
    CONFIG = CrepaConfig
    config: CrepaConfig

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
        teacher_device: torch.device | str | None = None,
        teacher_offload: bool = False,
        block: nn.Module | str | None = None,
        hidden_size: int | None = None,
        layout: Callable[[Arguments], TokenLayout | Sequence[int]] | None = None,
        context_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.transformer = transformer
        own = None
        if block is not None and hidden_size is not None and layout is not None:
            own = family_for(transformer, block, hidden_size, layout)
        elif (block, hidden_size, layout) != (None, None, None):
            raise ValueError("block=, hidden_size= and layout= go together: they say what no table knows of the model")
        if not self._configure(config if own is None else _at_block(config, own), transformer):
            return
        if self.config.crepa_drop_vae_encoder and vae_encodes:
            raise ValueError(
                "crepa_drop_vae_encoder = true, but the training loop still encodes clips with the VAE: "
                "encode them before training, or set it to false"
            )
        family = own or family_of(transformer)
        self.config = self.config.of_family(family)
        keys = ["crepa_block_index"] + ["crepa_teacher_block_index"] * self.config.teacher.backbone
        blocks: dict[str, int] = {key: getattr(self.config, key) for key in keys}
        for key, index in blocks.items():
            family.block(transformer, index, key)
        self._teacher_block_index = blocks[keys[-1]]
        source = TeacherSource(self.config, family, vae, encoder, device=teacher_device, offload=teacher_offload)
        self._attach(
            family,
            blocks,
            source,
            max_train_steps=max_train_steps,
            feature_size=feature_size,
            context_group=context_group,
        )

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
            value), ``crepa_similarity``, ``crepa_similarity_self``, ``crepa_alignment_score``, and with
            ``crepa_relational_weight`` ``crepa_relational_loss``, likewise times both of its weights: the scalar is the
            sum of the two losses. Where the sequence is cut over ranks, the scalar is this rank's share: shares and
            gradients add up over the group to the whole clips', as gradients of the transformer's own loss do. The
            logs are the whole clips' on each rank.

        Raises:
            ValueError: when forward was not called before, something in the order of attaching is wrong, no optimizer
                has changed the projector over 50 steps (after 5 a warning), nothing is given to teach from, or shapes,
                types and ranges do not fit.
        """
        inputs = ClipInputs(latents, pixels, features, feature_grid, as_counts(num_frames))
        return self._step(step, lambda student: self._measure(student, inputs, frame_mask, teacher_mask))

    def _measure(
        self,
        student: CapturedStates,
        inputs: ClipInputs,
        frame_mask: torch.Tensor | None,
        teacher_mask: torch.Tensor | None,
    ) -> Measured:
        shard, parts = student.layout.shard, 1
        if shard is not None and not compares_own_tokens(self.config):
            # Every rank compares the whole clips, and has an equal share of what comes of it.
            student, parts = student.gathered(), shard.ranks
        of_tokens, of_relation, wanted = self._shard_options(student.layout)
        sides, masks = self._sides(student, inputs, frame_mask, teacher_mask, wanted)
        output = sides.given_to(crepa_loss, **masks, **of_tokens, **self.config.loss_options())
        losses, weight = {"crepa_loss": output.loss}, self.config.crepa_relational_weight
        if weight > 0:
            # A Linear projects again: three products of a training step's thousands.
            options = {**masks, **of_tokens, **of_relation, **self.config.relational_options()}
            losses["crepa_relational_loss"] = weight * sides.given_to(relational_loss, **options)

        def metric() -> tuple[torch.Tensor, torch.Tensor]:
            count = counted_frames(output.frame_similarity, *masks.values())
            value = getattr(output, self.config.crepa_similarity_metric) * count / parts
            return value, count if shard is None or shard.is_first else torch.zeros_like(count)

        logs = {
            "crepa_similarity": output.similarity,
            "crepa_similarity_self": output.self_similarity,
            "crepa_alignment_score": output.alignment_score,
        }
        if parts > 1:
            losses, logs = ({name: value / parts for name, value in each.items()} for each in (losses, logs))
        return Measured(losses, logs, sides.teacher_features, metric, shard)

    def _shard_options(self, layout: TokenLayout) -> tuple[dict[str, Any], dict[str, Any], range | None]:
        """What both losses take of a rank's tokens, what the relational one takes, and the frames that teach them."""
        if layout.shard is None:
            return {}, {}, None
        token_range = layout.shard.token_range
        touched = touched_frames(token_range, num_tokens(layout.grid))
        wanted = self.config.neighbours.around(touched, layout.frames)
        of_tokens = {"token_range": token_range, "frame_index": index_into(wanted, layout.frames)}
        return of_tokens, {"context_group": layout.shard.group}, wanted

    def _sides(
        self,
        student: CapturedStates,
        inputs: ClipInputs,
        frame_mask: torch.Tensor | None,
        teacher_mask: torch.Tensor | None,
        wanted: range | None = None,
    ) -> tuple[Sides, dict[str, torch.Tensor | None]]:
        """What losses take, and both masks on the device without the frames that are not in their clip.

        wanted: frames whose teacher's are asked for; None: all.
        """
        device, shape = student.hidden_states.device, (len(student.hidden_states), student.layout.frames)
        given = {"frame_mask": frame_mask, "teacher_mask": teacher_mask}
        masks = {name: check_mask(mask, name, shape, device) for name, mask in given.items()}
        teacher, lengths = self._source.teach(
            inputs, student, lambda: self._capture.states(self._teacher_block_index), wanted
        )
        if lengths is not None:
            masks = {name: lengths.within(mask, device) for name, mask in masks.items()}
        return Sides.of(self.config, cast(Projector, self.projector), student, teacher), masks

    @torch.no_grad()
    def sides(
        self, *, frame_mask: torch.Tensor | None = None, teacher_mask: torch.Tensor | None = None, **given: Any
    ) -> tuple[Sides, dict[str, torch.Tensor | None]]:
        """What the losses compare of the last forward, and ``frame_mask`` and ``teacher_mask`` as they take them.

        It takes what ``loss`` takes but ``step``. Call it before ``release``. ValueError where nothing was captured, as
        in a step whose weight is 0, or CREPA is off. Where the sequence is cut over ranks, all of the group call it,
        and each has the whole clips.
        """
        given["num_frames"] = as_counts(given.get("num_frames"))
        student = self.captured().gathered()
        return self._sides(student, ClipInputs(**given), frame_mask, teacher_mask)

    @torch.no_grad()
    def similarity_matrix(self, **given: Any) -> torch.Tensor:
        """``similarity_matrix`` (B, T, T) of the last forward, from what ``sides`` takes, and with its errors."""
        sides, masks = self.sides(**given)
        return sides.given_to(similarity_matrix, **masks, **self.config.loss_options())
