"""Keys that several losses have under prefixes of their own, and what is read of them without a prefix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from .base import Integer, Settings, flag, integer, number
from .rules import ENCODER_PATCH_SIZES, describe, refuse_qwen

Scheduler = Literal["constant", "linear", "cosine", "polynomial"]
ThresholdMode = Literal["permanent", "recoverable"]
IREPA = {"irepa_enabled": ("iREPA", ("irepa_spatial_norm_alpha", "irepa_projector_kernel_size"))}

_FIELDS = {
    "encoder": Field(
        "dinov2_vitg14",
        min_length=1,
        description=f"teacher; must be one of {', '.join(ENCODER_PATCH_SIZES)}, a local folder or a hub id",
    ),
    "encoder_image_size": Field(
        518,
        ge=1,
        description="side of the square image that the encoder sees, in pixels; "
        "must be an integer, a multiple of the patch size, at least one patch",
    ),
    "lambda": number(0.5, "weight of the loss", ge=0),
    "scheduler": Field(
        "constant",
        description='the weight after warm-up; must be "constant", "linear", "cosine" or "polynomial"',
    ),
    "warmup_steps": integer(0, "steps over which the weight rises linearly from 0", ge=0),
    "decay_steps": integer(0, "steps from warm-up to lambda_end, 0 for the rest of the run", ge=0),
    "lambda_end": number(0.0, "weight after the decay", ge=0),
    "power": number(1.0, "exponent of the polynomial decay", gt=0),
    "cutoff_step": integer(0, "step from which the weight is 0, 0 for never", ge=0),
    "similarity_ema_decay": Field(
        0.99, ge=0, lt=1, description="decay of the similarity's moving average; must be a number in [0, 1)"
    ),
    "threshold_mode": Field(
        "permanent",
        description="whether the weight comes back when the average falls below the threshold; "
        'must be "permanent" or "recoverable"',
    ),
}


def shared_field(name: str) -> Any:
    """The field of a key that several settings have, by its name without prefix: default and rule."""
    return copy(_FIELDS[name])


@dataclass(frozen=True)
class ScheduleSettings:
    """The weight over training, and its cutoff; the attributes are named as the keys.

    Attributes:
        title, prefix: of the settings that they are of, for messages.
        similarity_metric: name of what is averaged and compared with the threshold.
        shipped: thresholds with their metrics, of the presets.
        elsewhere: another metric's name, and the threshold on its scale.
    """

    title: str
    prefix: str
    weight: float
    lambda_end: float
    scheduler: Scheduler
    warmup_steps: int
    decay_steps: int
    power: float
    cutoff_step: int
    similarity_threshold: float | None
    similarity_ema_decay: float
    threshold_mode: ThresholdMode
    similarity_metric: str
    probe_interval: int
    shipped: tuple[tuple[Any, Any], ...]
    elsewhere: tuple[str, float] | None

    @classmethod
    def of(cls, settings: Settings, elsewhere: tuple[str, float] | None) -> ScheduleSettings:
        """Of settings that have the schedule's keys; those without metric or probe interval have the defaults."""
        prefix, values = settings.PREFIXES[0], settings.to_dict()
        names = [name for name in cls.__dataclass_fields__ if f"{prefix}{name}" in values]
        read = {"similarity_metric": "similarity", "probe_interval": 50, **{n: values[f"{prefix}{n}"] for n in names}}
        keys = (f"{prefix}similarity_threshold", f"{prefix}similarity_metric")
        shipped = tuple((preset.get(keys[0]), preset.get(keys[1])) for preset in settings.PRESETS.values())
        return cls(settings.TITLE, prefix, values[f"{prefix}lambda"], shipped=shipped, elsewhere=elsewhere, **read)


@dataclass(frozen=True)
class TeacherSettings:
    """The teacher, and how frames come to it: the keys of SPEC, without prefix.

    Attributes:
        backbone: whether a block of the model itself teaches; then nothing else counts.
        encoder_key, size_key: the keys of ``encoder`` and ``image_size``, for messages.
    """

    encoder: str
    encoder_key: str
    size_key: str
    image_size: int
    resize: str = "square"
    frames_batch_size: int = -1
    frame_map: str = "last"
    drop_vae_encoder: bool = False
    backbone: bool = False

    @classmethod
    def of(cls, settings: Settings, encoder_key: str) -> TeacherSettings:
        """Of settings that name the teacher under ``encoder_key``; what has no key there has the default."""
        prefix, values = settings.PREFIXES[0], settings.to_dict()
        tried = [(name, f"{prefix}{part}{name}") for name in cls.__dataclass_fields__ for part in ("", "encoder_")]
        keys = {name: key for name, key in tried if key in values} | {"encoder": encoder_key}
        read = {name: values[key] for name, key in keys.items()}
        backbone = values.get(f"{prefix}feature_source") == "backbone"
        return cls(encoder_key=encoder_key, size_key=keys["image_size"], backbone=backbone, **read)


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("must be odd")
    return value


class TaughtSettings(Settings):
    """Settings of a loss with a teacher and a schedule, which iREPA modifies: beside its own keys it has iREPA's.

    ENCODER: the key of its teacher.
    """

    ENCODER: ClassVar[str]
    PARTS = MappingProxyType(IREPA)

    irepa_enabled: bool = flag(
        False, "whether the projector is a convolution and the teacher is normalized over the patches of each frame"
    )
    irepa_spatial_norm_alpha: float = number(
        0.6, "share of their mean over a frame that the teacher's patches are without", ge=0
    )
    irepa_projector_kernel_size: Annotated[Integer, AfterValidator(_odd)] = Field(
        3, ge=1, description="side of the projector's convolution in tokens; must be an integer >= 1 and odd"
    )

    @classmethod
    def _settle(cls, values: dict[str, Any], written: Mapping[str, str]) -> list[str]:
        return refuse_qwen(cls.ENCODER, values, written)

    def _joint_problems(self) -> Iterator[tuple[set[str], str]]:
        teacher, switch = self.teacher, f"{self.PREFIXES[0]}enabled"
        size, patch = teacher.image_size, ENCODER_PATCH_SIZES.get(teacher.encoder, 1)
        # By the grid the size is not used, and its default is no multiple of every patch.
        if teacher.resize == "square" and size % patch:
            rule = f"must be a multiple of the patch size of {teacher.encoder}, {patch}, at least one patch"
            keys = {teacher.encoder_key, teacher.size_key, teacher.size_key.replace("image_size", "resize")}
            yield keys, describe(teacher.size_key, size, rule)
        if self.irepa_enabled and not self.enabled:
            rule = f"it modifies CREPA or U-REPA, so it needs {switch} = true"
            yield {"irepa_enabled", switch}, describe("irepa_enabled", True, rule)

    @property
    def schedule(self) -> ScheduleSettings:
        """The weight over training, and its cutoff."""
        return ScheduleSettings.of(self, self.threshold_on_other_scale())

    def threshold_on_other_scale(self) -> tuple[str, float] | None:
        """Another metric's name and what the threshold is on it; None without one."""
        return None

    @property
    def teacher(self) -> TeacherSettings:
        """The teacher, and how frames or images come to it."""
        return TeacherSettings.of(self, self.ENCODER)
