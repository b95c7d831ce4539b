"""The form of a run's settings, without its widgets: made from the schema that the file and the command line have.

A form's values are a dict of what is given, as a JSON file holds it; what is not given is not in it.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from crepa_kernels.config import ConfigError, CrepaConfig
from crepa_kernels.config.rules import PRESETS
from crepa_kernels.config.sources import parse_settings
from crepa_kernels.regularizer.schedule import scheduled_weight

from ..settings import PRESET, RunSettings, add_arguments, given_values, load_settings

Values = dict[str, Any]
Kind = Literal["flag", "choice", "number", "text", "json"]

MODEL, DATA, OPTIMIZATION = "Model", "Data", "Training → Optimization"
LOSSES, VALIDATION, CHECKPOINTS = "Training → Loss functions", "Validation", "Checkpoints"
SECTIONS = (MODEL, DATA, OPTIMIZATION, LOSSES, VALIDATION, CHECKPOINTS)

# A key that is in none is one of optimization, or by its prefix one of the losses.
_SECTION_OF = {
    key: section
    for section, keys in (
        (MODEL, "model family task expert training lora_type lora_rank lora_alpha lora_dropout lora_targets"),
        (DATA, "data resolutions frame_counts clips_per_video fps hdr strict cache vae_tiling workers"),
        (DATA, "cache_teacher cache_teacher_precision teacher_device teacher_offload"),
        (CHECKPOINTS, "output checkpoint_every checkpoints_kept resume lora_format"),
    )
    for key in keys.split()
}
# As CREPA's documentation names them; every other key is named by its own words.
_LABELS = {
    "crepa_enabled": "Enable CREPA",
    "crepa_block_index": "CREPA Block Index",
    "crepa_lambda": "Weight",
    "crepa_adjacent_distance": "Adjacent Distance",
    "crepa_adjacent_tau": "Temporal Decay",
    "crepa_encoder": "Vision Encoder",
    "crepa_encoder_image_size": "Vision Encoder Image Size",
}
_INITIALS = {
    "lora": "LoRA",
    "lr": "LR",
    "ema": "EMA",
    "vae": "VAE",
    "fps": "FPS",
    "hdr": "HDR",
    "irepa": "iREPA",
    "layersync": "LayerSync",
}
POINTS = 400  # of the weight's curve


@dataclass(frozen=True)
class FormField:
    """One setting in the form.

    kind: "number" and "json" are written as JSON. choices: of "choice", and suggestions elsewhere. default: None where
    there is none, or where it is found out by the run. is_text: every value is text.
    """

    key: str
    section: str
    label: str
    help: str
    kind: Kind
    choices: tuple[str, ...]
    default: Any
    required: bool

    @property
    def is_text(self) -> bool:
        return self.kind in ("text", "choice")

    def written(self, value: Any) -> str:
        """A value as the field shows it; `read` gives it back."""
        if isinstance(value, str) and (self.is_text or not _is_json(value)):
            return value
        return json.dumps(value, ensure_ascii=False)

    def read(self, text: str) -> Any:
        """What a text in the field means: text of every kind, or JSON where it is some."""
        if self.is_text:
            return text
        try:
            return json.loads(text)
        except ValueError:
            return text


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _all_fields() -> Iterator[FormField]:
    yield FormField(
        PRESET, LOSSES, "Preset", "values under those that are given", "choice", tuple(PRESETS), None, False
    )
    # CREPA's before what modifies it, and both before LayerSync.
    fields = {**CrepaConfig.model_fields, **RunSettings.model_fields}
    for key, field in sorted(fields.items(), key=lambda item: item[0].startswith(("irepa_", "layersync_"))):
        kind, choices = _kind(field)
        yield FormField(
            key,
            _section(key),
            _LABELS.get(key) or _words(key),
            field.description or "",
            kind,
            choices,
            None if field.is_required() else field.default,
            field.is_required(),
        )


def _section(key: str) -> str:
    if key.startswith(("crepa_", "irepa_", "layersync_")):
        return LOSSES
    return _SECTION_OF.get(key, VALIDATION if key.startswith(("validation_", "matrix_", "report_")) else OPTIMIZATION)


def _words(key: str) -> str:
    return " ".join(_INITIALS.get(word, word.capitalize()) for word in key.removeprefix("crepa_").split("_"))


def _kind(field: FieldInfo) -> tuple[Kind, tuple[str, ...]]:
    kinds = [kind for kind in _alternatives(field.annotation) if kind is not NoneType]
    words = tuple(word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind))
    if kinds == [bool]:
        return "flag", ()
    if words:
        return ("choice" if bool not in kinds else "json"), words
    if kinds in ([int], [float]):
        return "number", ()
    return ("text" if kinds in ([str], [Path]) else "json"), ()


def _alternatives(annotation: Any) -> Iterator[Any]:
    """The types of a union, without what pydantic is told beside them."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        for each in get_args(annotation):
            yield from _alternatives(each)
    elif hasattr(annotation, "__metadata__"):
        yield from _alternatives(get_args(annotation)[0])
    else:
        yield annotation


