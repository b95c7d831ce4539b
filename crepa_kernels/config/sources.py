"""Where settings read their keys from: a file of JSON, TOML or YAML, a command line."""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import re
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .rules import ConfigError, nearest

_FORMATS = {".json": "JSON", ".toml": "TOML", ".yaml": "YAML", ".yml": "YAML"}
SUFFIXES = tuple(_FORMATS)  # of files of settings
_SHOWN = 80  # characters of a line that is wrong


def read_settings(path: str | Path) -> dict[str, Any]:
    """The keys and values in a file: TOML or YAML where it ends in .toml, .yaml or .yml, else JSON.

    ValueError with the file's name, and the line where one is wrong: not of its format, not one mapping of keys to
    values, a key twice. FileNotFoundError for one that is not there, with the nearest name beside it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file{_similar(path)}")
    if path.is_dir():
        raise ConfigError(["is a folder, not a file of settings"], str(path))
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError([f"not {_format(path.suffix)}: not UTF-8 text: {error}"], str(path)) from None
    try:
        return parse_settings(text, path.suffix)
    except ValueError as error:
        raise ConfigError([str(error)], str(path)) from None


def parse_settings(text: str, suffix: str = ".json") -> dict[str, Any]:
    """As `read_settings`, of a file's text."""
    kind = _format(suffix)
    try:
        loaded = _PARSERS[kind](text)
    except RecursionError:
        raise ValueError("not usable: nested too deeply") from None
    except ValueError as error:
        problem = str(error)
        if problem.startswith("Exceeds the limit"):  # Python's own words advise a change of Python
            problem = f"a number has more than {sys.get_int_max_str_digits()} digits"
        raise ValueError(f"{problem}{_quoted_line(problem, text)}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"must hold one {kind} object, not {type(loaded).__name__}")
    return loaded


def _format(suffix: str) -> str:
    return _FORMATS.get(suffix.lower(), "JSON")


def _from_json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None


def _from_toml(text: str) -> Any:
    toml = _needed("tomllib" if sys.version_info >= (3, 11) else "tomli", "TOML")
    try:
        return toml.loads(text)
    except toml.TOMLDecodeError as error:
        raise ValueError(f"not TOML: {error}") from None


def _from_yaml(text: str) -> Any:
    yaml = _needed("yaml", "YAML", "pyyaml")
    from .yaml_core import CoreLoader

    try:
        return yaml.load(text, CoreLoader)
    except yaml.MarkedYAMLError as error:
        mark, parsed = error.problem_mark, isinstance(error, yaml.constructor.ConstructorError)
        where = f"line {mark.line + 1} column {mark.column + 1}"
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise ValueError(f"{'' if parsed else 'not YAML: '}{problem}: {where}") from None
    except yaml.reader.ReaderError as error:
        place = f"line {text.count(chr(10), 0, error.position) + 1}"
        raise ValueError(f"not YAML: character U+{error.character:04X} is not allowed: {place}") from None


_PARSERS: Mapping[str, Callable[[str], Any]] = MappingProxyType(
    {"JSON": _from_json, "TOML": _from_toml, "YAML": _from_yaml}
)


def _needed(module: str, kind: str, package: str | None = None) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise ValueError(f"{kind} cannot be read here: pip install {package or module}") from None


def _quoted_line(problem: str, text: str) -> str:
    """The line that a parser's error names, whose key it does not."""
    found = re.search(r"line (\d+)", problem)
    lines = text.splitlines()
    if found is None or not 1 <= int(found[1]) <= len(lines):
        return ""
    return f": {lines[int(found[1]) - 1].strip()[:_SHOWN]}"


def _similar(path: Path) -> str:
    """A hint at the file beside it whose name is nearest."""
    beside = [each.name for each in path.parent.iterdir() if each.is_file()] if path.parent.is_dir() else []
    match = difflib.get_close_matches(path.name, beside, n=1)
    return f"; did you mean {path.with_name(match[0])}?" if match else ""


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = ", ".join(key for key in found if keys.count(key) > 1)
        raise ValueError(f"each key may appear once; repeated: {repeated}")
    return found


def add_json_options(group: argparse._ArgumentGroup, texts: Mapping[str, str], words: Container[str] = ()) -> None:
    """One option for each key, with its help.

    Values are read as JSON; what is not JSON is a string, and for keys of `words` what is another thing than text
    too, so that a folder may be named 2024; an option without a value means true.
    """
    for key, text in texts.items():
        group.add_argument(
            f"--{key}",
            nargs="?",
            const=True,
            type=_word if key in words else _json_or_word,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=text.replace("%", "%%"),
        )


def _json_or_word(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _word(text: str) -> Any:
    value = _json_or_word(text)
    return value if value is None or isinstance(value, str) else text


def unknown_options(
    words: Iterable[str],
    known: Iterable[str],
    prefixes: tuple[str, ...],
    others: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """A line for each word that begins as an option: what `others` says of its key, or the nearest one of `known`."""
    problems, choices = [], list(known)
    for word in words:
        if word.startswith(prefixes):
            option = word.split("=", 1)[0]
            if said := others.get(option.lstrip("-").replace("-", "_")):
                problems.append(f"{option}: {said}")
                continue
            match = nearest(option[2:], choices)
            problems.append(f"{option}: unknown option" + (f"; did you mean --{match}?" if match else ""))
    return problems
