"""Functions in processes of their own that begin with the libraries imported: forks of one that did nothing else.

Importing torch, diffusers and the rest takes longer than most of what such a process then does. What is about how a
process starts (torchrun, accelerate, the command line) starts a fresh interpreter instead.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
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


def _child(
    function: Callable[..., None], arguments: tuple[Any, ...], given: Mapping[str, str], out: str, err: str
) -> None:
    os.environ.clear()
    os.environ.update(given)
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    gc.freeze()  # what the server imported stays: no collection of garbage need look through it
    # Its own children begin as those of any other program, and are its own.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    function(*arguments)


def _ranks(number: int) -> Iterator[dict[str, str]]:
    """What torchrun has in the environment of each of ``number`` processes of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for rank in map(str, range(number)):
        sizes = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
        yield {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **sizes}


def begin(function: Callable[..., None], *arguments: Any, log: Path) -> BaseProcess:
    """Begins ``function(*arguments)`` elsewhere and waits for nothing; what it prints is added to ``log``."""
    _start_server()
    child = _context.Process(target=_child, args=(function, arguments, environment(), str(log), str(log)))
    child.start()
    return child


def run(
    function: Callable[..., None], *arguments: Any, ranks: int = 1, timeout: float = 300, without: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """``function(*arguments)`` elsewhere, both importable there; its exit status and what it printed.

    With several ``ranks`` it runs as often side by side; the first that fails ends the others, and its is the status.

    Raises:
        subprocess.TimeoutExpired: after ``timeout`` seconds; all are killed then.
    """
    _start_server()
    given = {name: value for name, value in environment().items() if name not in without}
    each = [{**given, **rank} for rank in _ranks(ranks)] if ranks > 1 else [given]
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        children = [
            _context.Process(
                target=_child, args=(function, arguments, variables, f"{folder}/{rank}.out", f"{folder}/{rank}.err")
            )
            for rank, variables in enumerate(each)
        ]
        files = [f"{folder}/{rank}.{name}" for rank in range(ranks) for name in ("out", "err")]
        for file in files:
            Path(file).touch()
        for child in children:
            child.start()
        while any(child.exitcode is None for child in children) and not any(child.exitcode for child in children):
            wait(
                [child.sentinel for child in children if child.exitcode is None], max(0.0, deadline - time.monotonic())
            )
            if time.monotonic() > deadline:
                break
        running = [child for child in children if child.exitcode is None]
        status = next((child.exitcode for child in children if child.exitcode), 0)
        for child in running:
            child.kill()
            child.join()
        if running and not status:
            raise subprocess.TimeoutExpired(function.__name__, timeout)
        said = [
            "".join(Path(f"{folder}/{rank}.{name}").read_text() for rank in range(ranks)) for name in ("out", "err")
        ]
    return subprocess.CompletedProcess(function.__name__, status, *said)
