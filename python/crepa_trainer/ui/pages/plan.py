"""Plan: what a run would do, before anything starts."""

from __future__ import annotations

from urllib.parse import quote

from nicegui import ui

from ..shell import Page, View
from ..starting import plan_rows, settings_files

# Values that name files, each shown in a line of its own.
_LISTS = ("skipped", "cut off", "cropped", "enlarged", "HDR", "captions cut")


async def _build(view: View) -> None:
    words = view.words
    name = view.choose(words("Settings file"), settings_files(view.folders), "file")
    box = ui.column().classes("w-full gap-2").props("aria-live=polite")
    if name is None:
        return
    with box:
        waiting = ui.row().classes("items-center gap-2")
        with waiting:
            ui.spinner()
            ui.label(words("reading configs and videos"))

    async def show() -> None:
        try:
            rows = await plan_rows(view.folders, name)
        except (ValueError, OSError) as error:
            waiting.delete()
            with box:
                ui.label(view.phrase(str(error))).classes("text-negative").props("role=alert")
            return
        waiting.delete()
        with box:
            lines = [(key, value.split("; ") if key in _LISTS else [value]) for key, value in rows]
            _table([(words(key), [view.phrase(line) for line in each]) for key, each in lines])
            ui.button(words("To the runs"), icon="play_arrow", on_click=lambda: _go(name))

    # The page is there first.
    ui.timer(0, show, once=True)


def _go(name: str) -> None:
    ui.navigate.to(f"/runs?file={quote(name)}")


def _table(rows: list[tuple[str, list[str]]]) -> None:
    with ui.element("dl").classes("grid grid-cols-1 sm:grid-cols-[10rem_1fr] gap-x-4 gap-y-1 w-full"):
        for name, lines in rows:
            with ui.element("dt").classes("font-medium"):
                ui.label(name)
            with ui.element("dd"):
                for line in lines:
                    ui.label(line)


PAGE = Page("/plan", "Plan", "checklist", _build)
