"""The pages, in the order of the navigation."""

from __future__ import annotations

from ..shell import Page
from . import new_run, start

PAGES: list[Page] = [start.PAGE, new_run.PAGE]
