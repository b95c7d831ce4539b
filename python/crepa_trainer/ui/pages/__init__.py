"""The pages, in the order of the navigation."""

from __future__ import annotations

from ..shell import Page
from . import start

PAGES: list[Page] = [start.PAGE]
