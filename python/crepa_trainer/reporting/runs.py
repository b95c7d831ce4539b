"""A run's folder as whoever watches it reads it: whatever is there, half written, damaged or of another version."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from ..control import ENDED, LOG_FILE, RUN_FILE, SETTINGS_FILE, STATUS_FILE, is_running
from ..folders import METRICS_FILE

KILLED = "killed"  # shown of a run whose process is gone and did not say how it ended
_LOG_END = 20_000  # bytes of run.log
_CHUNK = 2**20  # bytes of metrics.jsonl that are held at a time
_LOGGED = (int, float, type(None))
_ABSENT = ""  # no number, as whatever else stands where one should
_MOST = 2**53  # of integers, beyond which a float is another number


@dataclass(frozen=True)
class RunState:
    """What a run is doing. phase: as status.json says, `KILLED`, or "" where nobody knows."""

    phase: str
    step: int
    total: int
    time: float
    detail: str
    error: str | None
    running: bool


@dataclass(frozen=True)
class Sample:
    """A clip of a validation. Files are in the run's folder."""

    step: int
    prompt: str
    seed: int
    video: Path
    strip: Path


@dataclass(frozen=True)
class Look:
    """A similarity matrix (T, S) of one clip at a step, and where the picture of its patches is."""

    step: int
    clip: str
    matrix: tuple[tuple[float, ...], ...]
    patches: Path | None


class RunFolder:
    """One run's output folder. Nothing in it is trusted, and nothing missing is an error.

    The metrics are kept between calls of `metrics`, and only what was added is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics = Metrics(path / METRICS_FILE)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def exists(self) -> bool:
        """Whether a run was ever in the folder."""
        return _is_run(self.path)

    @classmethod
    def found_in(cls, folder: Path, depth: int = 3) -> list[RunFolder]:
        """The runs below a folder, newest first; links are not followed."""
        found = [cls(path) for path in _folders(folder, depth) if _is_run(path)]
        return sorted(found, key=lambda run: -run.changed)

    @property
    def changed(self) -> float:
        """When it last said something, in seconds since 1970."""
        times = [_modified(self.path / name) for name in (STATUS_FILE, METRICS_FILE, LOG_FILE)]
        return max(times)

    def state(self) -> RunState:
        """What it is doing now."""
        said = _read_object(self.path / STATUS_FILE)
        running = is_running(self.path)
        phase = _text(said.get("phase"))
        if not running and phase not in ENDED:
            # An older version said nothing, however its runs ended.
            phase = KILLED if (self.path / STATUS_FILE).exists() else ""
        return RunState(
            phase,
            _whole(said.get("step")),
            _whole(said.get("total")) or _whole(self.about().get("total")),
            _number(said.get("time"), self.changed),
            _text(said.get("detail")),
            _text(said.get("error")) or None,
            running,
        )

    def settings(self) -> dict[str, Any]:
        """The settings that were given."""
        return _read_object(self.path / SETTINGS_FILE)

    def about(self) -> dict[str, Any]:
        """The model's family, versions, when it started and in which folder."""
        return _read_object(self.path / RUN_FILE)

    @property
    def started_in(self) -> Path:
        """The folder from which relative paths of its settings go on: this process's own where none is known."""
        said = _text(self.about().get("folder"))
        return Path(said) if said and Path(said).is_dir() else Path.cwd()

    def metrics(self) -> Metrics:
        """What was logged so far."""
        self._metrics.read()
        return self._metrics

    def samples(self) -> list[Sample]:
        """Of every validation, in the order of steps and prompts."""
        return list(self._samples())

    def _samples(self) -> Iterator[Sample]:
        for step, folder in _steps(self.path / "validation", ""):
            rows = _read_json(folder / "samples.json")
            for row in rows if isinstance(rows, list) else []:
                if not isinstance(row, dict):
                    continue
                # A name from a file: never out of its folder.
                video, strip = (folder / Path(_text(row.get(name))).name for name in ("file", "strip"))
                if video.is_file() and strip.is_file():
                    yield Sample(step, _text(row.get("prompt")), _whole(row.get("seed")), video, strip)

    def looks(self) -> list[Look]:
        """Every similarity matrix that was kept, in the order of steps."""
        return list(self._looks())

    def _looks(self) -> Iterator[Look]:
        for step, file in _steps(self.path / "looks", ".json"):
            said = _read_object(file)
            rows = said.get("matrix")
            if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
                continue
            matrix = tuple(tuple(_number(value, math.nan) for value in row) for row in rows)
            if len({len(row) for row in matrix}) == 1:
                patches = file.with_suffix(".png")
                yield Look(step, _text(said.get("clip")), matrix, patches if patches.is_file() else None)

    def checkpoints(self) -> list[int]:
        """The steps of those that are there."""
        return [step for step, _ in _steps(self.path / "checkpoints", "")]

    def log(self) -> str:
        """The end of what a detached run printed."""
        try:
            with (self.path / LOG_FILE).open("rb") as file:
                file.seek(max(0, (self.path / LOG_FILE).stat().st_size - _LOG_END))
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""


