"""Clips: a data folder's videos with their buckets, and their captions, which are edited in place."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from nicegui import run, ui

from ..clips import PAGE_SIZE, ShownVideo, readers_of, save_caption, shown, videos_of
from ..form import Values
from ..shell import Page, View
from ..starting import read_settings, settings_files


class _Clips:
    def __init__(self, view: View, values: Values, videos: list[Path]) -> None:
        self.view, self.words, self.values, self.videos = view, view.words, values, videos
        ui.label(f"{self.words('Videos')}: {len(videos)}")
        pages = -(-len(videos) // PAGE_SIZE)
        if pages > 1:
            ui.pagination(1, pages, value=1, direction_links=True, on_change=self._turn)
        self.grid = ui.element("div").classes("grid grid-cols-1 sm:grid-cols-2 lg:grid-cols-3 gap-4 w-full")
        ui.timer(0, lambda: self._show(1), once=True)

    async def _turn(self, event: object) -> None:
        await self._show(int(getattr(event, "value", 1)))

    async def _show(self, page: int) -> None:
        self.grid.clear()
        for path in self.videos[(page - 1) * PAGE_SIZE : page * PAGE_SIZE]:
            # In a thread: other pages go on.
            video = await run.io_bound(shown, path, self.values)
            if video is not None:
                with self.grid:
                    self._card(video)

    def _card(self, video: ShownVideo) -> None:
        with ui.card().classes("w-full"):
            ui.image(f"/thumbnail?path={quote(str(video.path))}").classes("w-full h-40").props("fit=contain")
            ui.label(video.name).classes("font-medium")
            ui.label(self.view.phrase(video.about)).classes("text-caption")
            label = f"{self.words('Caption')}: {video.name}"
            text = ui.textarea(self.words("Caption"), value=video.caption).classes("w-full")
            text.props("outlined dense autogrow").props(f'aria-label="{label.replace(chr(34), chr(39))}"')
            save = ui.button(self.words("Save"), icon="save", on_click=lambda: self._save(video, text.value or ""))
            name = f"{self.words('Save')}: {video.name}".replace(chr(34), chr(39))
            save.props(f'outline dense no-caps aria-label="{name}"')

    async def _save(self, video: ShownVideo, text: str) -> None:
        readers = readers_of(self.view.folders, video.path)
        if readers and not await self._confirmed(readers):
            return
        try:
            save_caption(self.view.folders, video.path, text)
        except (ValueError, OSError) as error:
            self.view.problem(str(error))
        else:
            self.view.done(self.words("Saved"))

    async def _confirmed(self, readers: list[str]) -> bool:
        with ui.dialog() as dialog, ui.card():
            text = "{runs} is training on it, and goes on with the caption that it read. Change it for later runs?"
            ui.label(self.words(text).format(runs=", ".join(readers)))
            with ui.row():
                ui.button(self.words("Change"), on_click=lambda: dialog.submit(True))
                ui.button(self.words("Cancel"), on_click=lambda: dialog.submit(False)).props("flat")
        return bool(await dialog)


def _build(view: View) -> None:
    words = view.words
    name = view.choose(words("Settings file"), settings_files(view.folders), "file")
    if name is None:
        ui.label(words("Choose a settings file: its data folder is shown."))
        return
    try:
        values = read_settings(view.folders, name)
        videos = videos_of(view.folders, values)
    except (ValueError, OSError) as error:
        ui.label(view.phrase(str(error))).classes("text-negative").props("role=alert")
        return
    _Clips(view, values, videos)


PAGE = Page("/clips", "Clips", "video_library", _build)
