"""`CrepaConfig`: the settings of CREPA."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field

from ..grid import SpatialAlign
from ..models.families import Family
from ..neighbours import Neighbours, Pairs
from .base import Integer, flag, integer, number
from .rules import (
    ENCODER_ALIASES,
    LEAST_INTEGER,
    PRESETS,
    ConfigError,
    describe,
    joint_problems,
    recommended_block_index,
    settle_source,
    unknown_key,
    unknown_preset,
)
from .shared import IREPA, Scheduler, TaughtSettings, ThresholdMode, shared_field

logger = logging.getLogger(__name__)

# In the place of a family's name.
ATTACHED = "the attached transformer"


class CrepaConfig(TaughtSettings):
    """Settings of CREPA under the keys that users of SimpleTuner know, and of iREPA; see `Settings`."""

    TITLE = "CREPA"
    ENCODER = "crepa_encoder"
    PREFIXES = ("crepa_", "irepa_")
    ALIASES = MappingProxyType({"crepa_model": "crepa_encoder"})
    WORDS = MappingProxyType({"crepa_encoder": ENCODER_ALIASES})
    # Of SimpleTuner, with the value at which they do nothing there.
    UNSUPPORTED = MappingProxyType({"crepa_use_tae": False, "crepa_self_flow": False, "crepa_self_flow_mask_ratio": 0})
    SAME = (frozenset({"crepa_feature_source", "crepa_use_backbone_features"}),)
    PRESETS = MappingProxyType(PRESETS)
    PARTS = MappingProxyType(
        {
            **IREPA,
            "crepa_relational_weight": ("relational loss", ("crepa_relational_pairs", "crepa_relational_margin")),
        }
    )

    crepa_enabled: bool = flag(False, "whether CREPA is on")
    crepa_block_index: Integer | None = Field(
        None,
        ge=0,
        description="zero-based block to align; must be an integer >= 0, required when enabled",
    )
    crepa_lambda: float = shared_field("lambda")
    crepa_adjacent_distance: Integer = integer(1, "neighbour offset in latent frames, 0 for none", ge=0)
    crepa_adjacent_tau: float = number(1.0, "decay length of the neighbour weight exp(-offset/tau)", gt=0)
    crepa_cumulative_neighbors: bool = flag(False, "every offset up to the distance, not that one alone")
    crepa_normalize_neighbour_sum: bool = flag(False, "divide each frame's sum by 1 + Σw")
    crepa_normalize_by_frames: bool = flag(True, "average over latent frames instead of adding them")
    crepa_spatial_align: bool | SpatialAlign = Field(
        True,
        description="side that is resampled to the other's token grid; must be true (student), false (pool), "
        '"student", "teacher", "smaller" or "pool"',
    )
    crepa_frame_map: Literal["last", "center", "mean"] = Field(
        "last", description='teacher frame of a latent frame; must be "last", "center" or "mean"'
    )
    crepa_encoder: str = shared_field("encoder")
    crepa_encoder_image_size: Integer = shared_field("encoder_image_size")
    crepa_encoder_resize: Literal["square", "grid"] = Field(
        "square",
        description='frames to the image size, or to a patch a student token; must be "square" or "grid"',
    )
    crepa_encoder_frames_batch_size: Integer = Field(
        -1, ge=LEAST_INTEGER, description="frames encoded at a time, all at once where <= 0; must be an integer"
    )
    crepa_feature_source: Literal["encoder", "backbone"] = Field(
        "encoder", description='where teacher features come from; must be "encoder" or "backbone"'
    )
    crepa_use_backbone_features: bool = flag(False, 'the same as crepa_feature_source = "backbone"')
    crepa_teacher_block_index: Integer | None = Field(
        None,
        ge=0,
        description="zero-based block that teaches in backbone mode, required there; "
        "must be an integer >= 0, deeper than crepa_block_index",
    )
    crepa_drop_vae_encoder: bool = flag(False, "free the VAE's encoder when only decoding is needed")
    crepa_scheduler: Scheduler = shared_field("scheduler")
    crepa_warmup_steps: Integer = shared_field("warmup_steps")
    crepa_decay_steps: Integer = shared_field("decay_steps")
    crepa_lambda_end: float = shared_field("lambda_end")
    crepa_power: float = shared_field("power")
    crepa_cutoff_step: Integer = shared_field("cutoff_step")
    crepa_similarity_threshold: float | None = Field(
        None,
        gt=0,
        description="average similarity at which the weight becomes 0; must be a number > 0, "
        'at most 1 for the metric "similarity" and 1 + Σw for "alignment_score"',
    )
    crepa_similarity_metric: Literal["similarity", "alignment_score"] = Field(
        "similarity",
        description="what is averaged and compared with the threshold, the mean cosine in [-1, 1] or the sum "
        'over neighbours; must be "similarity" or "alignment_score"',
    )
    crepa_similarity_ema_decay: float = shared_field("similarity_ema_decay")
    crepa_threshold_mode: ThresholdMode = shared_field("threshold_mode")
    crepa_probe_interval: Integer = integer(50, "steps between measurements while a recoverable cutoff lasts", ge=1)
    crepa_relational_weight: float = number(0.0, "weight of the relational loss within CREPA's, 0 for none", ge=0)
    crepa_relational_pairs: Pairs = Field(
        "neighbours",
        description="frames whose tokens the relational loss compares, neighbours by distance and tau; "
        'must be "frame", "all", "cross" or "neighbours"',
    )
    crepa_relational_margin: float | None = Field(
        None,
        ge=0,
        description="difference of cosines that costs nothing, squares where there is none; must be a number >= 0",
    )
    crepa_recompute: bool = flag(
        False, "keep nothing of size tokens x E between forward and backward, which makes it again"
    )
    crepa_backend: Literal["auto", "triton", "torch", "reference"] = Field(
        "auto",
        description="what computes the loss, CREPA_BACKEND in the environment overrides it; "
        'must be "auto", "triton", "torch" or "reference"',
    )

    @classmethod
    def _settle(cls, values: dict[str, Any], written: Mapping[str, str]) -> list[str]:
        return [*settle_source(values), *super()._settle(values, written)]

    def _joint_problems(self) -> Iterator[tuple[set[str], str]]:
        return chain(super()._joint_problems(), joint_problems(self.to_dict(), self.neighbours))

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], *, family: str | None = None) -> CrepaConfig:
        """From the `crepa_*` and `irepa_*` keys of a mapping; all other keys are left alone.

        With `family`, a missing `crepa_block_index` of an enabled configuration becomes the family's
        recommended one, which is logged. ConfigError (a ValueError) lists every wrong key.
        """
        if family is None or not isinstance(mapping, Mapping) or mapping.get("crepa_block_index") is not None:
            return super().from_dict(mapping)
        index = recommended_block_index(family)
        if mapping.get("crepa_enabled") is not True:
            return super().from_dict(mapping)
        logger.info("crepa_block_index = %d, the recommended block for %s", index, family)
        config = super().from_dict({**mapping, "crepa_block_index": index})
        config._keep_family(family)
        return config

    @classmethod
    def preset(cls, name: str, *, family: str | None = None, **overrides: Any) -> CrepaConfig:
        """One of `PRESETS`, enabled, at the family's recommended block, with `overrides` on top.

        Without `family` the block is the one of the transformer that CREPA is attached to, until then Wan's.
        """
        if name not in PRESETS:
            raise ConfigError([f"unknown preset {name!r}, {unknown_preset(name)}"])
        stray = [key for key in overrides if not key.startswith(cls.PREFIXES)]
        if stray:
            known = cls.model_fields
            raise ConfigError(describe(key, overrides[key], unknown_key(key, known)) for key in stray)
        values = cls.merged(PRESETS[name], overrides)
        if family is not None or values.get("crepa_block_index") is not None or values["crepa_enabled"] is not True:
            return cls.from_dict(values, family=family)
        config = cls.from_dict({**values, "crepa_block_index": recommended_block_index("wan")})
        config._keep_family(ATTACHED)
        return config

    @classmethod
    def from_args(
        cls,
        namespace: argparse.Namespace,
        base: CrepaConfig | Mapping[str, Any] | None = None,
        *,
        rest: Sequence[str] = (),
        family: str | None = None,
    ) -> CrepaConfig:
        """As `Settings.from_args`; a preset's block without a family stays that of whatever it is attached to."""
        chosen = "crepa_block_index" in vars(namespace)
        if not isinstance(base, CrepaConfig) or base.block_is_of != ATTACHED or chosen:
            return super().from_args(namespace, base, rest=rest, family=family)
        values = base.model_dump(exclude_unset=True)
        if family is not None:
            del values["crepa_block_index"]
        config = super().from_args(namespace, values, rest=rest, family=family)
        if family is None:
            config._keep_family(ATTACHED)
        return config

    def replace(self, **overrides: Any) -> CrepaConfig:
        """A validated copy with other values; `None` puts a key back to its default."""
        config = super().replace(**overrides)
        config._keep_family(None if "crepa_block_index" in overrides else self.block_is_of)
        return config

    def of_family(self, family: Family) -> CrepaConfig:
        """The configuration on a transformer of this family: a preset's block is the family's, an image has one frame.

        ValueError where the block is the recommended one for another family, or an image would have pairs of frames.
        """
        changes: dict[str, Any] = {}
        if self.block_is_of == ATTACHED:
            changes["crepa_block_index"] = family.block_index
            logger.info("crepa_block_index = %d, the recommended block for %s", family.block_index, family.name)
        elif self.block_is_of not in (None, family.name):
            raise ValueError(
                f"crepa_block_index = {self.crepa_block_index} is the recommended block for "
                f"{self.block_is_of}, and the transformer is of {family.name}: "
                f'give family="{family.name}" with the preset, or the block'
            )
        if family.images and self.crepa_relational_weight > 0 and self.crepa_relational_pairs == "cross":
            rule = (
                f'{family.name} makes images, whose one frame has no other: use "frame", or crepa_relational_weight = 0'
            )
            raise ConfigError([describe("crepa_relational_pairs", "cross", rule)])
        if family.images and self.crepa_adjacent_distance > 0:
            changes["crepa_adjacent_distance"] = 0
            logger.info(
                "crepa_adjacent_distance = %d is taken as 0: %s makes images, which have no neighbours",
                self.crepa_adjacent_distance,
                family.name,
            )
        return self.replace(**changes) if changes else self

    def _keep_family(self, family: str | None) -> None:
        # No field: two configurations of the same values are equal, wherever the block came from.
        self.__dict__["_family"] = family

    @property
    def block_is_of(self) -> str | None:
        """The family for which `crepa_block_index` was taken as the recommended one; None where it was given.

        `ATTACHED` in a preset without a family: whatever it is attached to.
        """
        family: str | None = self.__dict__.get("_family")
        return family

    @property
    def spatial_align(self) -> SpatialAlign:
        """`crepa_spatial_align` by its name: true is "student", false is "pool"."""
        if isinstance(self.crepa_spatial_align, bool):
            return "student" if self.crepa_spatial_align else "pool"
        return self.crepa_spatial_align

    @property
    def neighbours(self) -> Neighbours:
        """The neighbour options of the loss."""
        return Neighbours(
            self.crepa_adjacent_distance,
            self.crepa_adjacent_tau,
            self.crepa_cumulative_neighbors,
            self.crepa_normalize_neighbour_sum,
        )

    def loss_options(self) -> dict[str, Any]:
        """Arguments of `crepa_loss` that this configuration decides."""
        return {
            "distance": self.crepa_adjacent_distance,
            "tau": self.crepa_adjacent_tau,
            "cumulative": self.crepa_cumulative_neighbors,
            "normalize_neighbour_sum": self.crepa_normalize_neighbour_sum,
            "normalize_by_frames": self.crepa_normalize_by_frames,
            "spatial_align": self.spatial_align,
            "recompute": self.crepa_recompute,
            "backend": self.crepa_backend,
        }

    def relational_options(self) -> dict[str, Any]:
        """Arguments of `relational_loss` that this configuration decides."""
        return {
            "pairs": self.crepa_relational_pairs,
            "distance": self.crepa_adjacent_distance,
            "tau": self.crepa_adjacent_tau,
            "margin": self.crepa_relational_margin,
            "spatial_align": self.spatial_align,
            "backend": self.crepa_backend,
        }

    def threshold_on_other_scale(self) -> tuple[str, float] | None:
        """The other metric's name and what the threshold is on it, for frames with all their neighbours.

        `alignment_score = similarity * (1 + Σw)`, without the factor where the neighbour sum is normalised.
        None without a threshold.
        """
        threshold = self.crepa_similarity_threshold
        if threshold is None:
            return None
        scale = self.neighbours.most
        if self.crepa_similarity_metric == "alignment_score":
            return "similarity", threshold / scale
        return "alignment_score", threshold * scale
