"""The pages, in the order of the navigation."""

from __future__ import annotations

from ..shell import Page
from . import compare, new_run, runs, start, watch

PAGES: list[Page] = [start.PAGE, new_run.PAGE, runs.PAGE, watch.PAGE, compare.PAGE]
