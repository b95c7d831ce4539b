"""`CrepaConfig`: one validated schema for the JSON file, the command line and a form."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..grid import SpatialAlign
from ..models.families import Family
from ..neighbours import Neighbours
from .rules import (
    DINOV2_HUB_IDS,
    LEAST_INTEGER,
    MOST_INTEGER,
    PREFIX,
    PRESETS,
    ConfigError,
    canonical,
    describe,
    joint_problems,
    recommended_block_index,
    refused_keys,
    unknown_key,
    unknown_preset,
    whole_rule,
)
from .sources import add_options, merge, read_json, unknown_options

logger = logging.getLogger(__name__)


def _whole_number(value: Any) -> Any:
    # JSON has one kind of number: 1e3 is a step count too.
    return int(value) if isinstance(value, float) and value.is_integer() else value


# In the place of a family's name.
ATTACHED = "the attached transformer"

Integer = Annotated[int, Field(le=MOST_INTEGER), BeforeValidator(_whole_number)]
_SIGNS = {"ge": ">=", "gt": ">"}


def integer(default: int | None, text: str, *, ge: int) -> Any:
    """A field whose bound is a rule in its description too."""
    return Field(default, ge=ge, description=f"{text}; must be an integer >= {ge}")


def number(default: float | None, text: str, **bound: Any) -> Any:
    """As `integer`, `bound`: ge or gt."""
    [(name, value)] = bound.items()
    return Field(default, description=f"{text}; must be a number {_SIGNS[name]} {value}", **bound)


def flag(default: bool, text: str) -> Any:
    """A field that is true or false, and says so."""
    return Field(default, description=f"{text}; must be true or false")


class CrepaConfig(BaseModel):
    """Settings of CREPA, immutable, under the keys that users of SimpleTuner know.

    Every field's description is its rule: it is shown in errors, in `--help` and in `model_json_schema()`.
    A wrong value, an unknown key or a contradiction raises one `ConfigError` (a ValueError) that lists every
    wrong key with its value and rule. `None` means the default. Integers have at most 64 bits.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    crepa_enabled: bool = flag(False, "whether CREPA is on")
    crepa_block_index: Integer | None = Field(
        None,
        ge=0,
        description="zero-based block to align; must be an integer >= 0, required when enabled",
    )
    crepa_lambda: float = number(0.5, "weight of the loss", ge=0)
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
    crepa_encoder: str = Field(
        "dinov2_vitg14",
        min_length=1,
        description=f"teacher; must be one of {', '.join(DINOV2_HUB_IDS)}, a local folder or a hub id",
    )
    crepa_encoder_image_size: Integer = Field(
        518,
        ge=1,
        description="side of the square image that the encoder sees, in pixels; "
        "must be an integer, a multiple of the patch size, at least one patch",
    )
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
    crepa_scheduler: Literal["constant", "linear", "cosine", "polynomial"] = Field(
        "constant",
        description='the weight after warm-up; must be "constant", "linear", "cosine" or "polynomial"',
    )
    crepa_warmup_steps: Integer = integer(0, "steps over which the weight rises linearly from 0", ge=0)
    crepa_decay_steps: Integer = integer(0, "steps from warm-up to lambda_end, 0 for the rest of the run", ge=0)
    crepa_lambda_end: float = number(0.0, "weight after the decay", ge=0)
    crepa_power: float = number(1.0, "exponent of the polynomial decay", gt=0)
    crepa_cutoff_step: Integer = integer(0, "step from which the weight is 0, 0 for never", ge=0)
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
    crepa_similarity_ema_decay: float = Field(
        0.99, ge=0, lt=1, description="decay of the similarity's moving average; must be a number in [0, 1)"
    )
    crepa_threshold_mode: Literal["permanent", "recoverable"] = Field(
        "permanent",
        description="whether the weight comes back when the average falls below the threshold; "
        'must be "permanent" or "recoverable"',
    )
    crepa_probe_interval: Integer = integer(50, "steps between measurements while a recoverable cutoff lasts", ge=1)
    crepa_backend: Literal["auto", "triton", "torch", "reference"] = Field(
        "auto",
        description="what computes the loss, CREPA_BACKEND in the environment overrides it; "
        'must be "auto", "triton", "torch" or "reference"',
    )

    def __init__(self, **data: Any) -> None:
        fields = type(self).model_fields
        values, written, problems = canonical(data, fields)
        refused: list[str] = []
        try:
            super().__init__(**values)
        except ValidationError as error:
            refused = refused_keys(error, fields)
            for key in refused:
                rule = whole_rule(fields[key].description or "", values[key])
                problems.append(describe(written.get(key, key), values[key], rule))
            super().__init__(**{key: value for key, value in values.items() if key not in refused})
        problems += [
            problem
            for keys, problem in joint_problems(self.to_dict(), self.neighbours)
            if not keys.intersection(refused)
        ]
        if problems:
            raise ConfigError(problems)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], *, family: str | None = None) -> CrepaConfig:
        """From the `crepa_*` keys of a mapping; all other keys are left alone.

        With `family`, a missing `crepa_block_index` of an enabled configuration becomes the family's
        recommended one, which is logged. ConfigError (a ValueError) lists every wrong key.
        """
        if not isinstance(mapping, Mapping):
            raise ConfigError([f"settings must be a mapping of keys to values, not {type(mapping).__name__}"])
        values = {key: value for key, value in mapping.items() if isinstance(key, str) and key.startswith(PREFIX)}
        recommended = False
        if family is not None and values.get("crepa_block_index") is None:
            index = recommended_block_index(family)
            if values.get("crepa_enabled") is True:
                recommended, values["crepa_block_index"] = True, index
                logger.info("crepa_block_index = %d, the recommended block for %s", index, family)
        config = cls(**values)
        config._keep_family(family if recommended else None)
        return config

    @classmethod
    def from_json(cls, path: str | Path, *, family: str | None = None) -> CrepaConfig:
        """From a JSON file that holds one object; errors begin with the file's name."""
        values = read_json(path)
        try:
            return cls.from_dict(values, family=family)
        except ConfigError as error:
            raise ConfigError(error.problems, str(path)) from None

    @classmethod
    def preset(cls, name: str, *, family: str | None = None, **overrides: Any) -> CrepaConfig:
        """One of `PRESETS`, enabled, at the family's recommended block, with `overrides` on top.

        Without `family` the block is the one of the transformer that CREPA is attached to, until then Wan's.
        """
        if name not in PRESETS:
            raise ConfigError([f"unknown preset {name!r}, {unknown_preset(name)}"])
        stray = [key for key in overrides if not key.startswith(PREFIX)]
        if stray:
            known = cls.model_fields
            raise ConfigError(describe(key, overrides[key], unknown_key(key, known)) for key in stray)
        values = merge(PRESETS[name], overrides)
        if family is not None or values.get("crepa_block_index") is not None or values["crepa_enabled"] is not True:
            return cls.from_dict(values, family=family)
        config = cls.from_dict({**values, "crepa_block_index": recommended_block_index("wan")})
        config._keep_family(ATTACHED)
        return config

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser, base: Mapping[str, Any] | None = None) -> None:
        """Add one `--crepa_*` option for each key, in a group of their own.

        Values are read as JSON; what is not JSON is a string; an option without a value means true. Options
        that are not given leave nothing in the namespace. Give the namespace to `from_args`. `base`: values that the
        help shows as defaults.
        """
        add_options(parser, cls.model_fields, base or {})

    @classmethod
    def from_args(
        cls,
        namespace: argparse.Namespace,
        base: CrepaConfig | Mapping[str, Any] | None = None,
        *,
        rest: Sequence[str] = (),
        family: str | None = None,
    ) -> CrepaConfig:
        """From a namespace of `add_arguments`, over `base` (a configuration, or a mapping as of `read_json`).

        `rest`: what `parser.parse_known_args` did not know; an option in it that begins with `--crepa` is an
        error that names the nearest one.
        """
        given = {key: value for key, value in vars(namespace).items() if key.startswith(PREFIX)}
        problems = unknown_options(rest, cls.model_fields)
        follows = isinstance(base, CrepaConfig) and base.block_is_of == ATTACHED and "crepa_block_index" not in given
        if isinstance(base, CrepaConfig):
            base = {key: getattr(base, key) for key in base.model_fields_set}
            if follows and family is not None:
                del base["crepa_block_index"]
        try:
            config = cls.from_dict(merge(base or {}, given), family=family)
        except ConfigError as error:
            raise ConfigError([*problems, *error.problems]) from None
        if follows and family is None:
            config._keep_family(ATTACHED)
        if problems:
            raise ConfigError(problems)
        return config

    @classmethod
    def parse_known_args(
        cls,
        argv: Sequence[str] | None = None,
        base: CrepaConfig | Mapping[str, Any] | None = None,
        *,
        family: str | None = None,
    ) -> tuple[CrepaConfig, list[str]]:
        """The configuration on a command line (default: the process's own), and the words left over."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        cls.add_arguments(parser)
        namespace, rest = parser.parse_known_args(argv)
        return cls.from_args(namespace, base, rest=rest, family=family), rest

    def replace(self, **overrides: Any) -> CrepaConfig:
        """A validated copy with other values; `None` puts a key back to its default."""
        config = type(self)(**merge({key: getattr(self, key) for key in self.model_fields_set}, overrides))
        config._keep_family(None if "crepa_block_index" in overrides else self.block_is_of)
        return config

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> CrepaConfig:
        """`replace`: pydantic's own would not validate."""
        return self.replace(**(update or {}))

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, as JSON can hold it; `from_dict` gives the same configuration back."""
        return {key: getattr(self, key) for key in type(self).model_fields}

    def of_family(self, family: Family) -> CrepaConfig:
        """The configuration on a transformer of this family: a preset's block is the family's, an image has one frame.

        ValueError where the block is the recommended one for another family.
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
    def idle(self) -> str | None:
        """What to say of keys that do nothing because nobody said whether CREPA is on; None where there are none."""
        given = [key for key in type(self).model_fields if key in self.model_fields_set]
        if not given or "crepa_enabled" in given:
            return None
        return f"OFF: neither crepa_enabled nor a preset is given, without which {', '.join(given)} does nothing"

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
