"""A run's files for whoever watches and steers it: what it is, what it is doing, what it is asked, whose turn it is."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from crepa_kernels.regularizer.saving import replacing

from .folders import LOCK_FILE
from .stopping import Stopped

Command = Literal["save", "sample", "stop"]
COMMANDS: tuple[Command, ...] = ("save", "sample", "stop")
RUN_FILE, STATUS_FILE, SETTINGS_FILE, LOG_FILE = "run.json", "status.json", "settings.json", "run.log"
CONTROL, QUEUE = "control", ".queue"
FORMAT = 1
ENDED = ("done", "stopped", "failed")
_LOOK, _TELL = 0.5, 1.0  # seconds between looks at what is asked, and between two steps' states
# struct flock of Linux: type, whence, start, length, process.
_FLOCK = "hhqqi"


class RunControl:
    """The run's side: it keeps status.json, and takes what is asked of it from control/.

    As a context manager it says how the run ended. Of several processes the first alone does anything. Nothing is
    written before it waits or is described: settings that cannot be used leave no trace, but where run.log is there,
    since somebody looks at it.
    """

    def __init__(self, output: Path, total: int, *, first: bool = True) -> None:
        self.output, self.first = output, first
        self._status: dict[str, Any] = {"format": FORMAT, "phase": "loading", "step": 0, "total": total}
        self._status |= {"detail": "", "error": None}
        self._told = 0.0
        self._shown = first and (output / LOG_FILE).exists()
        self._asked: set[Command] = set()
        self._ended = threading.Event()

    def __enter__(self) -> RunControl:
        if self.first:
            for command in COMMANDS:  # asked of an earlier run
                (self.output / CONTROL / command).unlink(missing_ok=True)
            self.phase("loading")
            threading.Thread(target=self._look, name="control", daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: object) -> None:
        self._ended.set()
        if error is None:
            self.phase("done")
        elif isinstance(error, Stopped | KeyboardInterrupt):
            self.phase("stopped", error.line if isinstance(error, Stopped) else "")
        else:
            self._status["error"] = " ".join(f"{error}".split()) or type(error).__name__
            self.phase("failed")

    def describe(self, settings: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Writes settings.json, which `--config` reads, and run.json."""
        if not self.first:
            return
        self._shown = True
        _write(self.output / SETTINGS_FILE, settings)
        # From where relative paths of the settings go on.
        where = {"format": FORMAT, "total": self._status["total"], "started": time.time(), "folder": os.getcwd()}
        about = {**where, **about}
        _write(self.output / RUN_FILE, about)

    def phase(self, name: str, detail: str = "") -> None:
        """What the run does from now on, one of the words of docs/training.md, and a line about it."""
        self._status |= {"phase": name, "detail": detail}
        self._shown |= self.first and name == "waiting"
        self._tell()

    def step(self, done: int) -> None:
        """That so many optimizer steps are done; told once a second at most."""
        self._status["step"] = done
        if self._status["phase"] != "training" or time.monotonic() - self._told >= _TELL:
            self.phase("training")

    def take(self) -> set[Command]:
        """What was asked for since the last call, but a stop, which comes as SIGTERM does."""
        # One command cannot be lost in between: the other thread only adds.
        asked = set(self._asked)
        self._asked -= asked
        return asked

    def _tell(self) -> None:
        if not self._shown:
            return
        self._told = time.monotonic()
        with suppress(OSError):  # a full disk stops checkpoints, and they say so
            _write(self.output / STATUS_FILE, {**self._status, "time": time.time()})

    def _look(self) -> None:
        while not self._ended.wait(_LOOK):
            for command in COMMANDS:
                try:
                    (self.output / CONTROL / command).unlink()
                except OSError:
                    continue
                if command == "stop":
                    os.kill(os.getpid(), signal.SIGTERM)
                else:
                    self._asked.add(command)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    with replacing(path) as file:
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def is_running(output: Path) -> bool:
    """Whether a process of this machine has the run's folder. The folder is left as it is, its lock too."""
    return _is_locked(output / LOCK_FILE)


def _is_locked(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            found = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    except OSError:
        return False
    return bool(found[0] != fcntl.F_UNLCK)


def ask(output: Path, command: Command) -> str:
    """Asks a run for something; returns a line that says what will come of it.

    ValueError for a folder in which no run is, or is running.
    """
    if command not in COMMANDS:
        raise ValueError(f"command {command}: must be one of {', '.join(COMMANDS)}")
    if not (output / STATUS_FILE).is_file():
        raise ValueError(f"{output} is no run's output folder")
    if not is_running(output):
        raise ValueError(f"{output}: no run is under way there")
    (output / CONTROL).mkdir(exist_ok=True)
    (output / CONTROL / command).touch()
    what = {"save": "a checkpoint", "sample": "a clip of each validation prompt", "stop": "a checkpoint, and its end"}
    return f"{output}: {what[command]} after the step that it is at"


def start(options: Sequence[str], output: Path) -> int:
    """Starts `crepa-train run` with these options as a process that outlives this one; returns its number.

    What it prints goes to run.log in `output`, behind what is there.
    """
    output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "crepa_trainer", "run", *options]
    with (output / LOG_FILE).open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    # Its end is read, so that it is no zombie while this process lives.
    threading.Thread(target=process.wait, daemon=True).start()
    return process.pid


@contextmanager
def turn(runs: Path | None, waits: Callable[[int], None]) -> Iterator[None]:
    """Waits until no run that came earlier has a place in the queue of `runs`, and keeps the place for the block.

    None waits for nobody. waits: called with the number of runs before this one, whenever it changes.
    A killed process lets go of its place. ValueError where the queue cannot be written.
    """
    if runs is None:
        yield
        return
    queue = runs / QUEUE
    ticket = queue / f"{time.time_ns():020d}-{os.getpid()}"
    try:
        queue.mkdir(parents=True, exist_ok=True)
        file = ticket.open("x")
    except OSError as error:
        raise ValueError(f"--queue {runs}: {error.strerror}") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
            before = None
            while (now := len(places(runs, ticket.name))) > 0:
                if now != before:
                    waits(now)
                before = now
                time.sleep(_LOOK)
            yield
        finally:
            ticket.unlink(missing_ok=True)


def places(runs: Path, before: str | None = None) -> list[str]:
    """The tickets of a queue that living processes hold, the first one first; those before one of them."""
    # Its own ticket a process must not open again: closing it would let go of the lock.
    names = sorted(path.name for path in (runs / QUEUE).glob("*-*"))
    earlier = [name for name in names if before is None or name < before]
    return [name for name in earlier if _is_locked(runs / QUEUE / name)]
