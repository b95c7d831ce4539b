"""`Settings`: one validated schema for the file, the command line and a form, under keys with a prefix."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .rules import MOST_INTEGER, UNSUPPORTED, ConfigError, describe, is_off, refused_keys, unknown_key, whole_rule
from .sources import add_json_options, read_settings, unknown_options

Self = TypeVar("Self", bound="Settings")


def _whole_number(value: Any) -> Any:
    # JSON has one kind of number: 1e3 is a step count too.
    return int(value) if isinstance(value, float) and value.is_integer() else value


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


def _is_text(kind: Any) -> bool:
    """Whether values of a field of this type are text in every case: a folder may be named 2024."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return all(isinstance(each, str) for each in parts)
    if origin in (Union, UnionType):
        return all(_is_text(each) for each in parts if each is not NoneType)
    return _is_text(parts[0]) if origin is Annotated else kind in (str, Path)


class Settings(BaseModel):
    """Immutable settings, each under a key that begins with one of ``PREFIXES``.

    Every field's description is its rule: it is shown in errors, in `--help` and in `model_json_schema()`.
    A wrong value, an unknown key or a contradiction raises one `ConfigError` (a ValueError) that lists every
    wrong key with its value and rule. `None` means the default. Integers have at most 64 bits.

    A subclass says its fields and these:

    TITLE: what they are the settings of, in messages and over their group of `--help`.
    PREFIXES: of its keys; `<the first>enabled` is its switch.
    ALIASES: other names of keys.
    WORDS: by key, other names of its values.
    UNSUPPORTED: keys of other programs that do nothing here, with the one value that is accepted.
    UNKNOWN: of keys of other programs that are unknown here, what to say; NEAR: other keys that one may have meant.
    SAME: sets of keys that say the same thing, of which a later source's replace an earlier one's.
    PRESETS: values by the name of a preset.
    PARTS: by the key that switches a part of it on, the part's title and the keys that do nothing without it.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    TITLE: ClassVar[str]
    PREFIXES: ClassVar[tuple[str, ...]]
    ALIASES: ClassVar[Mapping[str, str]] = {}
    WORDS: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    UNSUPPORTED: ClassVar[Mapping[str, Any]] = {}
    UNKNOWN: ClassVar[Mapping[str, str]] = {}
    NEAR: ClassVar[tuple[str, ...]] = ()
    SAME: ClassVar[tuple[frozenset[str], ...]] = ()
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    PARTS: ClassVar[Mapping[str, tuple[str, tuple[str, ...]]]] = {}

    def __init__(self, **data: Any) -> None:
        fields = type(self).model_fields
        values, written, problems = self._canonical(data)
        problems += self._settle(values, written)
        refused: list[str] = []
        try:
            super().__init__(**values)
        except ValidationError as error:
            refused = refused_keys(error, fields)
            for key in refused:
                rule = whole_rule(fields[key].description or "", values.get(key))
                name = written.get(key, key)
                problems.append(describe(name, values[key], rule) if key in values else f"{name}: {rule}")
            if any(fields[key].is_required() for key in refused):
                raise ConfigError(problems) from None
            super().__init__(**{key: value for key, value in values.items() if key not in refused})
        problems += [problem for keys, problem in self._joint_problems() if not keys.intersection(refused)]
        if problems:
            raise ConfigError(problems)

    @classmethod
    def _canonical(cls, data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
        """Canonical keys and values; the key each was written under; what is wrong whatever the fields say."""
        values: dict[str, Any] = {}
        written: dict[str, str] = {}
        problems: list[str] = []
        known = [*cls.model_fields, *cls.ALIASES]
        for key, value in data.items():
            if key in cls.UNSUPPORTED:
                if value is not None and not is_off(value, cls.UNSUPPORTED[key]):
                    off = json.dumps(cls.UNSUPPORTED[key])
                    problems.append(describe(key, value, f"{UNSUPPORTED}; only {off} or null is accepted"))
            elif key not in known:
                problems.append(describe(key, value, cls.UNKNOWN.get(key) or unknown_key(key, [*known, *cls.NEAR])))
            elif value is not None:
                name = cls.ALIASES.get(key, key)
                if isinstance(value, str):
                    value = cls.WORDS.get(name, {}).get(value, value)
                if name in values and values[name] != value:
                    rule = f"is another name of {written[name]}, which says {values[name]!r}; give one of them"
                    problems.append(describe(key, value, rule))
                    continue
                values[name], written[name] = value, key
        return values, written, problems

    @classmethod
    def _settle(cls, values: dict[str, Any], written: Mapping[str, str]) -> list[str]:
        """Puts in ``values`` what they mean together; what is wrong of them whatever the fields say.

        written: the key that each was written under.
        """
        return []

    def _joint_problems(self) -> Iterator[tuple[set[str], str]]:
        """Rules over several keys, on values that each field accepts: the keys involved and what is wrong."""
        return iter(())

    @classmethod
    def ours(cls, mapping: Mapping[Any, Any]) -> dict[str, Any]:
        """The keys of a mapping that begin with one of the prefixes."""
        return {key: value for key, value in mapping.items() if isinstance(key, str) and key.startswith(cls.PREFIXES)}

    @classmethod
    def from_dict(cls: type[Self], mapping: Mapping[str, Any], *, family: str | None = None) -> Self:
        """From the keys of a mapping that have the prefix; all other keys are left alone.

        family: the model's, where settings have values that are recommended for it. ConfigError (a ValueError) lists
        every wrong key.
        """
        if not isinstance(mapping, Mapping):
            raise ConfigError([f"settings must be a mapping of keys to values, not {type(mapping).__name__}"])
        return cls(**cls.ours(mapping))

    @classmethod
    def preset(cls: type[Self], name: str, *, family: str | None = None, **overrides: Any) -> Self:
        """One of `PRESETS`, where there are any; ConfigError for another name."""
        raise ConfigError([f"unknown preset {name!r}: {cls.TITLE} has no presets"])

    @classmethod
    def from_file(cls: type[Self], path: str | Path, *, family: str | None = None) -> Self:
        """From a file of JSON, TOML or YAML, by its suffix; errors begin with its name."""
        values = read_settings(path)
        try:
            return cls.from_dict(values, family=family)
        except ConfigError as error:
            raise ConfigError(error.problems, str(path)) from None

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser, base: Mapping[str, Any] | None = None) -> None:
        """Add one option for each key, in a group of their own.

        Values are read as JSON; what is not JSON is a string; an option without a value means true. Options
        that are not given leave nothing in the namespace. Give the namespace to `from_args`. `base`: values that the
        help shows as defaults.
        """
        keys = [key for each in cls.PREFIXES for key in cls.model_fields if key.startswith(each)]
        cls.add_options(parser.add_argument_group(cls.TITLE), keys, base or {})

    @classmethod
    def add_options(cls, group: argparse._ArgumentGroup, keys: Iterable[str], base: Mapping[str, Any]) -> None:
        """One option for each of the keys, and for each alias and unsupported key, as `add_arguments`."""
        fields = {key: cls.model_fields[key] for key in keys}
        texts = {key: field.description or "" for key, field in fields.items()}
        for key in [key for key, field in fields.items() if not field.is_required()]:
            texts[key] += f" (default: {json.dumps(base.get(key, fields[key].default))})"
        texts |= {alias: f"the same as --{key}" for alias, key in cls.ALIASES.items()}
        texts |= {key: f"{UNSUPPORTED} (accepted: {json.dumps(off)})" for key, off in cls.UNSUPPORTED.items()}
        words = {key for key, field in fields.items() if _is_text(field.annotation)}
        add_json_options(group, texts, words | {alias for alias, key in cls.ALIASES.items() if key in words})

    @classmethod
    def from_args(
        cls: type[Self],
        namespace: argparse.Namespace,
        base: Self | Mapping[str, Any] | None = None,
        *,
        rest: Sequence[str] = (),
        family: str | None = None,
    ) -> Self:
        """From a namespace of `add_arguments`, over `base` (a configuration, or a mapping as of `read_settings`).

        `rest`: what `parser.parse_known_args` did not know; an option in it that begins with the prefix is an
        error that names the nearest one.
        """
        prefixes = tuple(f"--{prefix.rstrip('_')}{end}" for prefix in cls.PREFIXES for end in "_-")
        problems = unknown_options(rest, [*cls.model_fields, *cls.ALIASES], prefixes, cls.UNKNOWN)
        if isinstance(base, Settings):
            base = {key: getattr(base, key) for key in type(base).model_fields if key in base.model_fields_set}
        try:
            config = cls.from_dict(cls.merged(base or {}, cls.ours(vars(namespace))), family=family)
        except ConfigError as error:
            raise ConfigError([*problems, *error.problems]) from None
        if problems:
            raise ConfigError(problems)
        return config

    @classmethod
    def parse_known_args(
        cls: type[Self],
        argv: Sequence[str] | None = None,
        base: Self | Mapping[str, Any] | None = None,
        *,
        family: str | None = None,
    ) -> tuple[Self, list[str]]:
        """The configuration on a command line (default: the process's own), and the words left over."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        cls.add_arguments(parser)
        namespace, rest = parser.parse_known_args(argv)
        return cls.from_args(namespace, base, rest=rest, family=family), rest

    @classmethod
    def merged(cls, base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
        """`overrides` over `base`; what `base` says of the same thing under another key gives way too."""
        same = (*map(frozenset, cls.ALIASES.items()), *cls.SAME)
        superseded = {key for keys in same for key in keys if overrides.keys() & keys}
        return {**{key: value for key, value in base.items() if key not in superseded}, **overrides}

    def replace(self: Self, **overrides: Any) -> Self:
        """A validated copy with other values; `None` puts a key back to its default."""
        return type(self)(**self.merged({key: getattr(self, key) for key in self.model_fields_set}, overrides))

    def model_copy(self: Self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """`replace`: pydantic's own would not validate."""
        return self.replace(**(update or {}))

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, as JSON can hold it; `from_dict` gives the same configuration back."""
        return {key: getattr(self, key) for key in type(self).model_fields}

    @property
    def enabled(self) -> bool:
        """Whether it is switched on."""
        return bool(getattr(self, f"{self.PREFIXES[0]}enabled"))

    @property
    def idle(self) -> str | None:
        """What to say of keys that do nothing because nobody said whether it is on; None where there are none."""
        switch = f"{self.PREFIXES[0]}enabled"
        given = [key for key in type(self).model_fields if key in self.model_fields_set]
        if not given or switch in given:
            return None
        missing = f"neither {switch} nor a preset is given" if self.PRESETS else f"{switch} is not given"
        return f"OFF: {missing}, without which {_without_effect(given)}"

    @property
    def idle_parts(self) -> dict[str, str]:
        """By title, what to say of each part that nobody switched on or off, and whose keys are given."""
        said: dict[str, str] = {}
        for switch, (title, keys) in self.PARTS.items():
            given = [key for key in keys if key in self.model_fields_set]
            if self.enabled and given and switch not in self.model_fields_set:
                said[title] = f"OFF: {switch} is not given, without which {_without_effect(given)}"
        return said


def _without_effect(keys: Sequence[str]) -> str:
    return f"{', '.join(keys)} {'does' if len(keys) == 1 else 'do'} nothing"
