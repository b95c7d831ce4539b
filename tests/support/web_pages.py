"""The web page's server as a process of its own, and the browser that visits it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from huggingface_hub import constants
from processes import begin

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# No calls to the browser's maker, whose refusal a closed network would log.
QUIET = ["no-first-run", "disable-background-networking", "disable-component-update", "disable-sync", "disable-quic"]
DESKTOP, PHONE = (1440, 900), (390, 844)
SECONDS = 180  # that a run, which imports torch and diffusers first, may take to come to something


@dataclass(frozen=True)
class Server:
    address: str
    runs: Path
    process: BaseProcess


def _serve(words: Sequence[str]) -> None:
    from crepa_trainer.cli import main

    # Read where the library was imported, which was before the fork.
    constants.HF_HUB_CACHE = os.environ.get("HF_HUB_CACHE", constants.HF_HUB_CACHE)
    sys.exit(main(words))


@contextmanager
def page_server(runs: Path, *options: str, folder: Path | None = None) -> Iterator[Server]:
    """`crepa-train ui` on a free port, stopped by SIGTERM at the end. Whatever it was asked, it may not have failed."""
    others = [] if folder is None else ["--folder", str(folder)]
    with tempfile.NamedTemporaryFile("r") as said:
        process = begin(_serve, ["ui", "--runs", str(runs), "--port", "0", *others, *options], log=Path(said.name))
        try:
            address = None
            while address is None:
                alive = process.is_alive()
                said.seek(0)
                address = re.search(r"open (http\S+)", text := said.read())
                assert address or alive, f"the page ended with {process.exitcode}: {text}"
                time.sleep(0.05)
            yield Server(address[1], runs, process)
        finally:
            process.terminate()
            process.join(20)
            process.kill()
        said.seek(0)
        assert "Traceback" not in (text := said.read()), text


def end_runs(runs: Path) -> None:
    """Kills what still runs in a folder of runs: they outlive the page that started them."""
    for lock in runs.rglob(".run.lock"):
        with suppress(OSError, IndexError, ValueError):
            os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)


def wait(ready: Callable[[], object]) -> None:
    """Until it is so."""
    end = time.monotonic() + SECONDS
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.1)
