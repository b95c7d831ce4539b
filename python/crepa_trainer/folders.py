"""A run's own folders: whether they can be written, and one run at a time in each output folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .settings import RunSettings

LOCK_FILE = ".run.lock"
METRICS_FILE = "metrics.jsonl"


def check_folders(settings: RunSettings) -> None:
    """ValueError for an output or cache folder that cannot be made or written, before anything is; makes nothing."""
    for key, folder in (("output", settings.output), ("cache", settings.cache_folder)):
        nearest = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
        if not nearest.is_dir():
            raise ValueError(f"{key} = {folder}: {nearest} is not a folder")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise ValueError(f"{key} = {folder}: no permission to write in {nearest}")


@contextmanager
def one_run_in(output: Path) -> Iterator[None]:
    """Makes an output folder and keeps it for this process, which a killed one lets go of too.

    ValueError where it cannot be written, or another process has it, with its number. It is left as it was where
    nothing was put into it.
    """
    try:
        made = not output.exists()
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / LOCK_FILE).open("a+")
    except OSError as error:
        raise ValueError(f"output = {output} cannot be written: {error.strerror}") from error
    with lock:
        try:
            # Not flock, which the loader's workers would go on holding after a kill.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            whose = lock.read().strip() or "another process"
            raise ValueError(f"output = {output}: {whose} is running there; wait for it, or give another") from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} of {os.uname().nodename}\n")
        lock.flush()
        try:
            yield
        finally:
            (output / LOCK_FILE).unlink(missing_ok=True)
            if made:
                with suppress(OSError):
                    output.rmdir()
