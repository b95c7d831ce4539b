"""Watch: one run's curves, samples and matrices as they come."""

from __future__ import annotations

from urllib.parse import quote

from nicegui import ui

from ..curves import EVERY, Gallery, LiveCurves, Matrices
from ..shelf import all_runs, name_of, run_named
from ..shell import Page, View


def _build(view: View) -> None:
    words = view.words
    names = [name_of(view.folders, run) for run in all_runs(view.folders)]
    name = view.query.get("run", names[0] if names else "")
    run = run_named(view.folders, name)
    if run is None:
        ui.label(words("No run yet: make one under New run."))
        return
    chosen = ui.select(names, label=words("Run"), value=name).classes("min-w-64")
    chosen.on_value_change(lambda event: ui.navigate.to(f"/watch?run={quote(event.value)}"))
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
