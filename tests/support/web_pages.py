"""The web page's server as a process of its own, and the browser that visits it."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# No calls to the browser's maker, whose refusal a closed network would log.
QUIET = ["no-first-run", "disable-background-networking", "disable-component-update", "disable-sync", "disable-quic"]
DESKTOP, PHONE = (1440, 900), (390, 844)


@dataclass(frozen=True)
class Server:
    address: str
    runs: Path
    process: subprocess.Popen[str]


@contextmanager
def page_server(runs: Path, *options: str, folder: Path | None = None) -> Iterator[Server]:
    """`crepa-train ui` on a free port, stopped by SIGTERM at the end. Whatever it was asked, it may not have failed."""
    others = [] if folder is None else ["--folder", str(folder)]
    command = [sys.executable, "-m", "crepa_trainer", "ui", "--runs", str(runs), "--port", "0", *others, *options]
    # A pipe that nobody reads fills up.
    with tempfile.TemporaryFile("w+") as wrong:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=wrong, text=True)
        yield from _served(process, runs)
        wrong.seek(0)
        said = wrong.read()
    assert "Traceback" not in said, said


def _served(process: subprocess.Popen[str], runs: Path) -> Iterator[Server]:
    try:
        assert process.stdout is not None
        address = None
        for line in process.stdout:
            if found := re.search(r"open (http\S+)", line):
                address = found[1]
                break
        assert address is not None, f"the page ended with {process.wait()}"
        yield Server(address, runs, process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
