"""SIGINT and SIGTERM: the step ends and a checkpoint is written; a second one stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(SystemExit):
    """A command that a signal stopped: the exit status as shells have it, 130 or 143, and a line for the user."""

    def __init__(self, number: int, how: str) -> None:
        super().__init__(128 + number)
        self.number, self.status = number, 128 + number
        self.line = f"stopped by {signal.Signals(number).name}{how}"


class StopAsked:
    """`number`: of the signal that asks for a stop, None before it."""

    number: int | None = None


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """The first signal in the block raises `Stopped` in the main thread, the next stops the process at once."""

    def stop(number: int, _: Any) -> None:
        _die_of_the_next()
        raise Stopped(number, ": go on with --resume latest; what is encoded and every checkpoint are kept")

    with _handled_by(stop):
        yield


@contextmanager
def stop_kept(told: Callable[[str], None] = lambda line: None) -> Iterator[StopAsked]:
    """The first signal in the block is only kept, for when a step ends; the next stops the process at once.

    told: called at once, in another thread, with a line for the user that says so.
    """
    asked = StopAsked()

    def keep(number: int, _: Any) -> None:
        _die_of_the_next()
        asked.number = number
        line = f"{signal.Signals(number).name}: stopping after this step, with a checkpoint; once more stops at once"
        # The handler may have come into the middle of another line, and nothing is written into that.
        threading.Thread(target=told, args=(line,), daemon=True).start()

    with _handled_by(keep):
        yield asked


def leave_signals_to_the_trainer(worker: int) -> None:
    """For a loader's worker: a terminal's and a scheduler's signals go to it too, and training must outlive them.

    It ends with the training process, or by a second SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _die_of_the_next() -> None:
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_DFL)


@contextmanager
def _handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    # Python lets the main thread alone have handlers; elsewhere signals are the surrounding program's.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, handler) for each in _SIGNALS}
    try:
        yield
    finally:
        for each, old in before.items():
            signal.signal(each, old)