@dataclass
class Metrics:
    """The columns of metrics.jsonl: by name (steps, values), NaN where a number was not finite.

    A file that was cut back and went on, as a resumed run does, is read anew.
    """

    path: Path
    columns: dict[str, tuple[array[float], array[float]]] = field(default_factory=dict)
    _end: int = 0
    _last: bytes = b""

    def read(self) -> None:
        """Takes in the whole lines that were added since the last call."""
        try:
            with self.path.open("rb") as file:
                if self._end and not self._still_there(file):
                    self.columns, self._end, self._last = {}, 0, b""
                file.seek(self._end)
                while lines := file.readlines(_CHUNK):
                    whole = [line for line in lines if line.endswith(b"\n")]
                    if whole:
                        self._end += sum(map(len, whole))
                        self._last = whole[-1]
                        self._take([row for line in whole if (row := _row(line)) is not None])
                    if len(whole) < len(lines):  # one that is being written
                        break
        except OSError:
            return

    def _still_there(self, file: Any) -> bool:
        file.seek(self._end - len(self._last))
        return bool(file.read(len(self._last)) == self._last)

    def _take(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Column by column: a number at a time would take most of a long file's time."""
        steps = [row["step"] for row in rows]
        for name in dict.fromkeys(chain.from_iterable(rows)):
            if name == "step":
                continue
            at, values = steps, [row.get(name, _ABSENT) for row in rows]
            if not set(map(type, values)) <= {float} or not all(map(math.isfinite, values)):
                kept = [pair for pair in zip(steps, values, strict=True) if isinstance(pair[1], _LOGGED)]
                at, values = [step for step, _ in kept], [_number(value, math.nan) for _, value in kept]
            if at:
                column = self.columns.setdefault(name, (array("d"), array("d")))
                column[0].extend(at)
                column[1].extend(values)

    def last(self, name: str) -> float | None:
        """The newest value of a column."""
        column = self.columns.get(name)
        return column[1][-1] if column else None

    def seconds_left(self, done: int, total: int) -> float | None:
        """By the median of the last steps, None where nobody knows."""
        _, seconds = self.columns.get("seconds", ((), ()))
        recent = sorted(value for value in seconds[-50:] if math.isfinite(value))
        return recent[len(recent) // 2] * max(0, total - done) if recent else None


def _row(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl, None where it is none."""
    try:
        row = from_json(line, cache_strings="keys")  # a fourth of json's time
    except ValueError:
        return None
    return row if isinstance(row, dict) and _is_whole(row.get("step")) else None


def differing(settings: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """The keys whose values are not the same in all of several settings, with each one's value (None: not given)."""
    keys = dict.fromkeys(key for each in settings for key in each)
    rows = [(key, [each.get(key) for each in settings]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (STATUS_FILE, METRICS_FILE, LOG_FILE))


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    try:
        found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return
    for path in found:
        if path.name.startswith("."):
            continue
        yield path
        if depth > 1 and not _is_run(path):
            yield from _folders(path, depth - 1)


def _steps(folder: Path, suffix: str) -> list[tuple[int, Path]]:
    """What is called step-N in a folder, by N."""
    found = []
    for path in folder.glob(f"step-*{suffix}"):
        number = path.name.removeprefix("step-").removesuffix(suffix)
        if number.isdecimal() and len(number) < 16:
            found.append((int(number), path))
    return sorted(found)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _read_object(path: Path) -> dict[str, Any]:
    found = _read_json(path)
    return found if isinstance(found, dict) else {}


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MOST


def _whole(value: Any) -> int:
    return value if _is_whole(value) else 0


def _number(value: Any, otherwise: float) -> float:
    is_number = isinstance(value, float) and math.isfinite(value)
    return float(value) if is_number or _is_whole(value) else otherwise
