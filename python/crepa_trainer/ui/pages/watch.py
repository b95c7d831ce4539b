"""Watch: one run's curves, samples and matrices as they come."""

from __future__ import annotations

from nicegui import ui

from ..curves import EVERY, Gallery, LiveCurves, Matrices
from ..shelf import all_runs, name_of
from ..shell import Page, View


def _build(view: View) -> None:
    words = view.words
    runs = all_runs(view.folders)
    if not runs:
        ui.label(words("No run yet: make one under New run."))
        return
    name = view.choose(words("Run"), [name_of(view.folders, run) for run in runs], "run")
    run = next((run for run in runs if name_of(view.folders, run) == name), runs[0])
    now = ui.label().props("role=status")

    def tell() -> None:
        state = run.state()
        parts = [
            words(state.phase),
            f"{state.step} / {state.total}" if state.total else "",
            state.error or state.detail,
        ]
        now.set_text(" · ".join(filter(None, parts)))

    tell()
    ui.timer(EVERY, tell)
    LiveCurves(view, lambda: [run])
    ui.label(words("Samples")).classes("text-h6").props("role=heading aria-level=2")
    Gallery(view, lambda: [run])
    ui.label(words("Similarity over time")).classes("text-h6").props("role=heading aria-level=2")
    Matrices(view, run)


PAGE = Page("/watch", "Watch", "monitoring", _build)
