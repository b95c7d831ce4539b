"""Text of users (names of files, captions, settings) as it is shown: nothing in it moves the cursor or hides a part."""

from __future__ import annotations

import logging
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Marks that show what follows in another order than it is written.
_ORDER = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# Controls, halves of pairs (bytes of a name that are no UTF-8), and ends of lines and paragraphs.
_UNSHOWN = frozenset({"Cc", "Cs", "Zl", "Zp"})


def plain(text: str, keep: str = "") -> str:
    """`text` with escapes, as in Python, for what is not in `keep` and would act on a terminal, unseen."""
    return "".join(
        letter.encode("unicode_escape").decode()
        if (letter in _ORDER or unicodedata.category(letter) in _UNSHOWN) and letter not in keep
        else letter
        for letter in text
    )


def several(number: int, thing: str, plural: str = "s") -> str:
    """A number of things in words: "1 clip", "1,024 clips"."""
    return f"{number:,} {thing}{plural * (number != 1)}"


def say(console: Console, line: str) -> None:
    """One line, neither broken nor colored."""
    console.print(plain(line), highlight=False, markup=False, soft_wrap=True)


class PlainFormatter(logging.Formatter):
    """Log lines in plain text: one line each of loggers below `ours`; tracebacks and others' messages keep theirs."""

    def __init__(self, ours: tuple[str, ...]) -> None:
        super().__init__("%(message)s")
        self.ours = ours

    def formatMessage(self, record: logging.LogRecord) -> str:
        return plain(super().formatMessage(record), "" if record.name.startswith(self.ours) else "\n\t")
