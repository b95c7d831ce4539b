"""`UrepaRegularizer`: U-REPA on a stock diffusers UNet, in one object for a training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from ..config.urepa import UrepaConfig
from ..loss import crepa_loss, relational_loss
from ..models.families import unet_of
from ..projector import Projector
from ..reduction import counted_frames
from ..teachers import TeacherFeatures
from ..teachers.encoding import EncoderSource
from ..teachers.latents import VaeSource
from .aligning import Sides
from .attach import UREPA
from .base import Logs, Measured, Regularizer
from .capture import CapturedStates
from .teacher import ClipInputs, TeacherSource


class UrepaRegularizer(Regularizer):
    """Aligns a UNet's middle with a frozen teacher's features of the image (U-REPA, arXiv 2503.18414).

    With p = projector(h) of ``mid_block``'s output h (B, h x w, C), y the teacher's patches, the M tokens i, j of both
    on one grid, and unit rows::

        loss = lambda (-mean_{b,i} <p[b,i], y[b,i]>
                       + manifold_weight mean_{b,i,j} (<p[b,i], p[b,j]> - <y[b,i], y[b,j]>)^2)

    Attaches to a stock ``UNet2DConditionModel`` (Stable Diffusion 1.5, 2 and XL, Kolors): forward hooks, and the
    projector, registered as ``urepa_projector`` in fp32, so that ``unet.parameters()`` has its weights for the
    optimizer. The order is adapters, UrepaRegularizer, optimizer, LR scheduler, prepare/DDP/fully_shard. A disabled
    configuration attaches nothing. ``save_pretrained`` of the UNet leaves the projector out.

    VAE and encoder are loaded when the first batch needs them: never with features given, or while the weight is 0.

    Args:
        config: ``UrepaConfig`` or a mapping of its keys.
        unet: a ``UNet2DConditionModel``, not wrapped.
        vae: decodes latents: an ``AutoencoderKL``, a folder or hub id (loaded in bf16 on a GPU, fp32 on a CPU), or a
            callable without arguments that loads it. Frozen here.
        encoder: the teacher instead of ``urepa_model``, as ``CrepaRegularizer`` takes it.
        max_train_steps: optimizer steps of the run; needed where the weight decays over the rest of the run.
        feature_size: E, where only the caller's features know it; else it is read from the encoder's config.json.

    Attributes:
        config, unet: as given.
        projector: the ``CrepaProjector``, with iREPA the ``ConvolutionProjector``; None when disabled.

    Raises:
        ValueError: for a wrong configuration, a transformer (CREPA is for those), a wrapped UNet or one without a block
            in the middle, an encoder that cannot be read, or sources of the wrong type.
    """

    OWNER = UREPA
    CONFIG = UrepaConfig
    config: UrepaConfig

    def __init__(
        self,
        config: UrepaConfig | Mapping[str, Any],
        unet: nn.Module,
        vae: VaeSource | None = None,
        encoder: EncoderSource | None = None,
        max_train_steps: int | None = None,
        *,
        feature_size: int | None = None,
    ) -> None:
        self.unet = unet
        if not self._configure(config, unet):
            return
        family = unet_of(unet)
        source = TeacherSource(self.config, family, vae, encoder, self.OWNER)
        self._attach(family, {"mid_block": 0}, source, max_train_steps=max_train_steps, feature_size=feature_size)

    def loss(
        self,
        *,
        step: int,
        latents: torch.Tensor | None = None,
        pixels: torch.Tensor | None = None,
        features: torch.Tensor | TeacherFeatures | None = None,
        feature_grid: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, Logs]:
        """The weighted U-REPA loss of the UNet's last forward, to be added to the main loss, and its logs.

        The teacher's side is the first given of ``features``, ``pixels`` and ``latents``.

        Args:
            step: optimizer step from 0, the same for its micro-batches and on every rank. With a threshold ranks wait
                for each other: all of them call this in the same steps.
            latents: (B, C, H, W), clean, scaled as the UNet sees them; decoded by the VAE.
            pixels: (B, 3, H, W), uint8 or floating point in [0, 1].
            features: (B, N, E) on ``feature_grid`` (default: the UNet's own), or (B, height, width, E).
            feature_grid: (height, width) of ``features`` of shape (B, N, E).

        Returns:
            A scalar with gradient to the UNet and the projector (0 while the weight is 0), and the logs:
            ``urepa_weight`` (float), ``urepa_cutoff`` (bool), with a threshold ``urepa_similarity_ema`` (NaN before its
            first value), and unless the weight is 0, as detached scalars on the device, ``urepa_loss`` (the weighted
            value), and without the weight ``urepa_alignment_loss``, ``urepa_similarity`` (the mean cosine, its
            negative) and, where it is asked for, ``urepa_manifold_loss``.

        Raises:
            ValueError: when forward was not called before, something in the order of attaching is wrong, no optimizer
                has changed the projector over 50 steps (after 5 a warning), nothing is given to teach from, or shapes,
                types and ranges do not fit.
        """
        inputs = ClipInputs(latents, pixels, features, feature_grid)
        return self._step(step, lambda student: self._measure(student, inputs))

    def _measure(self, student: CapturedStates, inputs: ClipInputs) -> Measured:
        # No other block teaches.
        teacher, _ = self._source.teach(inputs, student, lambda: student)
        sides = Sides.of(self.config, cast(Projector, self.projector), student, teacher, self.OWNER)
        align = self.config.urepa_spatial_align
        aligned = sides.given_to(crepa_loss, distance=0, spatial_align=align)
        logs = {"urepa_alignment_loss": aligned.loss.detach(), "urepa_similarity": aligned.similarity}
        loss = aligned.loss
        if self.config.urepa_manifold_weight > 0:
            manifold = sides.given_to(relational_loss, pairs="frame", spatial_align=align)
            logs["urepa_manifold_loss"] = manifold.detach()
            loss = loss + self.config.urepa_manifold_weight * manifold

        def metric() -> tuple[torch.Tensor, torch.Tensor]:
            count = counted_frames(aligned.frame_similarity, None, None)
            return aligned.similarity * count, count

        return Measured({"urepa_loss": loss}, logs, sides.teacher_features, metric)
