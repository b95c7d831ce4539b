"""The first page: where runs are, and where to go."""

from __future__ import annotations

from nicegui import ui

from ..shelf import all_runs
from ..shell import Page, View


def _build(view: View) -> None:
    words = view.words
    ui.label(words("Runs are in {folder}").format(folder=view.folders.runs))
    ui.label(words("A run goes on when this page ends."))
    with ui.row():
        ui.button(words("New run"), icon="add_circle", on_click=lambda: ui.navigate.to("/new"))
        runs = f"{words('Runs')} ({len(all_runs(view.folders))})"
        ui.button(runs, icon="playlist_play", on_click=lambda: ui.navigate.to("/runs")).props("outline")


PAGE = Page("/", "Home", "home", _build)
