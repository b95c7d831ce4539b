"""`UrepaConfig`: the settings of U-REPA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field

from .base import Integer, Settings, flag, number
from .irepa import IrepaKeys
from .rules import ENCODER_ALIASES, refuse_qwen
from .shared import Scheduler, ScheduleSettings, TeacherSettings, ThresholdMode, encoder_problems, shared_field


class UrepaConfig(IrepaKeys, Settings):
    """Settings of U-REPA, on UNets, under the keys that users of SimpleTuner know, and of iREPA; see `Settings`."""

    TITLE = "U-REPA"
    PREFIXES = ("urepa_", "irepa_")
    WORDS = MappingProxyType({"urepa_model": ENCODER_ALIASES})

    urepa_enabled: bool = flag(False, "whether U-REPA is on")
    urepa_lambda: float = shared_field("lambda")
    urepa_manifold_weight: float = number(
        3.0, "weight of the relations between an image's tokens beside their alignment, 0 for none", ge=0
    )
    urepa_model: str = shared_field("encoder")
    urepa_encoder_image_size: Integer = shared_field("encoder_image_size")
    urepa_spatial_align: Literal["teacher", "smaller", "student"] = Field(
        "teacher",
        description="side whose token grid the other one is resampled to, smaller for the one with fewer tokens; "
        'must be "teacher", "smaller" or "student"',
    )
    urepa_scheduler: Scheduler = shared_field("scheduler")
    urepa_warmup_steps: Integer = shared_field("warmup_steps")
    urepa_decay_steps: Integer = shared_field("decay_steps")
    urepa_lambda_end: float = shared_field("lambda_end")
    urepa_power: float = shared_field("power")
    urepa_cutoff_step: Integer = shared_field("cutoff_step")
    urepa_similarity_threshold: float | None = Field(
        None,
        gt=0,
        le=1,
        description="average mean cosine at which the weight becomes 0; must be a number > 0, at most 1",
    )
    urepa_similarity_ema_decay: float = shared_field("similarity_ema_decay")
    urepa_threshold_mode: ThresholdMode = shared_field("threshold_mode")

    @classmethod
    def _settle(cls, values: dict[str, Any], written: Mapping[str, str]) -> list[str]:
        return refuse_qwen("urepa_model", values, written)

    def _joint_problems(self) -> Iterator[tuple[set[str], str]]:
        return chain(encoder_problems(self.teacher), self.irepa_problems("urepa_enabled"))

    @property
    def schedule(self) -> ScheduleSettings:
        """The weight over training, and its cutoff."""
        return ScheduleSettings.of(self)

    @property
    def teacher(self) -> TeacherSettings:
        """The teacher, and how images come to it."""
        return TeacherSettings(
            encoder=self.urepa_model,
            encoder_key="urepa_model",
            image_size=self.urepa_encoder_image_size,
            size_key="urepa_encoder_image_size",
        )
