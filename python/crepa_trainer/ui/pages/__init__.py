"""The pages, in the order of the navigation."""

from __future__ import annotations

from ..shell import Page
from . import clips, compare, new_run, plan, runs, start, watch

PAGES: list[Page] = [start.PAGE, new_run.PAGE, plan.PAGE, clips.PAGE, runs.PAGE, watch.PAGE, compare.PAGE]
