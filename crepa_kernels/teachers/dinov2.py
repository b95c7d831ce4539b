"""DINOv2 as the frozen teacher: patch features of video frames on their true grid."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ..config.rules import DINOV2_HUB_IDS, DINOV2_PATCH_SIZE, ENCODER_ALIASES
from ..grid import Grid
from ..optional import require
from ..transfer import moved
from . import TeacherFeatures

if TYPE_CHECKING:
    from ..config import CrepaConfig

logger = logging.getLogger(__name__)

EncoderSource = nn.Module | str | os.PathLike[str] | Callable[[], nn.Module]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MODEL_TYPES = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
# Of the published checkpoints, so that their names need neither a network nor a cache.
FEATURE_SIZES = {"s": 384, "b": 768, "l": 1024, "g": 1536}


class DinoV2Teacher:
    """Patch features of a DINOv2 that is loaded at the first frame.

    Frames are resized bilinearly with antialiasing and normalised with the ImageNet statistics; the features are the
    patch tokens after the final norm (class and register tokens dropped). The model is frozen, in eval mode, and runs
    without gradient and outside autocast, in its own type: bf16 on a GPU and fp32 on a CPU when it is loaded here.

    Args:
        source: a name (``dinov2_vitg14`` ...) or alias, a local folder or hub id, a transformers ``Dinov2Model`` or
            ``Dinov2WithRegistersModel``, or a callable without arguments that loads one.
        image_size: side in pixels of the square that a frame is resized to, a multiple of the patch size.
        resize: ``"square"``, or ``"grid"`` for one patch for each student token: the features then lie on the
            student's grid.
        frames_batch_size: frames encoded at a time; <= 0: all at once.

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
    ) -> None:
        if isinstance(image_size, bool) or not isinstance(image_size, int):
            raise ValueError(f"image_size must be an integer, in pixels, got {image_size!r}")
        if resize not in ("square", "grid"):
            raise ValueError(f'resize must be "square" or "grid", got {resize!r}')
        if not (isinstance(source, str | os.PathLike) or callable(source)):
            raise ValueError(
                "encoder must be a DINOv2 model, its name, a folder or hub id, or a callable that loads it, "
                f"got {type(source).__name__}"
            )
        self.frames_encoded = 0
        self._told_place = False
        self._resize = resize
        self._image_size = image_size
        self._frames_batch_size = frames_batch_size
        self._source: Any = source
        self._config: Any = None
        self._model: nn.Module | None = None
        if isinstance(source, nn.Module):
            self._model = self._adopted(source)
        elif isinstance(source, str | os.PathLike):
            name = os.fspath(source)
            self._source = ENCODER_ALIASES.get(name, name)

    @classmethod
    def from_config(cls, config: CrepaConfig, source: EncoderSource | None = None) -> DinoV2Teacher:
        """The teacher of a configuration, or ``source`` with its sizes; the constructor's errors."""
        teacher = config.teacher
        return cls(
            teacher.encoder if source is None else source,
            image_size=teacher.image_size,
            resize=teacher.resize,
            frames_batch_size=teacher.frames_batch_size,
        )

    @property
    def feature_size(self) -> int | None:
        """E, from config.json or the model, without loading weights; None while only a callable knows it."""
        if isinstance(self._source, str):
            if self._source in DINOV2_HUB_IDS:
                return FEATURE_SIZES[self._source.removeprefix("dinov2_vit")[0]]
            self._read_config()
        return None if self._config is None else int(self._config.hidden_size)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return DINOV2_PATCH_SIZE if self._config is None else int(self._config.patch_size)

    @torch.no_grad()
    def encode(self, frames: torch.Tensor, student_grid: Grid, device: torch.device) -> TeacherFeatures:
        """Patch features (K, N, E) of frames (K, 3, H, W), uint8 or floating point in [0, 1], and their grid.

        Args:
            frames: any size; each is resized.
            student_grid: (height, width) of the student's tokens, which ``resize="grid"`` follows.
            device: where a model that is loaded now goes, and where the features are returned.
        """
        model = self._model if self._model is not None else self.load(device)
        patch = self.patch_size
        height, width = (patch * side for side in student_grid) if self._resize == "grid" else [self._image_size] * 2
        weight = next(model.parameters())
        if weight.device.type != device.type and not self._told_place:
            self._told_place = True
            logger.warning(
                "the teacher runs on %s while the transformer trains on %s: slow if not meant", weight.device, device
            )
        dropped = 1 + int(getattr(self._config, "num_register_tokens", 0))
        at_a_time = self._frames_batch_size if self._frames_batch_size > 0 else len(frames)
        features = []
        with torch.autocast(weight.device.type, enabled=False):
            for batch in frames.split(at_a_time):
                images = normalized_images(moved(batch, weight.device), (height, width)).to(weight.dtype)
                features.append(model(pixel_values=images).last_hidden_state[:, dropped:])
        self.frames_encoded += len(frames)
        return TeacherFeatures(moved(torch.cat(features), device), (height // patch, width // patch))

    def unload(self) -> None:
        """Lets go of a model that was loaded here; the next frame loads it again."""
        if not isinstance(self._source, nn.Module):
            self._model = None

    def _read_config(self) -> None:
        if self._config is not None:
            return
        transformers = require("transformers", "the DINOv2 teacher")
        name = DINOV2_HUB_IDS.get(self._source, self._source)
        try:
            config = transformers.AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"crepa_encoder = {self._source}: its config.json cannot be read ({error}). "
                f"Give one of {', '.join(DINOV2_HUB_IDS)}, a local folder or a hub id; "
                "where loss() is always given features=, pass feature_size= instead"
            ) from error
        self._set_config(config)

    def _set_config(self, config: Any) -> None:
        if getattr(config, "model_type", None) not in MODEL_TYPES:
            raise ValueError(
                f"the encoder's model type is {getattr(config, 'model_type', None)!r}, "
                f"supported are {', '.join(f'{kind!r} ({name})' for kind, name in MODEL_TYPES.items())}"
            )
        if self._resize == "square" and (self._image_size < 1 or self._image_size % config.patch_size):
            raise ValueError(
                f"crepa_encoder_image_size = {self._image_size} must be a multiple of the encoder's patch size, "
                f"{config.patch_size} pixels"
            )
        self._config = config

    def load(self, device: torch.device | str) -> nn.Module:
        """The model, loaded now and not at the first frame; the same one until ``unload``.

        Args:
            device: where one of a name, folder or hub id goes, in bf16 on a GPU and fp32 on a CPU; a model that was
                given, or comes from a callable, stays where it is.

        Raises:
            ValueError: as the constructor, for what its source holds.
        """
        if self._model is not None:
            return self._model
        device = torch.device(device)
        if not isinstance(self._source, str):
            self._model = self._adopted(self._source())
            return self._model
        self._read_config()
        name = DINOV2_HUB_IDS.get(self._source, self._source)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        _tell_loading(name, dtype)
        model_class = getattr(require("transformers", "the DINOv2 teacher"), MODEL_TYPES[self._config.model_type])
        self._model = self._adopted(model_class.from_pretrained(name, dtype=dtype).to(device))
        return self._model

    def _adopted(self, model: Any) -> nn.Module:
        if not isinstance(model, nn.Module):
            raise ValueError(f"the encoder must be a DINOv2 model, got {type(model).__name__}")
        self._set_config(getattr(model, "config", None))
        model.requires_grad_(False)
        return model.eval()


@cache
def _tell_loading(name: str, dtype: torch.dtype) -> None:
    # Once a process: a run may load it for its clips, for training and for what it shows.
    logger.info("loading the teacher %s as %s", name, dtype)


def normalized_images(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Frames (K, 3, H, W), uint8 or in [0, 1], resized to ``size`` (height, width) and normalised, in fp32."""
    images = frames.float() / 255 if frames.dtype == torch.uint8 else frames.float()
    images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
    # From pageable memory, so the host does not wait for the device.
    statistics = moved(torch.tensor([IMAGENET_MEAN, IMAGENET_STD]), images.device)
    mean, std = statistics.view(2, 1, 3, 1, 1)
    return (images - mean) / std
