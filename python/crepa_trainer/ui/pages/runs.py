"""Runs: what each is doing, and starting, stopping, resuming, saving, sampling and exporting it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nicegui import ui

from ...control import Command, ask
from ...reporting.report import REPORT
from ...reporting.runs import KILLED, RunFolder
from ..shelf import all_runs, name_of
from ..shell import Page, View
from ..starting import export_run, resume_run, settings_files, start_run

_EVERY = 2.0  # seconds
_COLORS = {"done": "positive", "failed": "negative", KILLED: "negative", "stopped": "warning", "waiting": "grey"}


def time_left(seconds: float | None) -> str:
    """As h:mm:ss."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class _Row:
    """One run. It stays where it is and is brought up to date, so that what has the keyboard keeps it."""

    def __init__(self, run: RunFolder, view: View) -> None:
        self.run, self.view, self.words = run, view, view.words
        self.name = name_of(view.folders, run)
        with ui.card().classes("w-full") as self.card:
            with ui.row().classes("w-full items-center gap-2"):
                ui.link(self.name, f"/watch?run={quote(self.name)}").classes("text-h6")
                self.phase = ui.badge().props("role=status")
                self.place = ui.label()
                self.left = ui.label().classes("text-caption")
            self.bar = ui.linear_progress(0, show_value=False).props("instant-feedback")
            self.detail = ui.label().classes("text-caption")
            self.error = ui.label().classes("text-negative")
            with ui.row().classes("gap-2"):
                self.live = [
                    self._button("Save now", "save", lambda: self._ask("save")),
                    self._button("Sample now", "movie", lambda: self._ask("sample")),
                    self._button("Stop", "stop", lambda: self._ask("stop")),
                ]
                self.resume = self._button("Resume", "play_arrow", self._resume)
                self.export = self._button("Export", "ios_share", self._export)
                self.report = ui.link(self.words("Report"), f"{self._file(REPORT)}", new_tab=True)
                self._button("Log", "article", self._log)
        self.update()

    def _file(self, name: str) -> str:
        return self.view.file(self.run.path / name)

    def _button(self, text: str, icon: str, act: Callable[[], Awaitable[None] | None]) -> Any:
        name = f"{self.words(text)}: {self.name}"
        made = ui.button(self.words(text), icon=icon, on_click=act)
        return made.props(f'outline dense no-caps aria-label="{name}"')

    def update(self) -> None:
        state = self.run.state()
        phase = state.phase or "unknown"
        self.phase.set_text(self.words(phase))
        self.phase.props(f"color={_COLORS.get(phase, 'primary')}")
        self.place.set_text(f"{state.step} / {state.total}" if state.total else "")
        self.bar.set_value(state.step / state.total if state.total else 0)
        left = self.run.metrics().seconds_left(state.step, state.total) if phase == "training" else None
        self.left.set_text(self.words("{time} left").format(time=time_left(left)) if left is not None else "")
        killed = self.words("Its process ended without a word: resume it.")
        self.detail.set_text(killed if phase == KILLED else state.detail)
        self.error.set_text(self.view.phrase(state.error or ""))
        self.error.set_visibility(bool(state.error))
        for button in self.live:
            button.set_visibility(state.running)
        is_over = not state.running and bool(self.run.checkpoints())
        self.resume.set_visibility(is_over and phase != "done")
        self.export.set_visibility(is_over)
        self.report.set_visibility((self.run.path / REPORT).is_file())

    def _ask(self, command: Command) -> None:
        try:
            self.view.done(ask(self.run.path, command))
        except (ValueError, OSError) as error:
            self.view.problem(str(error))

    def _resume(self) -> None:
        try:
            resume_run(self.view.folders, self.run.path, queued=True)
        except (ValueError, OSError) as error:
            self.view.problem(str(error))
        else:
            self.view.done(self.words("{name} was started").format(name=self.name))

    async def _export(self) -> None:
        self.view.done(self.words("exporting"))
        try:
            said = await export_run(self.run.path, "diffusers")
        except (ValueError, OSError) as error:
            self.view.problem(str(error))
        else:
            self.view.done(said)

    def _log(self) -> None:
        with ui.dialog(value=True) as dialog, ui.card().classes("w-full max-w-screen-lg"):
            ui.label(self.run.log() or self.words("Nothing was printed.")).classes(
                "font-mono text-xs whitespace-pre-wrap overflow-auto max-h-96 w-full"
            )
            ui.button(self.words("Close"), on_click=dialog.close)


class _Runs:
    def __init__(self, view: View) -> None:
        self.view, self.words = view, view.words
        self.rows: dict[Path, _Row] = {}
        with ui.row().classes("items-end gap-2 w-full"):
            files = settings_files(view.folders)
            first = view.query.get("file")
            given = first if first in files else None
            self.file = ui.select(files, label=self.words("Settings file"), value=given).classes("min-w-48")
            self.queued = ui.checkbox(self.words("Wait for its turn"), value=True)
            ui.button(self.words("Start"), icon="play_arrow", on_click=self._start)
        self.none = ui.label(self.words("No run yet: make one under New run."))
        self.list = ui.column().classes("w-full gap-3")
        self.update()
        ui.timer(_EVERY, self.update)

    def update(self) -> None:
        runs = all_runs(self.view.folders)
        self.none.set_visibility(not runs)
        for path in self.rows.keys() - {run.path for run in runs}:
            self.rows.pop(path).card.delete()
        for run in runs:
            if run.path in self.rows:
                self.rows[run.path].update()
            else:
                with self.list:
                    self.rows[run.path] = row = _Row(run, self.view)
                if len(self.rows) < len(runs):
                    continue
                row.card.move(target_index=runs.index(run))

    def _start(self) -> None:
        if not self.file.value:
            self.view.problem(self.words("Choose a settings file"))
            return
        try:
            output = start_run(self.view.folders, self.file.value, queued=self.queued.value)
        except (ValueError, OSError) as error:
            self.view.problem(str(error))
        else:
            self.view.done(self.words("{name} was started").format(name=output.name))
            self.update()


def _build(view: View) -> None:
    _Runs(view)


PAGE = Page("/runs", "Runs", "playlist_play", _build)
