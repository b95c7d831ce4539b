"""From whatever ``encoder=`` is given as, a name or anything frozen, to the features of frames on their true grid."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ..config.rules import EFFICIENTNET_LITE0, ENCODER_ALIASES
from ..grid import Grid
from ..transfer import moved
from . import TeacherFeatures
from .dinov2 import DinoV2, dinov2_patches, is_dinov2
from .efficientnet import EfficientNetLite0
from .encoders import (
    RULE,
    FramesCall,
    FrozenEncoder,
    described,
    registered_encoder,
    takes,
    takes_frames,
)

if TYPE_CHECKING:
    from ..config import CrepaConfig, UrepaConfig

logger = logging.getLogger(__name__)

EncoderSource = FrozenEncoder | nn.Module | FramesCall | str | os.PathLike[str] | Callable[[], Any]
# Of which all that ``FrozenEncoder`` says of itself is known without loading it. ``weights``: the folder or hub id of
# its weights, where they are known by that; else ``content_key`` says them.
NamedEncoder = FrozenEncoder | DinoV2 | EfficientNetLite0


def named_encoder(name: str, key: str = "crepa_encoder") -> NamedEncoder:
    """The encoder of a name, an alias, or the folder or hub id of a DINOv2; nothing is loaded. ``key``: the setting."""
    name = ENCODER_ALIASES.get(name, name)
    if name == EFFICIENTNET_LITE0:
        return EfficientNetLite0()
    return registered_encoder(name) or DinoV2(name, key)


def encoder_of(source: EncoderSource, key: str = "crepa_encoder") -> NamedEncoder | _Later:
    """The encoder behind a name, a folder or hub id, a model, anything frozen, or a loader of one of the last two.

    A callable is a loader where it can be called without arguments, and else takes frames.

    Raises:
        ValueError: for what is none of these.
    """
    if isinstance(source, str | os.PathLike):
        return named_encoder(os.fspath(source), key)
    if (given := _given(source)) is not None:
        return given
    if takes(source):
        return _Later(source)  # type: ignore[arg-type]
    raise ValueError(
        f"encoder must be {RULE}, a FrozenEncoder of one, a DINOv2 model, a name, folder or hub id, or a callable "
        f"without arguments that loads an encoder, got {described(source)}"
    )


def _given(source: Any) -> FrozenEncoder | None:
    """What needs no loading; None for anything else."""
    if isinstance(source, FrozenEncoder):
        return source
    if is_dinov2(source):
        return dinov2_patches(source)
    if isinstance(source, nn.Module):
        return FrozenEncoder(source)
    return FrozenEncoder(source) if takes_frames(source) and not takes(source) else None


@dataclass(frozen=True)
class _Later:
    """An encoder that only a loader knows."""

    loader: Callable[[], Any]
    feature_size: None = None
    patch_size: None = None

    @property
    def name(self) -> str:
        return described(self.loader)

    def load(self, device: torch.device) -> FrozenEncoder:
        found = self.loader()
        encoder = _given(found)
        if encoder is None:
            raise ValueError(f"the encoder that {self.name} loads must be {RULE}, got {described(found)}")
        return encoder


class FrameEncoder:
    """Features of frames by a frozen encoder that is loaded at the first of them.

    Frames are resized bilinearly with antialiasing. The encoder runs without gradient and outside autocast, where it is
    and in its own type; what it answers is checked.

    Args:
        source: a ``FrozenEncoder``; a module or callable as it takes one; a transformers ``Dinov2Model`` or
            ``Dinov2WithRegistersModel``; a name (``dinov2_vitg14``, ``efficientnet_lite0`` ...) or alias, a folder or
            hub id of a DINOv2; or a callable without arguments that loads one of the first three.
        image_size: side in pixels of the square that a frame is resized to, a multiple of the encoder's patch size.
        resize: ``"square"``, or ``"grid"`` for one patch for each student token: the features then lie on the
            student's grid. An encoder without a patch size gets squares all the same.
        frames_batch_size: frames encoded at a time; <= 0: all at once.
        device: where the encoder goes and stays, also one that was given; None: with the frames' features, and one that
            was given where it is.
        offload: its weights are on the CPU between its uses.
        keys: of ``source`` and ``image_size`` in the settings, for messages.

    Attributes:
        frames_encoded: frames encoded so far.

    Raises:
        ValueError: for a source that is none of these or holds another kind of model, a folder or hub id whose
            config.json cannot be read, or an image size that is not a multiple of the patch size.
    """

    def __init__(
        self,
        source: EncoderSource,
        *,
        image_size: int = 518,
        resize: str = "square",
        frames_batch_size: int = -1,
        device: torch.device | str | None = None,
        offload: bool = False,
        keys: tuple[str, str] = ("crepa_encoder", "crepa_encoder_image_size"),
    ) -> None:
        if isinstance(image_size, bool) or not isinstance(image_size, int):
            raise ValueError(f"image_size must be an integer, in pixels, got {image_size!r}")
        if resize not in ("square", "grid"):
            raise ValueError(f'resize must be "square" or "grid", got {resize!r}')
        self.frames_encoded = 0
        self._told: set[str] = set()
        self._device = None if device is None else torch.device(device)
        self._offload = offload
        self._size_key = keys[1]
        self._resize, self._image_size, self._frames_batch_size = resize, image_size, frames_batch_size
        self._source = encoder_of(source, keys[0])
        self._loaded: FrozenEncoder | None = None
        self._asked: int | None = None
        if isinstance(self._source, FrozenEncoder):
            self.load(torch.device("cpu"))

    @classmethod
    def from_config(
        cls, config: CrepaConfig | UrepaConfig, source: EncoderSource | None = None, **placing: Any
    ) -> FrameEncoder:
        """The teacher of a configuration, or ``source`` with its sizes; the constructor's errors.

        placing: ``device`` and ``offload``, as the constructor takes them.
        """
        teacher = config.teacher
        return cls(
            teacher.encoder if source is None else source,
            image_size=teacher.image_size,
            resize=teacher.resize,
            frames_batch_size=teacher.frames_batch_size,
            keys=(teacher.encoder_key, teacher.size_key),
            **placing,
        )

    @property
    def encoder(self) -> NamedEncoder | _Later:
        """What is known of the encoder: with its weights where they are loaded."""
        return self._source if self._loaded is None else self._loaded

    def feature_size(self, device: torch.device | str = "cpu") -> int | None:
        """E, as the encoder says it; where a given one does not, it is asked once, with a blank frame on ``device``.

        None while only a loader knows it. The constructor's errors, and those of ``encode``.
        """
        size, patch = self.encoder.feature_size, self.encoder.patch_size
        self._check_image_size(patch)
        if size is None and self._asked is None and self._loaded is not None:
            side = self._image_size if patch is None else patch * max(self._image_size // patch, 1)
            place = self._place(self._loaded, torch.device(device))
            with self._at_work(self._loaded, place):
                blank = torch.zeros(1, 3, side, side)
                self._asked = self._features(self._loaded, blank, (side, side), place).shape[-1]
        return self._asked if size is None else size

    def grid(self, student_grid: Grid) -> Grid | None:
        """(height, width) of the features beside a student's; None where only the encoder's answer says it.

        The constructor's errors.
        """
        patch = self.encoder.patch_size
        self._check_image_size(patch)
        if patch is None or self._resize == "grid":
            return None if patch is None else student_grid
        return self._image_size // patch, self._image_size // patch

    @torch.no_grad()
    def encode(
        self, frames: torch.Tensor, student_grid: Grid, device: torch.device, *, resize: str | None = None
    ) -> TeacherFeatures:
        """Features (K, N, E) of frames (K, 3, H, W), uint8 or floating point in [0, 1], and their grid.

        Args:
            frames: any size; each is resized.
            student_grid: (height, width) of the student's tokens, which ``resize="grid"`` follows.
            device: where a model that is loaded now goes, and where the features are returned.
            resize: in the place of the constructor's.

        Raises:
            ValueError: for an answer of the encoder that is no such features, by its shape, type, or a gradient.
        """
        encoder = self._loaded if self._loaded is not None else self.load(device)
        patch, size = encoder.patch_size, (self._image_size, self._image_size)
        resize = resize or self._resize
        if patch is not None and resize == "grid":
            size = (patch * student_grid[0], patch * student_grid[1])
        place = self._place(encoder, device)
        if place.type != device.type and self._device is None:
            self._tell(
                logging.WARNING,
                f"the teacher runs on {place} while the model trains on {device}: slow if not meant",
            )
        if patch is None and resize == "grid":
            self._tell(
                logging.INFO, f"{encoder.name} says no patch size: frames are {size[0]} x {size[1]}, not by the grid"
            )
        at_a_time = self._frames_batch_size if self._frames_batch_size > 0 else len(frames)
        with self._at_work(encoder, place):
            answers = [self._features(encoder, batch, size, place) for batch in frames.split(at_a_time)]
        if len(shapes := {tuple(each.shape[1:]) for each in answers}) > 1:
            raise ValueError(
                f"the encoder {encoder.name} must answer one (h, w, E) for frames of one size, got {shapes}"
            )
        features = torch.cat(answers)
        self.frames_encoded += len(frames)
        return TeacherFeatures(moved(features.flatten(1, 2), device), (features.shape[1], features.shape[2]))

    def _place(self, encoder: FrozenEncoder, device: torch.device) -> torch.device:
        """Where it works for a model on ``device``."""
        if self._device is not None:
            return self._device
        return device if self._offload else encoder.place(device)

    @contextmanager
    def _at_work(self, encoder: FrozenEncoder, place: torch.device) -> Iterator[None]:
        """With its weights on ``place``, from where they go back to the CPU where they are offloaded."""
        module = encoder.encode
        # One that was given may lie on several devices.
        if not isinstance(module, nn.Module) or (self._device is None and not self._offload):
            yield
            return
        module.to(place)
        try:
            yield
        finally:
            if self._offload:
                module.to("cpu")

    @torch.no_grad()
    def _features(
        self, encoder: FrozenEncoder, frames: torch.Tensor, size: tuple[int, int], place: torch.device
    ) -> torch.Tensor:
        """The checked answer (k, h, w, E) to frames that are resized to ``size``, where the encoder is."""
        images = resized(moved(frames, place), size)
        with torch.autocast(place.type, enabled=False):
            features = encoder.encode(images)
        check_answer(encoder, features, images, self._asked)
        return features

    def load(self, device: torch.device | str) -> FrozenEncoder:
        """The encoder with its weights, loaded now and not at the first frame; the same one until ``unload``.

        Args:
            device: where one of a name, folder or hub id goes, unless the constructor was told; one that was given, or
                comes from a loader, stays where it is.

        Raises:
            ValueError: as the constructor, for what its source holds.
        """
        if self._loaded is None:
            self._check_image_size(self._source.patch_size)
            loaded = self._source.load(self._device or torch.device(device))
            self._check_image_size(loaded.patch_size)
            self._loaded = loaded
        return self._loaded

    def unload(self) -> None:
        """Lets go of a model that was loaded here; the next frame loads it again."""
        if not isinstance(self._source, FrozenEncoder):
            self._loaded = None

    def _check_image_size(self, patch: int | None) -> None:
        if self._resize == "square" and (self._image_size < 1 or (patch is not None and self._image_size % patch)):
            raise ValueError(
                f"{self._size_key} = {self._image_size} must be a multiple of the encoder's patch size, "
                f"{patch or 1} pixels"
            )

    def _tell(self, level: int, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            logger.log(level, line)


class DinoV2Teacher:
    """DINOv2 as a function from frames to patch features, by itself; loaded at the first frames, on their device.

    Args:
        model: a name (``dinov2_vitg14`` ...), a local folder, a hub id, or a transformers DINOv2.
        image_size: side in pixels of the square that a frame is resized to, a multiple of the patch size (14).
        frames_batch_size: frames encoded at a time; <= 0: all at once.

    Raises:
        ValueError: as ``FrameEncoder``.
    """

    def __init__(
        self, model: nn.Module | str = "dinov2_vitg14", *, image_size: int = 518, frames_batch_size: int = -1
    ) -> None:
        options: dict[str, Any] = {"image_size": image_size, "frames_batch_size": frames_batch_size}
        self._encoder = FrameEncoder(model, **options)
        if not isinstance(self._encoder.encoder, DinoV2) and not is_dinov2(model):
            raise ValueError(f"DinoV2Teacher needs a DINOv2, got {model!r}; any other encoder is a FrameEncoder")

    def __call__(self, frames: torch.Tensor, grid: Grid | None = None) -> TeacherFeatures:
        """Features (..., N, E) of frames (..., 3, H, W), uint8 or floating point in [0, 1], and their grid.

        Args:
            grid: (height, width) in patches that frames are resized to, such as the student's tokens; else the square.
        """
        if frames.dim() < 4 or frames.shape[-3] != 3:
            raise ValueError(
                f"frames must be (..., 3, H, W) with at least one axis in front, got {tuple(frames.shape)}"
            )
        resize = "square" if grid is None else "grid"
        features, found = self._encoder.encode(frames.flatten(0, -4), grid or (1, 1), frames.device, resize=resize)
        return TeacherFeatures(features.unflatten(0, frames.shape[:-3]), found)


def resized(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Frames (K, 3, H, W), uint8 or in [0, 1], resized to ``size`` (height, width), in fp32 and in [0, 1]."""
    images = frames.float() / 255 if frames.dtype == torch.uint8 else frames.float()
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)


