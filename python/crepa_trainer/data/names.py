"""Which files a run's clips and captions are kept in, and which frames of a clip the teacher sees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from crepa_kernels import frame_indices
from crepa_kernels.teachers.cache import TeacherCache, file_name
from crepa_kernels.teachers.encoding import NamedEncoder, named_encoder

from .dataset import Bucket, ClipKey, FoundClips
from .files import model_identity

if TYPE_CHECKING:
    from crepa_kernels import CrepaConfig

    from ..families import TrainingFamily
    from ..settings import RunSettings

FORMAT = 2  # part of every file's name; another one makes all files again


@dataclass(frozen=True)
class ClipFiles:
    """Files of one clip; `teacher` is None where CREPA needs nothing of it."""

    latents: Path
    teacher: Path | None
    text: Path

    @property
    def of_pixels(self) -> list[Path]:
        """Those that are made from the clip's pixels."""
        return [self.latents] if self.teacher is None else [self.latents, self.teacher]


def teacher_is_encoder(config: CrepaConfig) -> bool:
    """Whether a frozen encoder teaches at any step of a run: not in backbone mode, nor with a weight that stays 0."""
    end = 0.0 if config.crepa_scheduler == "constant" else config.crepa_lambda_end
    return config.crepa_enabled and config.crepa_feature_source == "encoder" and max(config.crepa_lambda, end) > 0


def teacher_device(settings: RunSettings, device: torch.device) -> torch.device:
    """Where the teacher runs, of a model that is trained on `device`."""
    return device if settings.teacher_device is None else torch.device(settings.teacher_device)


def teacher_frames(config: CrepaConfig, family: TrainingFamily, bucket: Bucket) -> list[int]:
    """The pixel frames of a clip that the teacher needs to see, in order."""
    layout = family.layout(bucket)
    rule, latents = config.crepa_frame_map, layout.latent_shape[0]
    frames = frame_indices(rule, bucket.frames, latents, patch=layout.patch)
    # The regulariser maps the frames that it is given once more, which must change nothing.
    again = frame_indices(rule, len(frames), latents, patch=layout.patch)
    return frames if again == list(range(len(frames))) else list(range(bucket.frames))


@dataclass
class CacheNames:
    """Names of a run's files: each from all that its content depends on."""

    settings: RunSettings
    config: CrepaConfig
    family: TrainingFamily
    device: torch.device
    found: FoundClips

    @property
    def folder(self) -> Path:
        return self.settings.cache_folder

    @property
    def teacher_device(self) -> torch.device:
        """Where the teacher runs, in whose type its features are."""
        return teacher_device(self.settings, self.device)

    def files(self, key: ClipKey) -> ClipFiles:
        bucket = key.bucket
        clip = {
            "format": FORMAT,
            "video": self._video(key.video),
            "clip": [key.start, bucket.height, bucket.width, bucket.frames],
            **self._rate,
        }
        latents = self.folder / "latents" / file_name({**clip, "family": self.family.name, **self._encoders_of_clips})
        teacher = TeacherCache(self.folder / "teacher", self.settings.cache_teacher_precision)
        taught = teacher.path({**clip, **self._teacher(bucket)})
        return ClipFiles(latents, taught if teacher_is_encoder(self.config) else None, self.text(key.caption, key))

    def text(self, prompt: str, key: ClipKey | None = None) -> Path:
        """The file of a prompt's embedding for a clip; the same for all clips where their first frames are not read.

        Without a clip: of the negative prompt.
        """
        content = {"format": FORMAT, "family": self.family.name, "text": prompt, "encoder": self.text_encoder}
        if key is not None and self.family.text_image_parts:
            content["video"] = self._video(key.video)
            content["first_frame"] = [key.start, key.bucket.height, key.bucket.width]
            content["options"] = dict(self.family.text_image_options)
            content |= self._rate
        return self.folder / "text" / file_name(content)

    def _video(self, name: str) -> list[str]:
        return [name, self.found.contents[name]]

    @property
    def _rate(self) -> dict[str, float]:
        """By which frames of a video are numbered, where it is not its own."""
        return {} if self.settings.fps is None else {"fps": float(self.settings.fps)}

    @cached_property
    def _encoders_of_clips(self) -> dict[str, Any]:
        encoders: dict[str, Any] = {"vae": model_identity(self.family.model, "vae", *self.family.image_parts)}
        if self.settings.vae_tiling:
            encoders["tiling"] = True
        # Beside the latents there may be what was made of the first frame.
        return encoders if self.family.task == "text2video" else {**encoders, "task": self.family.task}

    @cached_property
    def text_encoder(self) -> list[Any]:
        """What an embedding is of beside its prompt: the parts that make it, by name and content, and their type."""
        dtype = str(encoder_type(self.device))
        # First one that has a config.json.
        parts = sorted(self.family.text_parts, key=lambda part: part.startswith("tokenizer"))
        parts += self.family.text_image_parts
        return [*model_identity(self.family.model, *parts), dtype]

    @cached_property
    def _encoder(self) -> tuple[list[Any], int | None]:
        encoder = named_encoder(self.config.crepa_encoder)
        return [*encoder_identity(encoder), str(encoder.dtype(self.teacher_device))], encoder.patch_size

    def _teacher(self, bucket: Bucket) -> dict[str, Any]:
        if not teacher_is_encoder(self.config):
            return {}
        config, layout = self.config, self.family.layout(bucket)
        if self.settings.cache_teacher == "frames":
            return {"frames": teacher_frames(config, self.family, bucket)}
        encoder, patch = self._encoder
        # By the grid frames have the encoder's patches, if it has any.
        square = config.crepa_encoder_resize == "square" or patch is None
        size = [config.crepa_encoder_image_size] * 2 if square else list(layout.grid)
        rule = [config.crepa_frame_map, layout.latent_shape[0], layout.patch]
        return {"features": encoder, "resize": [config.crepa_encoder_resize, *size], "rule": rule}


def encoder_identity(encoder: NamedEncoder) -> list[Any]:
    """What tells a teacher's weights from others, as `model_identity`; ValueError where nobody can know them."""
    if encoder.weights is not None:
        return model_identity(encoder.weights)
    key = encoder.content_key()
    if key is None:
        raise ValueError(
            f'cache_teacher = "features", but the encoder {encoder.name} is a callable without a key, so what it made '
            'cannot be told from another one\'s: give FrozenEncoder(key=...), or cache_teacher = "frames"'
        )
    return [encoder.name, key, encoder.patch_size]


def encoder_type(device: torch.device) -> torch.dtype:
    """The type of the text encoder."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16
