"""Where a step's teacher features come from: given, encoded from pixels or decoded latents, or the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..config.schema import CrepaConfig
from ..config.urepa import UrepaConfig
from ..grid import Grid
from ..models.families import Family
from ..teachers import TeacherFeatures
from ..teachers.clips import ClipLengths, check_pixel_frames, check_pixels, encode_clips, given_features
from ..teachers.encoding import EncoderSource, FrameEncoder
from ..teachers.latents import LatentDecoder, VaeSource
from ..transfer import moved
from .attach import CREPA, Owner
from .capture import CapturedStates


@dataclass(frozen=True)
class ClipInputs:
    """What the caller of ``CrepaRegularizer.loss`` gives of a batch of clips; see there."""

    latents: torch.Tensor | None = None
    pixels: torch.Tensor | None = None
    features: torch.Tensor | TeacherFeatures | None = None
    feature_grid: Sequence[int] | None = None
    num_frames: int | Sequence[int] | None = None

    def of_images(self, grid: Grid) -> ClipInputs:
        """The same of images, without the axis of frames, as clips of one frame; ``grid``: the student's.

        Raises:
            ValueError: for another number of axes, or of channels of pixels, or for clips.
        """
        latents, pixels, features = self.latents, self.pixels, self.features
        feature_grid = self.feature_grid
        if isinstance(latents, torch.Tensor):
            latents = _as_clip(latents, "latents", "(B, C, H, W)", axis=2)
        if isinstance(pixels, torch.Tensor):
            pixels = _as_clip(pixels, "pixels", "(B, 3, H, W)", axis=1, channels=3)
        if isinstance(features, TeacherFeatures):
            features, feature_grid = features
        if isinstance(features, torch.Tensor):
            if not 3 <= features.dim() <= 5:
                shape = tuple(features.shape)
                raise ValueError(f"features of images must be (B, N, E) or (B, height, width, E), got {shape}")
            # Also with an axis of one frame, whatever says so.
            one = features.dim() == 4 and features.shape[1] == 1
            framed = features.dim() == 5 or (one and (feature_grid is not None or grid[0] != 1))
            features = features if framed else features[:, None]
        return ClipInputs(latents, pixels, features, feature_grid, self.num_frames)


def _as_clip(images: torch.Tensor, name: str, shape: str, axis: int, channels: int | None = None) -> torch.Tensor:
    """Images with an axis of one frame."""
    clip = images.unsqueeze(axis) if images.dim() == 4 else images
    if clip.dim() == 5 and clip.shape[axis] == 1 and channels in (None, clip.shape[3 - axis]):
        return clip
    raise ValueError(f"{name} of images must be {shape}, got {tuple(images.shape)}")


class TeacherSource:
    """Gives one teacher frame for each student frame; loads VAE and encoder when a batch first needs them.

    Args:
        config: an enabled configuration.
        family: the transformer's.
        vae, encoder: as ``CrepaRegularizer`` takes them.
        owner: who asks, for messages.
        placing: ``device`` and ``offload`` of ``FrameEncoder``.

    Raises:
        ValueError: for sources of the wrong type, or an encoder of the wrong kind.
    """

    def __init__(
        self,
        config: CrepaConfig | UrepaConfig,
        family: Family,
        vae: VaeSource | None,
        encoder: EncoderSource | None,
        owner: Owner = CREPA,
        **placing: Any,
    ) -> None:
        settings = config.teacher
        self.backbone = settings.backbone
        self.teacher = FrameEncoder.from_config(config, encoder, **placing)
        # Backbone mode decodes nothing, so the VAE is not touched.
        self.decoder = LatentDecoder(
            None if self.backbone else vae, family, drop_encoder=settings.drop_vae_encoder, owner=owner.regularizer
        )
        self._family = family
        self._rule = settings.frame_map
        self._looked_at_pixels = False

    def unload(self) -> None:
        """Frees the VAE and the encoder that were loaded here, when CREPA has ended."""
        self.teacher.unload()
        self.decoder.unload()

    def feature_size(self, hidden_size: int, given: int | None, device: torch.device) -> int:
        """E: the hidden size in backbone mode, ``given``, or as the encoder says it or answers a frame on ``device``.

        Raises:
            ValueError: when it is not known yet, ``given`` contradicts backbone mode, or the encoder's answer
                is wrong.
        """
        if self.backbone:
            if given not in (None, hidden_size):
                raise ValueError(f"feature_size = {given}: in backbone mode it is the transformer's, {hidden_size}")
            return hidden_size
        size = given if given is not None else self.teacher.feature_size(device)
        if size is None:
            raise ValueError(
                "encoder is a callable that loads one, so its feature size is not known yet: pass feature_size="
            )
        return size

    def teach(
        self,
        inputs: ClipInputs,
        student: CapturedStates,
        deeper: Callable[[], CapturedStates],
        wanted: range | None = None,
    ) -> tuple[TeacherFeatures, ClipLengths | None]:
        """Teacher features (B, T, N, E), detached, on the student's device, and each clip's length where known.

        Args:
            inputs: the first given of features, pixels and latents is used.
            student: the captured states that they are for.
            deeper: the teaching block's states, called in backbone mode only.
            wanted: student frames whose teacher's are asked for, (B, len(wanted), N, E); None: all.

        Raises:
            ValueError: when nothing is given to teach from, or shapes, types and ranges do not fit.
        """
        layout = student.layout
        frames = slice(None) if wanted is None else slice(wanted.start, wanted.stop)
        if self._family.images:
            inputs = inputs.of_images(layout.grid)
        batch, device = len(student.hidden_states), student.hidden_states.device
        if self.backbone:
            states, held = deeper()
            whole = CapturedStates(states.detach(), held).gathered().hidden_states
            return TeacherFeatures(whole[:, frames], layout.grid), None
        if inputs.features is not None:
            found, lengths = given_features(
                inputs.features, inputs.feature_grid, inputs.num_frames, self._rule, batch, layout
            )
            if lengths is not None:
                self._check_frames("features are of", lengths)
            return TeacherFeatures(moved(found.features[:, frames].detach(), device), found.grid), lengths
        pixels = self._pixels(inputs, student)
        clips = ClipLengths.of(inputs.num_frames, batch, pixels.shape[1], layout)
        # What decoding returned is right by itself.
        if inputs.pixels is not None:
            self._check_frames("pixels have", clips)
        return encode_clips(self.teacher, pixels, clips, self._rule, device, wanted), clips

    def _check_frames(self, what: str, lengths: ClipLengths) -> None:
        ratio = lengths.layout.temporal_ratio
        factors = self.decoder.temporal_factors if ratio is None else (ratio,)
        if not factors:  # of a class that is in no table
            return

        def allowed(latents: int) -> list[range]:
            return [self._family.pixel_frames(latents, factor) for factor in factors]

        check_pixel_frames(what, lengths, allowed)

    def _pixels(self, inputs: ClipInputs, student: CapturedStates) -> torch.Tensor:
        batch = len(student.hidden_states)
        if inputs.pixels is not None:
            check_pixels(inputs.pixels, batch, look=not self._looked_at_pixels)
            self._looked_at_pixels = True
            return inputs.pixels
        if inputs.latents is None:
            raise ValueError("loss() needs one of latents=, pixels= and features= to teach from")
        if isinstance(inputs.latents, torch.Tensor) and inputs.latents.dim() and len(inputs.latents) != batch:
            raise ValueError(
                f"latents have {len(inputs.latents)} clips, the {self._family.model}'s last forward had {batch}"
            )
        return self.decoder.decode(inputs.latents, student.layout, student.hidden_states.device)