def check_answer(encoder: FrozenEncoder, features: Any, images: torch.Tensor, asked: int | None) -> None:
    """ValueError, naming encoder and rule, unless ``features`` are those of ``images`` (n, 3, H, W) for a frozen one.

    asked: E of an earlier answer, of an encoder that does not say it.
    """
    height, width = images.shape[-2:]
    given = f"the encoder {encoder.name}, given frames {tuple(images.shape)},"
    if not isinstance(features, torch.Tensor):
        raise ValueError(f"{given} must answer a tensor (n, h, w, E), got {type(features).__name__}: wrap it in {RULE}")
    shape = tuple(features.shape)
    if (features.is_meta and not images.is_meta) or features.layout != torch.strided:
        what = "on the meta device" if features.is_meta else f"of layout {features.layout}"
        raise ValueError(f"{given} must answer a dense tensor with values, got one {what}")
    if features.dim() != 4 or shape[0] != len(images) or 0 in shape:
        raise ValueError(f"{given} must answer features (n, h, w, E) with n = {len(images)}, got {shape}")
    if not features.is_floating_point():
        raise ValueError(f"{given} must answer floating-point features, got {features.dtype}")
    if features.requires_grad:
        raise ValueError(f"{given} answers features with a gradient: it must be frozen, so run it without one")
    patch, size = encoder.patch_size, encoder.feature_size if asked is None else asked
    if patch is None and size is None and height == width and shape[1] != shape[2] == shape[3]:
        raise ValueError(
            f"{given} must answer features (n, h, w, E), got {shape}, which is (n, E, h, w) for a square: "
            "permute(0, 2, 3, 1)"
        )
    if patch is not None and shape[1:3] != (height // patch, width // patch):
        raise ValueError(
            f"{given} must answer a grid of {height // patch} x {width // patch} by its patch_size = {patch}, "
            f"got {shape[1]} x {shape[2]}: features are (n, h, w, E)"
        )
    if size is not None and shape[3] != size:
        raise ValueError(f"{given} must answer E = {size} by its feature_size, got {shape[3]}")
