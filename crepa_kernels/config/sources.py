"""Where settings read their keys from: a JSON file, a command line."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .rules import ConfigError, nearest


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError with the file's name: not JSON, not an object, a key twice.

    FileNotFoundError for one that is not there, with the nearest name beside it.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file{_similar(Path(path))}")
    if Path(path).is_dir():
        raise ConfigError(["is a folder, not a file of settings"], str(path))
    if Path(path).suffix.lower() in (".yaml", ".yml", ".toml"):
        raise ConfigError([f"settings are read from JSON, not from {Path(path).suffix} files"], str(path))
    try:
        loaded = json.loads(Path(path).read_bytes().decode("utf-8-sig"), object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError([f"not JSON: {error}"], str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"not JSON: not UTF-8 text: {error}"], str(path)) from None
    except RecursionError:
        raise ConfigError(["not usable: nested too deeply"], str(path)) from None
    except ValueError as error:
        raise ConfigError([str(error)], str(path)) from None
    if not isinstance(loaded, dict):
        raise ConfigError([f"must hold one JSON object, not {type(loaded).__name__}"], str(path))
    return loaded


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
