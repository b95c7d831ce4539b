"""Keys that several losses have under prefixes of their own, and what is read of them without a prefix."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from .base import Settings, integer, number

Scheduler = Literal["constant", "linear", "cosine", "polynomial"]
ThresholdMode = Literal["permanent", "recoverable"]

_SCHEDULE = {
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


def schedule_field(name: str) -> Any:
    """The field of a key of the schedule, by its name without prefix: default and rule."""
    return copy(_SCHEDULE[name])


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
    def of(cls, settings: Settings, elsewhere: tuple[str, float] | None = None) -> ScheduleSettings:
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
        encoder_key: the key of ``encoder``, for messages.
    """

    encoder: str
    encoder_key: str
    image_size: int
    resize: str = "square"
    frames_batch_size: int = -1
    frame_map: str = "last"
    drop_vae_encoder: bool = False
    backbone: bool = False
