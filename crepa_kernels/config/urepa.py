"""`UrepaConfig`: the settings of U-REPA."""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal

from pydantic import Field

from .base import Integer, flag, number
from .rules import ENCODER_ALIASES
from .shared import Scheduler, TaughtSettings, ThresholdMode, shared_field


class UrepaConfig(TaughtSettings):
    """Settings of U-REPA, on UNets, under the keys that users of SimpleTuner know, and of iREPA; see `Settings`."""

    TITLE = "U-REPA"
    ENCODER = "urepa_model"
    PREFIXES = ("urepa_", "irepa_")
    WORDS = MappingProxyType({"urepa_model": ENCODER_ALIASES})
    UNKNOWN = MappingProxyType({"urepa_encoder": "unknown key; did you mean urepa_model?"})

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
