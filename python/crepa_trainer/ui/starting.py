"""Starting runs from files of settings, within the page's folders."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crepa_kernels.config import ConfigError, sources
from crepa_kernels.config.sources import SUFFIXES
from crepa_kernels.regularizer.saving import replacing

from ..control import SETTINGS_FILE, is_running, start
from ..reporting.runs import RunFolder
from .form import Values, check, json_text
from .guard import Folders

_FOLDERS = ("data", "output", "cache")
_MODELS = ("model", "crepa_encoder", "crepa_model")


def settings_files(folders: Folders) -> list[str]:
    """The names of the files of settings in the runs' folder."""
    return sorted(
        path.name
        for path in folders.runs.iterdir()
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    )


def read_settings(folders: Folders, name: str) -> Values:
    """The values of one of them. ValueError where it cannot be read."""
    path = folders.inside_runs(folders.runs / name)
    try:
        return sources.read_settings(path)
    except ConfigError as error:
        raise ValueError(f"{name}: {'; '.join(error.problems)}") from error
    except OSError as error:
        raise ValueError(f"{name}: {error}") from error


def saved_name(name: str) -> str:
    """The file that a page saves under a name: JSON, also of what was read from another format."""
    path = Path(name)
    return str(path.with_suffix(".json")) if path.suffix.lower() in SUFFIXES else f"{name}.json"


def save_settings(folders: Folders, name: str, values: Mapping[str, Any]) -> Path:
    """Writes one of them. ValueError for a name with folders or a hidden one, and where it cannot be written."""
    if not name or Path(name).name != name or name.startswith("."):
        raise ValueError(f"{name}: must be a file name without folders")
    path = folders.inside_runs(folders.runs / name)
    try:
        with replacing(path) as file:
            file.write_text(json_text(values), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{name}: {error}") from error
    return path


def start_run(folders: Folders, name: str, *, queued: bool) -> Path:
    """Starts the run of a file of settings; returns its output folder.

    queued: it waits until no earlier run of the runs' folder is under way. ValueError for settings that
    `crepa-train run` would refuse, for folders outside, or where a run is under way in its output folder.
    """
    values = read_settings(folders, name)
    checked = check(values)
    if not checked.is_usable:
        raise ValueError(f"{name}: {'; '.join([*checked.wrong.values(), *checked.others])}")
    output = check_folders(folders, values)
    return _started(folders, folders.inside_runs(folders.runs / name), output, queued)


def resume_run(folders: Folders, output: Path, *, queued: bool) -> Path:
    """Goes on with the run in an output folder, from its newest checkpoint and by its own settings.

    Their relative paths are those of the folder that it was started in.
    """
    output = folders.inside_runs(output)
    file = output / SETTINGS_FILE
    try:
        values = sources.read_settings(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{output.name} has no {SETTINGS_FILE} that can be read: {error}") from error
    moved = _absolute(values, RunFolder(output).started_in)
    if check_folders(folders, {**values, **moved}) != output:
        raise ValueError(f"{output.name}: its {SETTINGS_FILE} is of another folder, {values['output']}")
    return _started(
        folders, file, output, queued, "--resume", "latest", *(f"--{key}={path}" for key, path in moved.items())
    )


def _absolute(values: Mapping[str, Any], folder: Path) -> Values:
    """Those of a run's settings that are paths from `folder` on, as absolute ones."""
    paths = {key: values.get(key) for key in (*_FOLDERS, *_MODELS)}
    relative = {key: path for key, path in paths.items() if isinstance(path, str) and path and path[0] not in "~/"}
    return {
        key: str(folder / path)
        for key, path in relative.items()
        # A hub id is no folder, nor is a name of an encoder.
        if key in _FOLDERS or (folder / path).exists()
    }


def _started(folders: Folders, file: Path, output: Path, queued: bool, *options: str) -> Path:
    if is_running(output):
        raise ValueError(f"{output.name}: a run is under way there")
    queue = ["--queue", str(folders.runs)] if queued else []
    start(["--config", str(file), *queue, *options], output)
    return output


def check_folders(folders: Folders, values: Mapping[str, Any]) -> Path:
    """The output folder of settings. ValueError where one of their folders is outside those of the page."""
    for key in ("data", "cache"):
        if isinstance(values.get(key), str):
            folders.inside(values[key])
    for key in (*_MODELS, "resume"):
        value = values.get(key)
        # A hub id is no folder, nor is a name of an encoder.
        if isinstance(value, str) and (Path(value).expanduser().exists() or Path(value).is_absolute()):
            folders.inside(value)
    output = values.get("output")
    if not isinstance(output, str) or not output:
        raise ValueError("output: a folder is needed")
    return folders.inside_runs(output)


def make_pair(folders: Folders, name: str) -> tuple[str, str]:
    """Two files of settings that differ in CREPA alone, and share what is encoded; their names.

    ValueError where CREPA is not on in the file, or the files are there already.
    """
    values = read_settings(folders, name)
    stem = saved_name(name).removesuffix(".json")
    if not (values.get("crepa_enabled") is True or (values.get("preset") and values.get("crepa_enabled") is not False)):
        raise ValueError(f"{name}: CREPA is not on in it")
    output = values.get("output")
    if not isinstance(output, str):
        raise ValueError(f"{name}: output: {json.dumps(output)} is no folder")
    names = f"{stem}-with.json", f"{stem}-without.json"
    for each in names:
        if (folders.runs / each).exists():
            raise ValueError(f"{each} is there already")
    shared = {"cache": values.get("cache") or f"{output}-cache"}
    save_settings(folders, names[0], {**values, **shared, "output": f"{output}-with"})
    # The preset says that CREPA is on, and is of no other use without it.
    without = {key: value for key, value in values.items() if key != "preset" and not key.startswith("irepa_")}
    without = {key: value for key, value in without.items() if not key.startswith("crepa_")}
    save_settings(folders, names[1], {**without, **shared, "output": f"{output}-without", "crepa_enabled": False})
    return names


async def export_run(output: Path, form: str) -> str:
    """Exports the newest checkpoint of a run in a process of its own; the line that it ends with.

    ValueError with its error.
    """
    said = await _said("export", str(output), "--format", form)
    return said.splitlines()[-1] if said else ""


async def plan_rows(folders: Folders, name: str) -> list[tuple[str, str]]:
    """The plan of a file of settings, made in a process of its own: names and values. ValueError with its error."""
    check_folders(folders, read_settings(folders, name))
    # Another process may have logged something above it.
    rows = json.loads((await _said("run", "--config", str(folders.runs / name), "--json")).splitlines()[-1])
    return [(str(key), str(value)) for key, value in rows]


async def _said(*words: str) -> str:
    """What a crepa-train command printed. ValueError with the last line of its errors where it failed."""
    pipe = asyncio.subprocess.PIPE
    command = [sys.executable, "-m", "crepa_trainer", *words]
    process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe)
    said, wrong = (each.decode("utf-8", "replace").strip() for each in await process.communicate())
    if process.returncode:
        line = wrong.splitlines()[-1] if wrong else f"crepa-train {words[0]} ended with {process.returncode}"
        raise ValueError(line.removeprefix("crepa-train: error: "))
    return said
