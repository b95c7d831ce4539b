"""Compare: runs over each other, their samples side by side, and the settings that differ."""

from __future__ import annotations

import json
from typing import Any

from nicegui import ui

from ...reporting.runs import RunFolder, differing
from ..curves import Gallery, LiveCurves
from ..shelf import all_runs, name_of, run_named
from ..shell import Page, View
from ..starting import make_pair, settings_files, start_run


class _Compare:
    def __init__(self, view: View) -> None:
        self.view, self.words = view, view.words
        names = [name_of(view.folders, run) for run in all_runs(view.folders)]
        asked = [name for name in view.query.getlist("run") if name in names]
        with ui.row().classes("w-full items-end gap-2"):
            self.chosen = ui.select(names, label=self.words("Runs"), value=asked or names[:2], multiple=True)
            self.chosen.classes("min-w-64").props("use-chips").on_value_change(self._show)
        with ui.row().classes("w-full items-end gap-2"):
            files = settings_files(view.folders)
            self.file = ui.select(files, label=self.words("Settings file")).classes("min-w-48")
            ui.button(self.words("Start it with and without CREPA"), icon="call_split", on_click=self._start_pair)
        self.differing = ui.column().classes("w-full")
        self.curves = LiveCurves(view, self._runs)
        ui.label(self.words("Samples")).classes("text-h6").props("role=heading aria-level=2")
        self.gallery = Gallery(view, self._runs)
        self._show()

    def _runs(self) -> list[RunFolder]:
        found = [run_named(self.view.folders, name) for name in self.chosen.value or ()]
        return [run for run in found if run is not None]

    def _show(self) -> None:
        self.curves.update()
        self.gallery.update()
        runs = self._runs()
        self.differing.clear()
        if len(runs) < 2:
            return
        rows = differing([run.settings() for run in runs])
        columns: list[dict[str, Any]] = [{"name": "key", "label": "", "field": "key", "align": "left"}]
        for number, run in enumerate(runs):
            label = name_of(self.view.folders, run)
            columns.append({"name": f"run{number}", "label": label, "field": f"run{number}", "align": "left"})
        shown = [
            {"key": key, **{f"run{number}": _shown(value) for number, value in enumerate(values)}}
            for key, values in rows
        ]
        with self.differing:
            ui.label(self.words("Settings that differ")).classes("text-h6").props("role=heading aria-level=2")
            ui.table(rows=shown, columns=columns, row_key="key").classes("w-full").props("dense flat wrap-cells")

    def _start_pair(self) -> None:
        if not self.file.value:
            self.view.problem(self.words("Choose a settings file"))
            return
        try:
            names = make_pair(self.view.folders, self.file.value)
            for name in names:
                start_run(self.view.folders, name, queued=True)
        except (ValueError, OSError) as error:
            self.view.problem(str(error))
        else:
            self.view.done(self.words("{name} was started").format(name=" · ".join(names)))


def _shown(value: Any) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _build(view: View) -> None:
    _Compare(view)


PAGE = Page("/compare", "Compare", "compare_arrows", _build)
