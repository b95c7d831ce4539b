"""Functions in processes of their own that begin with the libraries imported: forks of one that did nothing else.

Importing torch, diffusers and the rest takes longer than most of what such a process then does. What is about how a
process starts (torchrun, accelerate, the command line) starts a fresh interpreter instead.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["training_runs", "compiled"])


def environment() -> dict[str, str]:
    """In which a process finds the packages and the tests' helpers, and leaves the other core alone."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def _start_server() -> None:
    before = dict(os.environ)
    os.environ.update(environment())
    # The server compiles kernels and has no use for their interpreter.
    os.environ.pop("TRITON_INTERPRET", None)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _child(function: Callable[..., None], arguments: tuple[Any, ...], given: Mapping[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(given)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    function(*arguments)


def run(
    function: Callable[..., None], *arguments: Any, timeout: float = 300, without: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """``function(*arguments)`` elsewhere, both importable there; its exit status and what it printed.

    Raises:
        subprocess.TimeoutExpired: after ``timeout`` seconds; it is killed then.
    """
    _start_server()
    given = {name: value for name, value in environment().items() if name not in without}
    with tempfile.TemporaryDirectory() as folder:
        process = _context.Process(target=_child, args=(function, arguments, given, folder))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(function.__name__, timeout)
        said = [(Path(folder) / name).read_text() for name in ("out", "err")]
    return subprocess.CompletedProcess(function.__name__, process.exitcode, *said)