FIELDS: Mapping[str, FormField] = MappingProxyType({field.key: field for field in _all_fields()})


@dataclass(frozen=True)
class Checked:
    """What the command line would say of values. wrong: by key, its problems. others: of no field of the form.

    notes: what is not wrong, and should be known. weights: (step, CREPA's weight) over the run, where it has one.
    """

    wrong: Mapping[str, str]
    others: tuple[str, ...]
    notes: tuple[str, ...]
    weights: tuple[tuple[int, float], ...]

    @property
    def is_usable(self) -> bool:
        return not (self.wrong or self.others)


def check(values: Mapping[str, Any]) -> Checked:
    """The errors that `crepa-train run` would give, by field. The block that a family recommends is taken as given."""
    canonical = CrepaConfig.merged(PRESETS.get(str(values.get(PRESET)), {}), values)
    unsaid = canonical.get("crepa_enabled") is True and canonical.get("crepa_block_index") is None
    try:
        with _silent():
            settings, config = load_settings(None, {**values, **({"crepa_block_index": 0} if unsaid else {})})
    except ConfigError as error:
        return _sorted(error)
    notes = [f"{each.TITLE} is {each.idle}" for each in (config, settings.layersync) if each.idle]
    notes += [f"{title} is {said}" for title, said in config.idle_parts.items()]
    weights: tuple[tuple[int, float], ...] = ()
    if config.enabled:
        total = settings.max_train_steps
        steps = sorted({round(i * (total - 1) / (POINTS - 1)) for i in range(POINTS)})
        cutoff = config.crepa_cutoff_step
        kept = [step for step in steps if not 0 < cutoff <= step]
        weights = tuple((step, scheduled_weight(config.schedule, step, total)) for step in kept)
        if len(kept) < len(steps):
            weights += ((cutoff, 0.0), (total - 1, 0.0))
    return Checked({}, (), tuple(notes), weights)


class _silent:
    """What `load_settings` logs is shown beside the form."""

    def __enter__(self) -> None:
        self.logger = logging.getLogger("crepa_trainer.settings")
        self.before = self.logger.disabled
        self.logger.disabled = True

    def __exit__(self, *_: object) -> None:
        self.logger.disabled = self.before


def _sorted(error: ConfigError) -> Checked:
    wrong: dict[str, str] = {}
    others: list[str] = []
    for problem in error.problems:
        found = re.match(r"(\w+)( = |: )", problem)
        key = CrepaConfig.ALIASES.get(found[1], found[1]) if found else ""
        if key in FIELDS:
            wrong[key] = f"{wrong[key]}; {problem}" if key in wrong else problem
        else:
            others.append(problem)
    return Checked(wrong, tuple(others), (), ())


def shown_value(values: Mapping[str, Any], key: str) -> tuple[Any, Literal["given", "preset", "default"]]:
    """What a setting is, and who says so."""
    for alias in (key, *(name for name, meant in CrepaConfig.ALIASES.items() if meant == key)):
        if values.get(alias) is not None:
            return values[alias], "given"
    preset = PRESETS.get(str(values.get(PRESET)), {})
    return (preset[key], "preset") if key in preset else (FIELDS[key].default, "default")


def json_text(values: Mapping[str, Any]) -> str:
    """The file that `crepa-train run --config` reads."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def read_json_text(text: str) -> Values:
    """The values of a file's text. ValueError where it is not one JSON object, or has a key twice."""
    return parse_settings(text or "{}")


def _is_plain(key: str, value: Any) -> bool:
    """Whether a value is written on a command line as it is: text that is not read as something else there."""
    if not isinstance(value, str) or not _is_json(value):
        return isinstance(value, str)
    is_text = key in FIELDS and FIELDS[key].is_text
    return is_text and not isinstance(json.loads(value), str | None)


def command_line(values: Mapping[str, Any]) -> str:
    """The same as one command for a shell; `read_command_line` gives the values back."""
    words = ["crepa-train", "run"]
    for key, value in values.items():
        text = value if _is_plain(key, value) else json.dumps(value, ensure_ascii=False)
        # Behind = a value may begin with a dash.
        words.append(f"--{key}={text}")
    return " ".join(shlex.quote(word) for word in words)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(message)


def read_command_line(text: str) -> Values:
    """The values on a command line as `command_line` writes it, or as one types it. ValueError for any other."""
    words = shlex.split(text)
    if words[:2] != ["crepa-train", "run"]:
        raise ValueError("must begin with: crepa-train run")
    parser = _Parser(add_help=False, allow_abbrev=False)
    add_arguments(parser)
    given, rest = parser.parse_known_args(words[2:])
    values = given_values(given)
    # A typo stays in sight, where the check names it.
    for word in rest:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not equals:
            raise ValueError(f"{word}: write options as --KEY=VALUE")
        values[key] = FormField(key, "", "", "", "json", (), None, False).read(value)
    order = [word.removeprefix("--").split("=")[0] for word in words[2:] if word.startswith("--")]
    return {key: values[key] for key in dict.fromkeys((*order, *values)) if key in values}
