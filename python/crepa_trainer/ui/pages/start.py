"""The first page: where to go."""

from __future__ import annotations

from nicegui import ui

from ..shell import Page, View


def _build(view: View) -> None:
    ui.label(view.words("Runs are in {folder}").format(folder=view.folders.runs))


PAGE = Page("/", "Home", "home", _build)
